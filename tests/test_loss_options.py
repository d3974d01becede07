"""What `loss` adds to an algorithm: KL estimates, an adapted beta, a reference that moves, an entropy bonus, the SFT
term, truncated completions, a sampler that differs, and functions of a user's own."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from hark.grpo import loop
from hark.grpo.algorithms import AlgorithmError, find_advantage, find_own_loss
from hark.grpo.config import ConfigError, LossConfig, to_yaml
from hark.grpo.distribution import entropy
from hark.grpo.loss import adapted_beta, importance_weights, kl_k1, kl_k2, kl_term, policy_loss
from hark.grpo.objective import Objective
from hark.grpo.optimizer import learning_rate
from hark.grpo.runtime.sharding import mix_weights
from hark.grpo.types import Rollout
from hark.launch.common.config_file import load_config
from tests.ranks import on_ranks
from tests.runs import build, computed, read_metrics, train_all, weights

RATIO, KL = 0.6, math.log(0.5 / 0.25)


def rows(*values) -> torch.Tensor:
    return torch.tensor(values)


def test_the_estimates_of_the_kl_worked_by_hand():
    # d = log pi_ref - log pi = -1/2: .5, .125 and e^-.5 - 1 + .5
    logprobs, ref = rows([-1.0]), rows([-1.5])
    assert kl_k1(logprobs, ref).item() == 0.5 and kl_k2(logprobs, ref).item() == 0.125
    assert kl_term(logprobs, logprobs, ref, kl="k3", gradient="own").item() == pytest.approx(0.106531, abs=1e-6)


def test_the_corrected_gradients_are_on_average_that_of_the_kl_and_that_of_k1_is_0():
    """Over all tokens of a distribution, weighted by their probability, at pi = pi_old."""
    logits = rows([0.3, -0.5, 1.1]).requires_grad_()
    ref = rows([0.1, 0.4, -0.2]).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    true = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)[0]

    def mean_gradient(kl: str, gradient: str) -> torch.Tensor:
        term = kl_term(logprobs, logprobs.detach(), ref, kl=kl, gradient=gradient)
        return torch.autograd.grad((logprobs.exp().detach() * term).sum(), logits, retain_graph=True)[0]

    for kl, gradient in (("k2", "own"), ("k1", "k2"), ("k3", "k2"), ("k1", "ratio"), ("k3", "ratio")):
        torch.testing.assert_close(mean_gradient(kl, gradient), true, rtol=1e-5, atol=1e-6)
    assert mean_gradient("k1", "own").abs().max() < 1e-6
    assert (mean_gradient("k3", "own") - true).abs().max() > 0.1, "GRPO's own estimate has another gradient"


def test_beta_rises_above_the_target_and_falls_below_it_worked_by_hand():
    settings = dict(target=0.1, completions=100, horizon=10_000)
    assert adapted_beta(0.04, 0.11, **settings) == pytest.approx(0.04 * 1.001)  # e = .1
    assert adapted_beta(0.04, 9.0, **settings) == pytest.approx(0.04 * 1.002)  # e = .2 at most
    assert adapted_beta(0.04, 0.0, **settings) == pytest.approx(0.04 * 0.998)  # e = -.2 at least


def test_importance_weights_are_cut_off_and_scale_the_policy_loss_alone():
    # From NeMo-RL's tests: with the sampler's logprobs -.5, -1.5, -.8 the weights are .6065, 1.6487, .8187.
    old, sampled = rows([-1.0, -1.0, -1.0]), rows([-0.5, -1.5, -0.8])
    importance = importance_weights(old, sampled, cap=10.0)
    torch.testing.assert_close(importance, rows([0.6065, 1.6487, 0.8187]), rtol=0, atol=5e-5)
    assert importance_weights(old, sampled, cap=1.5).tolist()[0][1] == 1.5
    new, third = old + rows([0.5, 1.0, 1.5]).log(), torch.full((1, 3), 1 / 3)
    loss, _ = policy_loss(new, old, None, rows([1.0, -1.0, 2.0]), third, importance=importance)
    assert loss.item() == pytest.approx(-0.2065, abs=5e-5)
    with_kl, _ = policy_loss(new, old, old, rows([1.0, -1.0, 2.0]), third, importance=importance, beta=1.0)
    penalty = [1 / ratio - math.log(1 / ratio) - 1 for ratio in (0.5, 1.0, 1.5)]
    assert (with_kl - loss).item() == pytest.approx(sum(penalty) / 3, abs=1e-6)


def test_the_entropy_and_its_gradient_are_those_of_its_definition():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 2] = -torch.inf  # a suppressed id
    logits.requires_grad_()
    value = entropy(logits.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    share = logits.detach().softmax(-1)
    expected = -(share * share.clamp(min=1e-300).log()).sum(-1)
    torch.testing.assert_close(value.detach(), expected)
    # dH / dz_i = -p_i (log p_i + H)
    torch.testing.assert_close(gradient, -share * (share.clamp(min=1e-300).log() + expected[:, None]))


def test_an_entropy_bonus_raises_the_entropy(settings, tmp_path):
    runs = [[*settings, "loss.beta=0", "loss.advantage=reward", f"run.directory={tmp_path}/{weight}",
             f"loss.entropy={weight}", "optim.steps=8", "checkpoint.every=0"] for weight in (0, 5)]  # fmt: skip
    on_ranks(1, train_all, runs)
    plain, bonus = (read_metrics(tmp_path / str(weight))[-1]["entropy"] for weight in (0, 5))
    assert bonus > plain + 0.01


def test_a_schedule_falls_to_its_floor():
    rates = [learning_rate(step, peak=2.0, schedule="cosine", warmup=0, total=100, floor=0.1) for step in (0, 50, 100)]
    assert rates == pytest.approx([2.0, 1.1, 0.2])  # .1 + .9 / 2 of the peak at half of the way
    assert learning_rate(50, peak=2.0, schedule="linear", warmup=0, total=100, floor=0.1) == pytest.approx(1.1)


def test_truncated_completions_are_left_out_of_the_loss_and_of_the_count_of_tokens(settings, tmp_path):
    config = load_config([*settings, "loss.truncated=mask", "loss.token_weights=token-mean", "loss.beta=0",
                          f"run.directory={tmp_path}"])  # fmt: skip

    def run(world) -> None:
        trainer, batches = build(world, config), []
        accumulate = trainer.accumulate
        trainer.accumulate = lambda batch: batches.append(batch) or accumulate(batch)
        rollouts, draw = [], trainer.draw
        trainer.draw = lambda *arguments: rollouts.append(draw(*arguments)) or rollouts[-1]
        trainer.step(0)
        (batch,), (rollout,) = batches, rollouts
        kept = rollout.stopped
        assert 0 < kept.sum() < len(kept), "some are truncated"
        assert (batch.weights[~kept] == 0).all()
        expected = torch.where(rollout.mask[kept], 1 / rollout.mask[kept].sum(), 0.0)
        torch.testing.assert_close(batch.weights[kept], expected)

    on_ranks(1, run)


def test_the_supervised_term_adds_the_gradient_of_the_right_answers(settings, tmp_path):
    """loss = policy loss + 2 * SFT: its gradient is the sum of both gradients."""
    config = load_config([*settings, "loss.sft=2", "loss.beta=0", f"run.directory={tmp_path}"])

    def run(world) -> None:
        trainer = build(world, config, target=lambda example: f"the answer is {example.answer}")
        examples, prompts, keys = zip(*trainer.data.step(0), strict=True)
        rollout = trainer.draw(prompts, keys)
        advantages = torch.linspace(-1, 1, len(rollout.tokens))
        tokens = float(rollout.mask.sum())
        alone = trainer.batch(rollout, rollout.logprobs, None, advantages, rollout.mask, tokens)
        both = trainer.with_answers(alone, examples)
        found = []
        for batch in (alone, both, both.given):
            trainer.policy.zero_grad()
            if batch is both.given:
                super(type(trainer), trainer).accumulated(both)  # the policy loss again, without the term
                policy = gradient_of(trainer.policy)
                trainer.policy.zero_grad()
                trainer.accumulate(both)
                found.append({name: value - policy[name] for name, value in gradient_of(trainer.policy).items()})
            else:
                sums = trainer.accumulate(batch)
                found.append(gradient_of(trainer.policy))
        likelihood = sums["sft_loss"]
        assert likelihood > 0 and sums["loss"] > 0
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value + found[2][name], rtol=1e-3, atol=1e-5)
        assert max(value.abs().max() for value in found[2].values()) > 1e-3

    on_ranks(1, run)


def gradient_of(policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


MOVING = ["loss.kl_target=0.001", "loss.kl_horizon=32", "loss.reference_every=1", "loss.reference_mix=0.25"]


def test_an_adapted_beta_and_a_moving_reference_are_resumed_bit_for_bit_on_two_ranks(settings, tmp_path):
    settings = [*settings, *MOVING, "checkpoint.every=2"]
    whole = [*settings, f"run.directory={tmp_path}/whole", "optim.steps=4"]
    half = [*settings, f"run.directory={tmp_path}/half", "optim.steps=2"]
    rest = [*settings, f"run.directory={tmp_path}/half", "optim.steps=4", "run.resume=true"]
    on_ranks(2, train_all, [whole, half, rest])
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = (read_metrics(tmp_path / name) for name in ("whole", "half"))
    for one, two in zip(first, second, strict=True):
        assert all(one[name] == two[name] for name in computed(one))
    betas = [line["beta"] for line in first]
    assert betas[0] == 0.04 and len(set(betas)) > 2, "it was adapted"
    manifest = json.loads((tmp_path / "half" / "checkpoints" / "step-000004" / "hark.json").read_text())
    assert manifest["state"]["beta"] != betas[-1], "the state is that of the next step"


def test_the_reference_moves_by_its_share(settings, tmp_path):
    config = load_config([*settings, *MOVING, f"run.directory={tmp_path}"])

    def run(world) -> None:
        trainer = build(world, config)
        policy, reference = (dict(one.named_parameters()) for one in (trainer.policy, trainer.reference.policy))
        before = {name: weight.detach().clone() for name, weight in reference.items()}
        trainer.step(0)
        moved = 0.0
        for name, weight in reference.items():
            torch.testing.assert_close(weight, before[name] + 0.25 * (policy[name] - before[name]))
            moved = max(moved, float((weight.detach() - before[name]).abs().max()))
        assert moved > 1e-5
        mix_weights(trainer.policy, trainer.reference.policy, share=1.0)
        assert all(torch.equal(weight, policy[name]) for name, weight in reference.items())

    on_ranks(1, run)


def test_a_sampler_that_differs_is_weighed_and_its_weights_are_logged(settings, tmp_path):
    config = load_config([*settings, "loss.importance_cap=1.2", f"run.directory={tmp_path}"])

    def run(world) -> None:
        trainer = build(world, config)
        draw = trainer.draw

        def another_engine(prompts, keys, **options) -> Rollout:
            rollout = draw(prompts, keys, **options)
            off = torch.where(rollout.tokens % 2 == 0, 0.5, -0.1) * rollout.mask
            return dataclasses.replace(rollout, logprobs=rollout.logprobs - off)

        trainer.draw = another_engine
        means = trainer.step(0)
        even = means["importance_capped_share"]  # e^.5 is above the cap, e^-.1 is not
        assert 0 < even < 1
        assert means["importance"] == pytest.approx(even * 1.2 + (1 - even) * math.exp(-0.1), abs=1e-4)
        assert means["sampler_gap"] == pytest.approx(even * 0.5 + (1 - even) * 0.1, abs=1e-4)

    on_ranks(1, run)


OWN = """
import torch

def halves(table):
    rewards = table.rewards.unflatten(0, (-1, table.group_size))
    return torch.where(rewards > rewards.median(dim=1, keepdim=True).values, 0.5, -0.5).flatten()

def likelihood(logprobs, old_logprobs, advantages, mask):
    return -advantages * logprobs

def too_few(logprobs, advantages):
    return logprobs

class Table:
    pass
"""


def test_a_loss_and_an_advantage_of_ones_own_are_trained_with(settings, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    own = [*settings, f"run.directory={tmp_path}/own", f"loss.kind={path}:likelihood", f"loss.advantage={path}:halves"]
    named = [*settings, f"run.directory={tmp_path}/named", "loss.bound=reinforce", f"loss.advantage={path}:halves"]
    on_ranks(1, train_all, [own, named])
    a, b = weights(tmp_path / "own"), weights(tmp_path / "named")
    assert all(torch.equal(a[name], b[name]) for name in a), "-A log pi is REINFORCE"


def test_a_function_of_ones_own_that_cannot_be_called_is_refused_at_the_start(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(AlgorithmError, match=r"too_few\(logprobs, old_logprobs, advantages, mask\)"):
        find_own_loss(f"{path}:too_few")
    with pytest.raises(AlgorithmError, match=r"expected a function Table\(table\)"):
        find_advantage(f"{path}:Table")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.kl_target=0.1", "loss.beta=0"], "loss.kl_target is set, and loss.beta is 0"),
        (["loss.reference_every=5", "lora.rank=4"], "the reference of adapters"),
        (["loss.kl_in=reward", "loss.kl_gradient=k2"], "loss.kl_gradient is of a KL in the loss"),
    ],
)
def test_options_that_do_not_go_together_are_refused(settings, overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config([*settings, "run.directory=unused", *overrides])


def test_a_named_setting_gives_its_keys_and_a_given_key_wins(settings):
    loss = load_config([*settings, "run.directory=unused", "loss.kind=gspo", "loss.clip_high=0.01"]).loss
    assert (loss.ratio, loss.clip_low, loss.clip_high, loss.beta) == ("sequence", 3e-4, 0.01, 0.0)
    assert load_config([*settings, "run.directory=unused"]).loss == LossConfig()


def test_a_named_setting_on_the_command_line_takes_the_place_of_the_files_keys(settings):
    path = Path(settings[0])
    path.write_text("loss: {kind: gspo, clip_high: 0.01, beta: 0.1, entropy: 0.5}")
    words = [*settings, "run.directory=unused"]
    loss = load_config(words).loss
    assert (loss.ratio, loss.clip_high, loss.beta, loss.entropy) == ("sequence", 0.01, 0.1, 0.5), "the file's keys win"
    loss = load_config([*words, "loss.kind=dapo"]).loss
    assert (loss.ratio, loss.clip_high, loss.beta, loss.entropy) == ("token", 0.28, 0.0, 0.5)
    assert load_config([*words, "loss.beta=0.2", "loss.kind=dapo"]).loss.beta == 0.2
    path.write_text(to_yaml(load_config([*words, "loss.kind=dr_grpo"])))  # as a run saves it, with every key
    loss = load_config([*words, "loss.kind=grpo"]).loss
    assert (loss.advantage, loss.token_weights, loss.beta, loss.entropy) == ("std", "sequence-mean", 0.04, 0.5)


def test_the_constant_length_is_the_longest_completion_unless_it_is_given():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for length, expected in ((None, 1 / 16), (4, 1 / 8)):
        goal = Objective(LossConfig(token_weights="constant", length=length), max_new_tokens=8)
        assert (goal.weights(mask, completions=2, tokens=6) == expected).all()


def test_one_completion_per_question_trains_by_the_reward_itself(settings, tmp_path):
    config = load_config([*settings, "rollout.group_size=1", "loss.kind=reinforce", "loss.advantage=reward",
                          f"run.directory={tmp_path}"])  # fmt: skip
    on_ranks(1, lambda world: loop.train(build(world, config)))
    assert all(math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 for line in read_metrics(tmp_path))
