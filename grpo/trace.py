"""Steps on disk, to be looked at and scored again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from grpo.types import Batch
from models.policy import Prompt


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
