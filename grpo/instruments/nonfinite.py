"""The error of a step whose loss or gradient is not finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hark import UserError
from hark.grpo.types import Batch


class NonFiniteError(UserError, RuntimeError):
    """The loss or the gradient of a step is infinite or not a number."""


def check_finite(
    values: dict[str, float], batch: Batch, *, step: int, rank: int, examples: Sequence[Any], place: Path
) -> None:
    """Raise NonFiniteError if a value is not finite; `place` is where the step is recorded because of it."""
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if not broken:
        return
    names = [str(example.id) for example in examples]
    origins = dict.fromkeys(f"{field} of {names[row // batch.group_size]}" for field, row in nonfinite_rows(batch))
    raise NonFiniteError(
        f"step {step + 1}, rank {rank}: {' and '.join(broken)} must be finite; examples {', '.join(names)}; not finite "
        f"in the batch: {', '.join(list(origins)[:5]) or 'nothing'}; the step is recorded in {place} unless "
        "record.last is 0; the weights were not updated"
    )


def nonfinite_rows(batch: Batch) -> Iterator[tuple[str, int]]:
    """Each (field name, row) of a batch with a number that is not finite."""
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if torch.is_tensor(value) and value.is_floating_point():
            rows = ~value.isfinite().flatten(1).all(dim=1) if value.dim() > 1 else ~value.isfinite()
            yield from ((field.name, row) for row in rows.nonzero().flatten().tolist())
