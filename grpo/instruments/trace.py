"""Steps on disk, to be looked at and scored again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from hark.grpo.types import Batch
from hark.models.policy import Prompt


def write_step(path: Path, batch: Batch, *, step: int, rank: int, examples: Sequence[str]) -> None:
    """Write one rank's batch of a step with the ids of its examples, on the CPU, in plain types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = tree_map(lambda value: value.cpu() if torch.is_tensor(value) else value, asdict(batch))
    torch.save({"step": step, "rank": rank, "examples": list(examples), "batch": fields}, path)


def read_step(path: Path, device: torch.device | str = "cpu") -> tuple[Batch, dict]:
    """The batch that `write_step` wrote, and its step, rank and examples."""
    record = torch.load(path, map_location=device, weights_only=True)
    fields = record.pop("batch")
    prompts = tuple(Prompt(**prompt) for prompt in fields.pop("prompts"))
    return Batch(prompts=prompts, **fields), record


def nonfinite_rows(batch: Batch) -> Iterator[tuple[str, int]]:
    """Names of a batch's fields and the rows in which they hold a number that is not one."""
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if torch.is_tensor(value) and value.is_floating_point():
            rows = ~value.isfinite().flatten(1).all(dim=1) if value.dim() > 1 else ~value.isfinite()
            yield from ((field.name, row) for row in rows.nonzero().flatten().tolist())
