"""Saving the batch of a step for inspection, which `check_finite` does if the loss or the gradient is not finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from hark import UserError
from hark.grpo.types import Batch, PolicyBatch
from hark.models.policy import Audio, Prompt


class NonFiniteError(UserError, RuntimeError):
    """The loss or the gradient of a step is infinite or not a number."""


def check_finite(
    values: dict[str, float], batch: Batch, *, step: int, rank: int, examples: Sequence[Any], directory: Path
) -> None:
    """Raise NonFiniteError if a value is not finite, after saving the step's batch in `directory`."""
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if not broken:
        return
    path = directory / f"step-{step + 1:06d}-rank-{rank}.pt"
    names = [str(example.id) for example in examples]
    write_step(path, batch, step=step, rank=rank, examples=names)
    origins = dict.fromkeys(f"{field} of {names[row // batch.group_size]}" for field, row in nonfinite_rows(batch))
    raise NonFiniteError(
        f"step {step + 1}, rank {rank}: {' and '.join(broken)} must be finite; examples {', '.join(names)}; not finite "
        f"in the batch: {', '.join(list(origins)[:5]) or 'nothing'}; the batch is saved in {path}, to be read with "
        "hark.grpo.instruments.trace.read_step; the weights were not updated"
    )


def write_step(path: Path, batch: Batch, *, step: int, rank: int, examples: Sequence[str]) -> None:
    """Write one rank's batch of a step, on the CPU and in plain types, with the ids of its examples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = tree_map(lambda value: value.cpu() if torch.is_tensor(value) else value, dataclasses.asdict(batch))
    torch.save({"step": step, "rank": rank, "examples": list(examples), "batch": fields}, path)


def read_step(path: Path, device: torch.device | str = "cpu") -> tuple[Batch, dict]:
    """The batch that `write_step` wrote, and its step, rank and examples."""
    record = torch.load(path, map_location=device, weights_only=True)
    fields = record.pop("batch")
    prompts = tuple(
        Prompt(prompt["ids"], tuple(Audio(**clip) for clip in prompt["clips"])) for prompt in fields.pop("prompts")
    )
    kind = PolicyBatch if "advantages" in fields else Batch
    return kind(prompts=prompts, **fields), record


def nonfinite_rows(batch: Batch) -> Iterator[tuple[str, int]]:
    """Each (field name, row) of a batch with a number that is not finite."""
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if torch.is_tensor(value) and value.is_floating_point():
            rows = ~value.isfinite().flatten(1).all(dim=1) if value.dim() > 1 else ~value.isfinite()
            yield from ((field.name, row) for row in rows.nonzero().flatten().tolist())
