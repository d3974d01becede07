"""Greedy accuracy, with the sampler that training uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from grpo.sampler import sample
from grpo.sharding import World, gather_rows, gathered
from models.policy import Policy, Prompt

Judge = Callable[[Any, str], bool]  # (example, completion) -> is it right?


def evaluate(
    policy: Policy,
    batches: Iterable[Sequence[tuple[Any, Prompt]]],
    judge: Judge,
    world: World,
    *,
    max_new_tokens: int,
) -> list[dict] | None:
    """Answer every example greedily: on rank 0 one row per example, in rank order; None on the others.

    batches: this rank's (example, prompt) pairs; ranks may have different numbers of them.
    """
    rows = []
    with gathered(policy):
        for batch in batches:
            examples, prompts = zip(*batch, strict=True)
            rollout = sample(policy, prompts, group_size=1, max_new_tokens=max_new_tokens, temperature=0)
            texts = policy.completion_texts(rollout.tokens, rollout.mask)
            for example, text, stopped in zip(examples, texts, rollout.stopped.tolist(), strict=True):
                rows.append(
                    {
                        "id": example.id,
                        "task": example.task,
                        "category": example.category,
                        "prediction": text,
                        "correct": judge(example, text),
                        "stopped": stopped,
                    }
                )
    return gather_rows(rows, world)


def accuracies(rows: Sequence[dict], *by: str) -> dict[str, float]:
    """Share of right answers: "accuracy" over all rows, and "accuracy/COLUMN/VALUE" for each value of the columns."""
    groups: dict[str, list[bool]] = {"accuracy": [row["correct"] for row in rows]}
    for column in by:
        for row in rows:
            if row[column]:
                groups.setdefault(f"accuracy/{column}/{row[column]}", []).append(row["correct"])
    return {name: sum(correct) / len(correct) for name, correct in groups.items() if correct}
