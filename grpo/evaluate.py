"""Greedy decoding of answers, by the sampler that training uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hark.grpo.recorded import recorded_steps
from hark.grpo.runtime.collectives import World, check_interrupted, gather_rows
from hark.grpo.runtime.sharding import gathered
from hark.grpo.sampler import sample
from hark.models.policy import Policy, Prompt

# (example, completion, whether it has a stop token, its probability under the policy) -> the row to return
ToRow = Callable[[Any, str, bool, float], Any]


def evaluate(
    policy: Policy,
    batches: Iterable[Sequence[tuple[Any, Prompt]]],
    to_row: ToRow,
    world: World,
    *,
    max_new_tokens: int,
    batch: int,
    graphs: bool = False,
) -> list | None:
    """Answer every example greedily; returns one row per example, in rank order, on rank 0, None on other ranks.

    batches: this rank's (example, prompt) pairs; ranks may have different numbers of them. batch: how many prompts are
    decoded at a time. In a batch with more pairs than that, the next prompt starts when an answer is finished.
    graphs: record decode steps as CUDA graphs where that is possible. Raises Interrupted on all ranks after a signal.
    """
    rows: list = []
    with gathered(policy):
        recorded = recorded_steps(policy, wanted=graphs, gathered=True)
        for pairs in batches:
            examples, prompts = zip(*pairs, strict=True)
            rollout = sample(
                policy, prompts, group_size=1, max_new_tokens=max_new_tokens, temperature=0, batch=batch,
                recorded=recorded, interrupted=world.interruption.received,
            )  # fmt: skip
            world.progress.mark()
            completions = policy.completion_texts(rollout.tokens, rollout.mask)
            confidence = rollout.logprobs.sum(dim=1).exp()  # at temperature 1; padding adds 0
            rows += map(to_row, examples, completions, rollout.stopped.tolist(), confidence.tolist())
            if world.interruption.received():
                break
        check_interrupted(world)
    return gather_rows(rows, world)
