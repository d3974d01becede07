"""Greedy answers to questions, by the sampler that training uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hark.grpo.runtime.collectives import World, gather_rows
from hark.grpo.runtime.sharding import gathered
from hark.grpo.sampler import sample
from hark.models.policy import Policy, Prompt

ToRow = Callable[[Any, str, bool], Any]  # (example, completion, whether it ended by itself) -> what to keep of it


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
    """Answer every example greedily: on rank 0 one row per example, in rank order; None on the other ranks.

    batches: this rank's (example, prompt) pairs; ranks may have different numbers of them. batch: how many prompts are
    decoded at a time. A larger batch of pairs than that fills the places of answers that have ended.
    graphs: record the decode step as CUDA graphs, on a GPU.
    """
    rows: list = []
    with gathered(policy):
        for pairs in batches:
            examples, prompts = zip(*pairs, strict=True)
            rollout = sample(
                policy, prompts, group_size=1, max_new_tokens=max_new_tokens, temperature=0, batch=batch, graphs=graphs
            )
            completions = policy.completion_texts(rollout.tokens, rollout.mask)
            rows += map(to_row, examples, completions, rollout.stopped.tolist())
    return gather_rows(rows, world)
