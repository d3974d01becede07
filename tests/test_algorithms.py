"""Every named algorithm: against worked numbers, against tests/by_hand.py, and the same update however it is split."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hark.grpo.advantage import ADVANTAGES, RewardTable
from hark.grpo.algorithms import ALGORITHMS, named_values
from hark.grpo.config import LossConfig
from hark.grpo.objective import Objective
from hark.launch.common.config_file import load_config
from tests import by_hand
from tests.ranks import on_ranks
from tests.runs import build


def objective(name: str, **changes) -> Objective:
    return Objective(LossConfig(**{"kind": name} | named_values(name) | changes), max_new_tokens=by_hand.LONGEST)


def rows(*values) -> torch.Tensor:
    return torch.tensor(values)


# Worked numbers: the three tokens have old logprobs -1, the ratios 1/2, 1, 3/2 and the advantages 1, -1, 2. The values
# are the losses of the three tokens, by hand; docs/algorithms.md has them.
TOKENS = {
    "grpo": [-0.5, 1.0, -2.4],  # min(.5, .8), -1, min(3, 2.4)
    "dr_grpo": [-0.5, 1.0, -2.4],
    "dapo": [-0.5, 1.0, -2.56],  # min(3, 1.28 * 2)
    "gspo": [-0.908560, 0.9997, -1.817121],  # s = .75 ** (1/3); A < 0 takes the clipped 1 - 3e-4
    "cispo": [0.846574, -1.0, 1.783605],  # -.5 * (-1 + ln .5), 1 * (-1), -1.5 * 2 * (-1 + ln 1.5)
    "cispo_verl": [0.846574, -1.0, 1.426884],  # 1.2 for 1.5
    "cispo_nemo": [1.354518, -1.0, 1.426884],  # .8 for .5 too
    "sapo": [-1.510163, 1.904762, -4.979675],
    "two_sided": [-0.5, 1.0, -2.4],
    "reinforce": [1.693147, -1.0, 1.189070],  # -A log pi
    "rloo": [-0.75, 0.8, -1.5],  # the product .75 of the ratios; A < 0 takes the clipped .8
    "reinforce_pp": [-0.5, 1.0, -2.4],
    "reinforce_pp_baseline": [-0.5, 1.0, -2.4],
    "gdpo": [-0.5, 1.0, -2.4],
    "opo": [-0.5, 1.0, -2.4],
    "lite_ppo": [-0.5, 1.0, -2.4],
    "pass_at_k": [-0.5, 1.0, -2.4],
}
# And advantages of the rewards 1, 0, 0, 1 of a group whose completions have 2, 4, 3 and 1 tokens.
RELATIVE = [0.865875, -0.865875, -0.865875, 0.865875]  # 1/2 / (sqrt(1/3) + 1e-4)
WHITENED = [1.449138, -0.621059, -0.621059, 1.449138]  # 3 of 10 tokens have 1: (1 - .3) / sqrt(.21 * 10 / 9)
ADVANTAGE = {
    "std": RELATIVE,
    "batch": RELATIVE,  # one group is the whole step
    "population": [0.9998, -0.9998, -0.9998, 0.9998],  # 1/2 / (1/2 + 1e-4)
    "none": [0.5, -0.5, -0.5, 0.5],
    "leave_one_out": [2 / 3, -2 / 3, -2 / 3, 2 / 3],
    "reward": [1.0, 0.0, 0.0, 1.0],
    "gdpo": [0.865939, -0.865939, -0.865939, 0.865939],  # standardised once more: .865875 / (.999827 + 1e-4)
    "reinforce_pp": WHITENED,
    "reinforce_pp_baseline": WHITENED,
    "opo": [0.7, -0.3, -0.3, 0.7],  # the baseline is 3/10
    "pass_at_k": [0.0, 0.0, 0.0, 0.0],  # a tie for the best
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_loss_of_three_tokens_is_that_worked_by_hand(name):
    old = rows([-1.0, -1.0, -1.0])
    new = old + rows([0.5, 1.0, 1.5]).log()
    mask = torch.ones(1, 3, dtype=torch.bool)
    _, terms = objective(name, beta=0.0).loss(
        new, old, None, rows([1.0, -1.0, 2.0]), torch.ones(1, 3), mask=mask, beta=0.0, sampled_logprobs=None,
        entropy=torch.zeros(1, 3),
    )  # fmt: skip
    torch.testing.assert_close(terms["loss"], rows(TOKENS[name]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_advantages_of_a_group_are_those_worked_by_hand(name):
    table = RewardTable(rows([1.0], [0.0], [0.0], [1.0]), [1.0], 4, rows(2, 4, 3, 1))
    torch.testing.assert_close(ADVANTAGES[name](table), rows(*ADVANTAGE[name]), rtol=0, atol=2e-6)


def test_gdpo_of_two_rewards_and_two_groups_worked_by_hand():
    accuracy, form = [1.0, 0, 0, 1, 1, 1, 1, 0], [1.0, 1, 0, 1, 1, 1, 1, 1]
    table = RewardTable(rows(accuracy, form).T, [1.0, 1.0], 4, torch.ones(8))
    expected = [1.023641, -0.274297, -1.772986, 1.023641, 0.374672, 0.374672, 0.374672, -1.124017]
    torch.testing.assert_close(ADVANTAGES["gdpo"](table), rows(*expected), rtol=0, atol=2e-6)


def test_the_best_of_a_group_gets_its_lead():
    table = RewardTable(rows([0.25], [1.0], [0.5], [0.0]), [1.0], 4, torch.ones(4))
    assert ADVANTAGES["pass_at_k"](table).tolist() == [0.0, 0.5, 0.0, 0.0]


def drawn(seed: int):
    """The inputs of a step: columns, and lists of the logprobs of 12 completions in 3 groups; their ratios vary."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, by_hand.LONGEST + 1, 12)
    old = [-generator.exponential(1.5, length) for length in lengths]
    new = [one + generator.normal(0, 0.8, len(one)) for one in old]
    ref = [one + generator.normal(0, 0.3, len(one)) for one in old]
    columns = np.round(generator.random((12, 2)), 2)
    return columns, new, old, ref


def padded(lists) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in lists], batch_first=True)


def computed(name: str, columns, new, old, ref, *, ranks: int = 1, micro: int = 12, pad: int = 0):
    """Loss and gradient (B, T) of a step that is split over ranks and into micro-batches of rows, and padded more."""
    goal, config = objective(name), LossConfig(**named_values(name))
    mask = torch.nn.functional.pad(padded([np.ones(len(one), bool) for one in new]), (0, pad))
    logprobs, old, ref = (torch.nn.functional.pad(padded(each), (0, pad)) for each in (new, old, ref))
    logprobs.requires_grad_()
    penalties = goal.penalties(old, ref, mask, config.beta)
    advantages = goal.advantages(torch.tensor(columns), [1.0, 0.5], mask, penalties, group_size=4)
    total = torch.zeros((), dtype=torch.float64)
    for rank_rows in torch.arange(12).chunk(ranks):
        for part in rank_rows.split(micro):
            weights = goal.weights(mask[part], completions=12, tokens=float(mask.sum()))
            loss, _ = goal.loss(
                logprobs[part], old[part], ref[part], advantages[part], weights, mask=mask[part], beta=config.beta,
                sampled_logprobs=None, entropy=torch.zeros(weights.shape),
            )  # fmt: skip
            loss.backward()
            total += loss.detach()
    return float(total), logprobs.grad[:, : mask.shape[1] - pad]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_and_gradient_are_those_of_an_independent_implementation(name):
    for seed in range(5):
        columns, new, old, ref = drawn(seed)
        loss, gradient = computed(name, columns, new, old, ref)
        expected, slopes = by_hand.step(name, columns, [1.0, 0.5], 4, new, old, ref)
        # Advantages and weights are float32, 6e-8 relative; the largest ratios are of size 10.
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(gradient, padded(slopes), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_ranks_and_padding_change_neither_loss_nor_gradient(name):
    step = drawn(7)
    loss, gradient = computed(name, *step)
    for split in ({"micro": 1}, {"micro": 5, "ranks": 2}, {"ranks": 3, "pad": 4}):
        other, slopes = computed(name, *step, **split)
        assert other == pytest.approx(loss, rel=1e-12), split
        torch.testing.assert_close(slopes, gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("penalised", [False, True])
def test_advantages_are_defined_for_one_completion_equal_rewards_and_missing_ones(name, penalised):
    none = float("nan")
    cases = {
        1: [[0.0, 1.0], [1.0, none], [none, none]],
        3: [[1.0, 1.0]] * 3 + [[none, 1.0], [1.0, none], [none, none]] + [[none, none]] * 3,
    }
    for group, columns in cases.items():
        count = len(columns)
        penalties = 0.1 * torch.ones(count, 4) if penalised else None
        table = RewardTable(rows(*columns), [1.0, 0.5], group, torch.full((count,), 4), penalties)
        values = ADVANTAGES[name](table)
        assert values.isfinite().all()
        missing = rows(*columns).isnan().all(dim=1)
        assert (values[missing] == 0).all(), "without any reward there is no advantage"
        in_group = name not in ("reward", "reinforce_pp", "reinforce_pp_baseline")
        if in_group and (group == 1 or not penalised):
            assert (values[: group if group > 1 else count] == 0).all()


def test_the_reward_of_a_completion_is_that_of_its_given_rewards():
    table = RewardTable(rows([1.0, float("nan")], [1.0, 1.0]), [1.0, 0.5], 2, rows(1, 1))
    assert table.rewards.tolist() == [1.0, 1.5]


def gradients(world, settings: list[str], directory) -> None:
    """Save the gradient of one step of each algorithm, with ratios that differ from 1; no weight changes."""
    config = load_config([*settings, "optim.clip_norm=1e9", "run.directory=unused"])
    trainer = build(world, config)
    found: dict[str, dict[str, torch.Tensor]] = {}
    rollout = trainer.draw(*zip(*((prompt, key) for _, prompt, key in trainer.data.step(0)), strict=True))
    off = 0.4 * torch.sin(rollout.tokens.float()) * rollout.mask
    rollout = dataclasses.replace(rollout, logprobs=rollout.logprobs + off)
    reference = trainer.reference_logprobs(rollout) + off / 2
    trainer.draw, trainer.reference_logprobs = lambda *_: rollout, lambda _: reference
    for name in ALGORITHMS:
        loss = LossConfig(**{"kind": name, "beta": 0.04} | named_values(name))
        trainer.config = dataclasses.replace(config, loss=loss)
        trainer.reference._loss = loss
        trainer.objective, trainer.reference.beta = objective(name), loss.beta
        trainer.optimizer.step = lambda name=name: found.update({name: whole_gradients(trainer.policy)})
        trainer.step(0)
    if world.is_main:
        torch.save(found, directory)


def whole_gradients(policy) -> dict[str, torch.Tensor]:
    grads = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone() for name, grad in grads.items()}


def test_the_trainer_computes_the_same_gradient_in_one_micro_batch_and_in_one_each_on_two_ranks(settings, tmp_path):
    for ranks, size in ((1, 4), (2, 1)):
        on_ranks(ranks, gradients, [*settings, f"optim.micro_batch={size}"], tmp_path / str(ranks))
    whole, parts = (torch.load(tmp_path / str(ranks)) for ranks in (1, 2))
    for algorithm, gradient in whole.items():
        for name, values in gradient.items():
            gap, size = (values - parts[algorithm][name]).abs().max(), values.abs().max()
            # Sums of some hundred float32 terms in another order; the bias of the keys has no gradient but this.
            assert gap < 1e-4 * size + 1e-7, (algorithm, name)
    norms = {name: sum(g.square().sum() for g in gradient.values()).sqrt() for name, gradient in whole.items()}
    assert all(norm > 1e-3 for norm in norms.values()), norms
    assert len({round(float(norm), 5) for norm in norms.values()}) > len(norms) - 2, "cispo_nemo may equal another"


def table_of(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table after a line, by the name in their first cell; | inside a cell is written \\|."""
    lines = page.split(heading, 1)[1].split("\n|---", 1)[1].split("\n")[1:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    return {name.strip("`"): rest for name, *rest in cells}


def test_the_page_of_the_algorithms_has_their_settings_and_worked_values():
    page = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text()
    named = table_of(page, "# Algorithms by name")
    assert named.keys() == ALGORITHMS.keys()
    for name, (sets, _, worked, source) in named.items():
        expected = ", ".join(f"`{key}: {yaml.safe_dump(value).split()[0]}`" for key, value in ALGORITHMS[name].items())
        assert sets == expected, name
        assert [float(number) for number in worked.split(", ")] == pytest.approx(TOKENS[name], abs=1e-6), name
        assert source
    advantages = table_of(page, "## Advantages")
    assert advantages.keys() == ADVANTAGES.keys()
    for name, (worked, _) in advantages.items():
        assert [float(number) for number in worked.split(", ")] == pytest.approx(ADVANTAGE[name], abs=1e-6), name
