"""Recorded steps: what a step computed, in files that can be read without Hark.

RUN/record/step-000010/rank-0 holds the part of rank 0: step.json and tensors.safetensors, whose contents docs/replay.md
lists. Each rank writes its own part and no rank waits for another. A part gets its name when it is whole; step.json has
the size and the SHA-256 of the tensors, so that a part which is damaged later is not taken for what was computed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hark import UserError
from hark.grpo.instruments.metrics import finite
from hark.grpo.instruments.record_kinds import ROWS, SHAPES, SUMS, wrong_part
from hark.grpo.runtime.manifest import DamageError, File, check_digest, check_size, signed, unsigned
from hark.grpo.types import stacked
from hark.limits import is_plain
from hark.shown import shown

FORMAT = 5  # of the files; a reader refuses others
VALUES, TENSORS = "step.json", "tensors.safetensors"
LARGEST = 256 << 20  # bytes of a step.json
LONGEST_REASON = 200  # characters of what is wrong, in a message


class RecordError(UserError, RuntimeError):
    """A recorded step that is missing, incomplete, or cannot be written or read."""


@dataclass(frozen=True)
class StepRecord:
    """One step: `values` is what JSON holds, `tensors` has one row per completion, in the order of `completions`."""

    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def step(self) -> int:
        """The number of the step, counted from 1 as in metrics.jsonl."""
        return self.values["step"]

    @property
    def is_whole(self) -> bool:
        """Whether the parts of all ranks are there."""
        return len(self.values["parts"]) == self.values["ranks"]


def place_of(run: Path, step: int) -> Path:
    """The directory of a step, counted from 1."""
    return run / "record" / f"step-{step:06d}"


def recorded_steps(run: Path) -> list[int]:
    """The steps of which a run has at least one part, in order."""
    numbers = {part.parent.name.removeprefix("step-") for part in (run / "record").glob("step-*/rank-*")}
    return sorted(int(number) for number in numbers if number.isdecimal())


def write_part(run: Path, record: StepRecord) -> int:
    """Write one rank's part of a step; returns its bytes. Raises RecordError if that fails."""
    (rank,) = record.values["parts"]
    final = place_of(run, record.step) / f"rank-{rank}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        path = partial / TENSORS
        save_file({name: tensor.contiguous() for name, tensor in record.tensors.items()}, path)
        (partial / VALUES).write_bytes(signed(finite(record.values | {"tensors": entry_of(path)})))
        size = sum(file.stat().st_size for file in partial.iterdir())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{partial} cannot be written ({error}); make room there, or set record.every=0") from error
    return size


def entry_of(path: Path) -> dict[str, Any]:
    """The size in bytes and the SHA-256 of a file, as step.json has those of the tensors."""
    return asdict(File.of(path))


def read_step(run: Path, step: int) -> StepRecord:
    """A step of a run, its parts joined. Raises RecordError if there is none or a file is broken."""
    found = [part for part in place_of(run, step).glob("rank-*") if part.name.removeprefix("rank-").isdecimal()]
    parts = sorted(found, key=lambda part: int(part.name.removeprefix("rank-")))
    if not parts:
        steps = recorded_steps(run)
        known = f"it has {_listed(steps)}" if steps else "it has none; train with record.every above 0"
        raise RecordError(f"{run}: step {step} is not recorded; {known}")
    return joined([_read_part(part) for part in parts])


def joined(parts: Sequence[StepRecord]) -> StepRecord:
    """The parts of one step as one record, in the order of the step, which does not depend on the ranks.

    A tensor that some part lacks is left out.
    """
    first = parts[0]
    values = dict(first.values)
    values["parts"] = [rank for part in parts for rank in part.values["parts"]]
    prompts, rows = _ascending(list(map(_positions, parts))), _ascending(list(map(_positions_of_rows, parts)))
    for name, order in (("prompts", prompts), ("completions", rows)):
        items = [item for part in parts for item in part.values[name]]
        values[name] = [items[n] for n in order]
    values["tokens"] = {key: text for part in parts for key, text in part.values["tokens"].items()}
    updates = zip(*(part.values["updates"] for part in parts), strict=False)
    values["updates"] = [_joined_update(terms) for terms in updates]
    shared = [name for name in first.tensors if all(name in part.tensors for part in parts)]
    tensors = {name: stacked([part.tensors[name] for part in parts]) for name in shared}
    if "prompt_ids" in tensors:
        ids = tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())
        tensors |= {"prompt_ids": torch.cat([ids[n] for n in prompts])}
        tensors |= {"prompt_lengths": tensors["prompt_lengths"][prompts]}
    tensors |= {name: tensor[rows] for name, tensor in tensors.items() if SHAPES.get(name, "").startswith(ROWS)}
    return StepRecord(values, tensors)


def _positions(part: StepRecord) -> list[int]:
    """The positions of the prompts in the run's order."""
    return [prompt["position"] for prompt in part.values["prompts"]]


def _positions_of_rows(part: StepRecord) -> list[int]:
    """The position of the prompt of each completion; a step that ended early has none."""
    each = [position for position in _positions(part) for _ in range(part.values["group_size"])]
    return each[: len(part.values["completions"])]


def _ascending(parts: Sequence[Sequence[int]]) -> list[int]:
    """The indices of the numbers of all parts, from the smallest to the largest; of equal ones as they are."""
    numbers = [number for part in parts for number in part]
    return sorted(range(len(numbers)), key=lambda index: numbers[index])


def delete_steps(run: Path, steps: Sequence[int]) -> None:
    """Delete recorded steps."""
    for step in steps:
        shutil.rmtree(place_of(run, step))


def _read_part(part: Path) -> StepRecord:
    path = part / TENSORS
    try:
        raw = _regular(part / VALUES).read_bytes()
        written = json.loads(raw)["format"]
        if written != FORMAT:
            found = shown(repr(written), LONGEST_REASON)
            raise RecordError(f"{part} has format {found}; expected {FORMAT}; read it with the Hark that wrote it")
        values = unsigned(raw, VALUES)
        file = File(**values.pop("tensors"))
        check_size(path, file)
        check_digest(path, file)
        tensors = load_file(path)
    except DamageError as error:
        reason = shown(error, LONGEST_REASON)
        raise RecordError(f"{part}: {reason}; it was changed after it was written; copy the record again") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = shown(error, LONGEST_REASON)
        raise RecordError(f"{part} cannot be read ({reason}); expected {VALUES} and {TENSORS}") from error
    if wrong := wrong_part(values, tensors):
        wrong = shown(wrong, LONGEST_REASON)
        raise RecordError(f"{part}: {wrong} is not what a recorder writes; see docs/replay.md; copy the record again")
    return StepRecord(values, tensors)


def _regular(path: Path) -> Path:
    """The path of a file of text that can be read at once: no pipe, no device, no hole of gigabytes."""
    if not is_plain(path, LARGEST):
        raise ValueError(f"{path.name} is not a file of at most {LARGEST >> 20} MB")
    return path


def _joined_update(terms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An update of all ranks: the sums of their terms. All other figures are those of all ranks already."""
    known = [name for name in SUMS if all(one.get(name) is not None for one in terms)]
    return terms[0] | {name: sum(one[name] for one in terms) for name in known}


def _listed(steps: Sequence[int]) -> str:
    """The first and the last steps of a list, in words."""
    shown = [*map(str, steps)] if len(steps) <= 8 else [*map(str, steps[:4]), "...", *map(str, steps[-3:])]
    return ", ".join(shown)
