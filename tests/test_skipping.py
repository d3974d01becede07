"""Groups without a gradient are not scored, and the update is the one it would have been."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch

from hark.grpo import learner, loop
from hark.grpo import reference as reference_module
from hark.grpo.runtime.collectives import World
from hark.grpo.types import PolicyBatch
from hark.launch.common.config_file import load_config
from tests.ranks import on_ranks
from tests.runs import ROUNDING, build, largest_difference, read_metrics

# Which of its groups get unequal rewards: of each rank, in each step.
TAUGHT = {
    1: [[[True, False, True, False], [False] * 4, [False, False, False, True]]],
    2: [[[True, True], [False, False], [False, True]], [[False, False], [False, False], [True, True]]],
}
SHARES = {1: [0.5, 1.0, 0.75], 2: [0.5, 1.0, 0.25]}
# One at a time. On two ranks as many in a step as the rank with the most; one where no group has a gradient.
MICRO_BATCHES = {1: 2 + 1 + 1, 2: 2 + 1 + 2}
OPTIONS = {
    "once": [],
    "twice": ["loss.inner_epochs=2", "loss.token_weights=token-mean", "optim.weight_decay=0.1"],
}


def train_both_ways(world: World, settings: list[str], directory) -> None:
    for name, options in OPTIONS.items():
        for skips in (True, False):
            run = [*settings, *options, f"run.directory={directory}/{name}-{skips}"]
            scored = train(world, [*run, "loss.beta=0", "optim.micro_batch=1"], skips=skips)
            epochs = 2 if name == "twice" else 1
            assert len(scored) == epochs * (MICRO_BATCHES[world.size] if skips else 12 // world.size)


def train(world: World, settings: list[str], *, skips: bool = True) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Train on the rewards of TAUGHT; the mask and the entropy of each micro-batch that was scored."""
    plan, scored = iter(TAUGHT[world.size][world.rank]), []

    def rewards(examples, completions) -> torch.Tensor:
        groups_with_gradient = torch.tensor(next(plan))
        column = torch.outer(
            groups_with_gradient, torch.tensor([0.0, 2.0, 1.0, 1.0])
        ).flatten()  # two of four at the mean
        return torch.stack([column, torch.zeros(len(completions))], dim=1)

    def score(policy, prompts, tokens, mask, **kwargs):
        logprobs, spread = original(policy, prompts, tokens, mask, **kwargs)
        scored.append((mask, spread.entropy))
        return logprobs, spread

    original = reference_module.score
    trainer = build(world, load_config(settings), rewards=rewards)
    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "probe"))
        for module in (learner, reference_module):
            stack.enter_context(patch.object(module, "score", score))
        if not skips:
            stack.enter_context(patch.object(PolicyBatch, "skips_groups", False))
        loop.train(trainer)
    return scored


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_update_is_as_if_no_group_had_been_skipped(ranks, settings, tmp_path):
    """One rank with nothing to score, no rank with anything, and ranks with more and fewer micro-batches."""
    on_ranks(ranks, train_both_ways, settings, tmp_path)
    for name in OPTIONS:
        assert largest_difference(tmp_path / f"{name}-True", tmp_path / f"{name}-False") < ROUNDING, name
        skipped, whole = (read_metrics(tmp_path / f"{name}-{skips}") for skips in (True, False))
        for one, two in zip(skipped, whole, strict=True):
            for key in ("loss", "grad_norm", "tokens", "completion_tokens", "reward_std", "equal_reward_share"):
                assert one[key] == pytest.approx(two[key], abs=1e-4), (name, key)
        assert [line["skipped_share"] for line in skipped] == SHARES[ranks]
        assert [line["skipped_share"] for line in whole] == [0.0, 0.0, 0.0]
        # A rollout is a quarter of a step of one update, and a seventh of one of two, but for the mel frames' gradient.
        rollout = 1 / 7 if name == "twice" else 1 / 4
        assert skipped[1]["macs"] == pytest.approx(whole[1]["macs"] * rollout, rel=0.02)
        assert [line["grad_norm"] > 1e-3 for line in skipped] == [True, False, True]
    assert largest_difference(tmp_path / "once-True", tmp_path / "twice-True") > 1e-4, "else nothing was compared"


def test_metrics_of_scoring_are_means_over_what_was_scored(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "loss.beta=0", "optim.micro_batch=1"]
    scored = []
    on_ranks(1, lambda world: scored.extend(train(world, run)))
    first, second, third = read_metrics(tmp_path / "run")
    means = [(entropy.sum(dim=1) / mask.sum(dim=1)).mean().item() for mask, entropy in scored]
    assert first["entropy"] == pytest.approx(sum(means[:2]) / 2, rel=1e-5)
    assert third["entropy"] == pytest.approx(means[3], rel=1e-5)
    assert 0 < first["sampler_gap"] < ROUNDING
    assert not {"entropy", "sampler_gap", "clip_share"} & second.keys(), "nothing was scored, so there is no mean"
    assert second["loss"] == 0.0


def test_with_a_reference_no_group_is_skipped(settings, tmp_path):
    """Its KL term has a gradient whatever the rewards."""
    run = [*settings, f"run.directory={tmp_path}/run"]
    scored = []
    on_ranks(1, lambda world: scored.extend(train(world, run)))
    assert len(scored) == 3 * (2 + 2), "two micro-batches of the reference and two of the policy in each step"
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped_share"] for line in lines] == [0.0, 0.0, 0.0]
    assert lines[1]["grad_norm"] > 1e-6 and lines[1]["kl"] > 0


def test_a_group_whose_advantages_are_not_numbers_is_scored(settings):
    """So that the error is found."""
    mask = torch.ones(4, 1, dtype=torch.bool)
    advantages = torch.tensor([0.0, 0.0, torch.nan, torch.nan])
    weights = mask.float()
    batch = PolicyBatch(("a", "b"), 2, mask.long(), mask, weights, weights, None, advantages)
    assert batch.groups_with_gradient() == [1]
