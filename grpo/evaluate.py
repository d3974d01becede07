"""Greedy accuracy, with the sampler that training uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hark.data.benchmarks.report import COLUMNS, grouped, share
from hark.grpo.runtime.collectives import World, gather_rows
from hark.grpo.runtime.sharding import gathered
from hark.grpo.sampler import sample
from hark.models.policy import Policy, Prompt

Judge = Callable[[Any, str], bool | None]  # (example, completion) -> is it right? None where that is not known


def evaluate(
    policy: Policy,
    batches: Iterable[Sequence[tuple[Any, Prompt]]],
    judge: Judge,
    world: World,
    *,
    max_new_tokens: int,
    batch: int,
    graphs: bool = False,
) -> list[dict] | None:
    """Answer every example greedily: on rank 0 one row per example, in rank order; None on the others.

    batches: this rank's (example, prompt) pairs; ranks may have different numbers of them. batch: how many are answered
    at a time; the larger the batches are than that, the less a long answer holds up the others.
    graphs: record the decode step as CUDA graphs, on a GPU.
    """
    rows = []
    with gathered(policy):
        for pairs in batches:
            examples, prompts = zip(*pairs, strict=True)
            rollout = sample(
                policy, prompts, group_size=1, max_new_tokens=max_new_tokens, temperature=0, batch=batch, graphs=graphs
            )
            texts = policy.completion_texts(rollout.tokens, rollout.mask)
            for example, text, stopped in zip(examples, texts, rollout.stopped.tolist(), strict=True):
                row = _place(example) | {"prediction": text, "correct": judge(example, text), "stopped": stopped}
                rows.append(row)
    return gather_rows(rows, world)


def blank_row(question: Any) -> dict:
    """The row of a question that could not be asked: wrong, unless its answer is not known anyway."""
    hidden = getattr(question, "answer", -1) is None and not question.truth
    correct = None if hidden else False
    return _place(question) | {"prediction": "", "correct": correct, "stopped": None}


def _place(question: Any) -> dict:
    """Where a question belongs in the tables; a line that could not be read has no more than its id."""
    columns = {column: getattr(question, column, "") for column in COLUMNS}
    return {"id": question.id} | columns


def accuracies(rows: Sequence[dict], *by: str) -> dict[str, float]:
    """Share of right answers: "accuracy" over all rows, and "accuracy/COLUMN/VALUE" for each value of the columns."""
    shares = {"accuracy": share(rows)}
    for column in by:
        shares |= {f"accuracy/{column}/{value}": group for value, group in grouped(rows, column).items()}
    return {name: figure.accuracy for name, figure in shares.items() if figure.total}
