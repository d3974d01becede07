"""Sharded checkpoints for exact resume: written beside the training, every byte covered by a digest.

A checkpoint is a directory `step-NNNNNN` with safetensors files of each rank and a manifest (`manifest.py`), which is
written last. Until then the directory is named `step-NNNNNN.partial`.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from hark import UserError
from hark.files import sync
from hark.grpo.runtime import manifest as manifests
from hark.grpo.runtime.collectives import GIB, World, exchange_rows, reduce_max, reduce_sums
from hark.grpo.runtime.manifest import DamageError, File, Manifest, Piece, Tensor, check_digest, check_size, name_of
from hark.grpo.runtime.sharding import release
from hark.grpo.runtime.shards import (
    MOMENTS,
    WEIGHTS,
    Parts,
    Shard,
    allocate_moments,
    held,
    parts_of,
    piece_of,
    read_parts,
    write_shards,
)
from hark.models.policy import Policy
from hark.shown import LONGEST_NAME, say, shown

MARGIN = 2**26  # bytes that must remain free on the disk after a checkpoint is written
SCORE = "accuracy"  # of a validation, by which the best checkpoint is kept


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged, of another model, or cannot be written."""


class Written(NamedTuple):
    """What one rank has written of a checkpoint: its files, and the pieces of tensors in them."""

    files: dict[str, File]
    tensors: dict[str, dict[str, tuple[tuple[int, ...], Piece]]]


class Saver:
    """Writes the checkpoints of a run. Every method is called on all ranks.

    keep: how many of the newest checkpoints are kept for resuming, besides that of the best validation accuracy.
    keep_weights: older ones lose the optimizer's state only. background: training goes on while a thread writes what
    was copied to host memory. required: a checkpoint that cannot be written raises CheckpointError; else it is said.
    about: the run, for the manifest. saved: the steps of the newest checkpoint that is there, 0 for none.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        *,
        keep: int,
        keep_weights: bool = False,
        background: bool = True,
        required: bool = True,
        about: Mapping[str, Any] = MappingProxyType({}),
        saved: int = 0,
    ):
        self._directory, self._world, self._keep, self._keep_weights = directory, world, keep, keep_weights
        self._background, self._required, self._about = background, required, dict(about)
        self._writing: _Writing | None = None
        self._figures: dict[str, float] = {}
        self.saved = saved

    def save(
        self,
        step: int,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        *,
        state: Mapping[str, Any] = MappingProxyType({}),
        further: Mapping[str, Policy] = MappingProxyType({}),
        validation: Mapping[str, float] = MappingProxyType({}),
        at_once: bool = False,
    ) -> None:
        """Save trained weights and the optimizer's state after `step` finished steps.

        state: further values, for JSON. further: other policies whose trained weights are saved, by name. validation:
        the figures of the validation after this step, of rank 0. at_once: return when the checkpoint is finished.
        """
        self.finish()
        began = time.perf_counter()
        shards = held(parts_of(policy, optimizer, further), is_main=self._world.is_main)
        partial = self._directory / f"{name_of(step)}.partial"
        if not self._begin(partial, shards):
            return
        model = {name: list(tensor.shape) for name, tensor in policy.model.state_dict().items()}
        about = self._about | ({"validation": dict(validation)} if validation else {})
        manifest = Manifest(step, model, files={}, tensors={}, state=dict(state), about=about)
        self._writing = _Writing(partial, manifest, shards, self._world)
        self._count("seconds/checkpoint", time.perf_counter() - began)
        if at_once or not self._background:
            self.finish()

    def finish(self, *, wait: bool = True) -> None:
        """Give a checkpoint its name if all ranks have written their files; `wait` until they have."""
        writing = self._writing
        if writing is None:
            return
        began = time.perf_counter()
        if wait:
            writing.thread.join()
        if not reduce_max(writing.thread.is_alive(), self._world):
            self._finished(writing)
        self._count("seconds/checkpoint", time.perf_counter() - began)

    def add_validation(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures of rank 0 to the newest checkpoint, if it is that of `step` and was saved without them.

        It was if a signal has ended the run in the validation after this step.
        """
        checkpoint = self._directory / name_of(step)
        if self._world.is_main and step and step == self.saved:
            for error in _error_of(lambda: _amend(checkpoint, {"validation": dict(figures)})):
                say(f"warning: the validation is not noted in {checkpoint / manifests.NAME}: {error}")

    def take_figures(self) -> dict[str, float]:
        """Seconds for which training waited for checkpoints, and for which a thread wrote them, since the last call."""
        taken, self._figures = self._figures, {}
        return taken

    def _count(self, name: str, seconds: float) -> None:
        self._figures[name] = self._figures.get(name, 0.0) + seconds

    def _finished(self, writing: _Writing) -> None:
        """Give a checkpoint its name, which all ranks have written."""
        self._writing = None
        written, errors = self._gathered(writing)
        if not errors and self._world.is_main:
            errors = _error_of(lambda: self._name(writing, written))
        errors = exchange_rows(errors if self._world.is_main else [], self._world)
        if errors:
            self._failed(writing.partial, errors[0])
            return
        self.saved = writing.manifest.step
        self._count("seconds/checkpoint_written", writing.seconds)

    def _begin(self, partial: Path, shards: dict[str, dict[str, Shard]]) -> bool:
        """Make the directory if there is room; whether there is."""
        own = sum(shard.data.nbytes for part in shards.values() for shard in part.values())
        needed = reduce_sums({"bytes": own}, self._world)["bytes"] + MARGIN
        errors = _error_of(lambda: self._make(partial, needed)) if self._world.is_main else []
        errors = exchange_rows(errors, self._world)
        if errors:
            self._failed(partial, errors[0])
        return not errors

    def _make(self, partial: Path, needed: float) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for left in self._directory.glob("step-*.partial"):  # by a run that was killed
            shutil.rmtree(left)
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise OSError(None, f"it takes {needed / GIB:.2f} GiB, and {free / GIB:.2f} GiB are free")
        partial.mkdir()

    def _gathered(self, writing: _Writing) -> tuple[list[Written], list[str]]:
        """What all ranks have written, and their errors."""
        rows = exchange_rows([(writing.written, writing.error)], self._world)
        return [written for written, _ in rows if written], [error for _, error in rows if error]

    def _name(self, writing: _Writing, written: Sequence[Written]) -> None:
        """Write the manifest and rename the directory; then delete checkpoints that are no longer kept."""
        partial, final = writing.partial, writing.partial.with_suffix("")
        joined(writing.manifest, written).write(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(self._directory)
        prune(self._directory, keep=self._keep, keep_weights=self._keep_weights)

    def _failed(self, partial: Path, error: str) -> None:
        if self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        found = checkpoints(self._directory, resumable=True)
        usable = f"the checkpoint of step {step_of(found[-1])} is intact" if found else "there is none before it"
        text = f"{partial.with_suffix('')} cannot be written ({error}); make room there; {usable}"
        if self._required:
            raise CheckpointError(f"{text}; the same command with run.resume=true goes on")
        if self._world.is_main:
            say(f"warning: {text}; training goes on without it (checkpoint.required=false)")


class _Writing:
    """A checkpoint that a thread writes."""

    def __init__(self, partial: Path, manifest: Manifest, shards: dict[str, dict[str, Shard]], world: World):
        self.partial, self.manifest = partial, manifest
        self.written: Written | None = None
        self.error: str | None = None
        self.seconds = 0.0  # which the thread took
        self._shards, self._suffix = shards, f"{world.rank:05d}-of-{world.size:05d}.safetensors"
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self.written = self._write()
        except BaseException as error:  # whatever ends the thread, such as a panic in Rust, which is no Exception
            self.error = _words(error)
        self._shards = {}
        self.seconds = time.perf_counter() - began

    def _write(self) -> Written:
        written = Written({}, {})
        for part, shards in self._shards.items():
            if shards:
                name = f"{part}-{self._suffix}"
                written.files[name] = write_shards(shards, self.partial / name)
                written.tensors[part] = {key: (shard.whole, piece_of(shard, name)) for key, shard in shards.items()}
        return written


def joined(manifest: Manifest, written: Sequence[Written]) -> Manifest:
    """The manifest with the files and the pieces of all ranks."""
    files = {name: file for one in written for name, file in one.files.items()}
    tensors: dict[str, dict[str, Tensor]] = {}
    for one in written:
        for part, pieces in one.tensors.items():
            for name, (shape, piece) in pieces.items():
                before = tensors.setdefault(part, {}).get(name, Tensor(shape, ()))
                tensors[part][name] = Tensor(shape, (*before.pieces, piece))
    return Manifest(manifest.step, manifest.model, files, tensors, manifest.state, manifest.about)


def set_aside(directory: Path, *, after: int) -> None:
    """Rename the checkpoints of later steps than `after`, from which a run goes on, so that they no longer count.

    They are damaged or of another run. A later save would take them for the newest ones and delete its own, and one
    that became readable again would be resumed, although the log no longer has its steps.
    """
    for path in _named(directory):
        if step_of(path) > after:
            aside = path.with_name(f"{path.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            say(f"warning: {path} is later than step {after}; renamed to {aside.name}; it can be deleted")


def prune(directory: Path, *, keep: int, keep_weights: bool) -> None:
    """Delete checkpoints that are neither among the newest `keep` nor that of the best validation accuracy.

    With `keep_weights` only their optimizer's state and further policies are deleted.
    """
    found = checkpoints(directory, resumable=True)
    best = best_of(found)
    for old in found[:-keep]:
        if old == best:
            continue
        if keep_weights:
            _strip(old)
        else:
            shutil.rmtree(old, ignore_errors=True)


def best_of(found: Sequence[Path]) -> Path | None:
    """Of checkpoints, that with the best validation accuracy, the earliest of equals; None if none was validated."""
    scores = {}
    for checkpoint in found:
        try:
            score = Manifest.read(checkpoint).about.get("validation", {}).get(SCORE)
        except DamageError:
            continue
        if score is not None:
            scores[checkpoint] = score
    return max(scores, key=lambda path: (scores[path], -step_of(path))) if scores else None


def _strip(checkpoint: Path) -> None:
    """Leave only the weights of a checkpoint."""
    try:
        manifest = Manifest.read(checkpoint)
    except DamageError:
        return
    weights = manifest.tensors[WEIGHTS]
    files = {piece.file for tensor in weights.values() for piece in tensor.pieces}
    kept = {name: file for name, file in manifest.files.items() if name in files}
    Manifest(manifest.step, manifest.model, kept, {WEIGHTS: weights}, manifest.state, manifest.about).write(checkpoint)
    for name in manifest.files.keys() - kept.keys():
        (checkpoint / name).unlink(missing_ok=True)


def _amend(checkpoint: Path, about: Mapping[str, Any]) -> None:
    """Add to what a checkpoint says about its run."""
    manifest = Manifest.read(checkpoint)
    dataclasses.replace(manifest, about=manifest.about | dict(about)).write(checkpoint)


def load_checkpoint(
    directory: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    at_most: float = math.inf,
    further: Mapping[str, Policy] = MappingProxyType({}),
) -> Manifest | None:
    """Load the newest intact checkpoint in `directory`, saved by any number of ranks; returns its manifest.

    A damaged one is named, and the one before it is loaded. Returns None if there is no checkpoint.
    at_most: the largest number of finished steps that is wanted. further: as it was saved.

    Raises CheckpointError if all are damaged, or if one is of a model with other tensors.
    """
    damaged = []
    found = _agreed(candidates(directory, at_most), world)
    if found and not optimizer.state:
        allocate_moments(optimizer)
    parts = parts_of(policy, optimizer, further)
    for checkpoint in reversed(found):
        manifest, damage = _read(checkpoint, policy, parts, world)
        if manifest is not None:
            return manifest
        damaged.append(f"{checkpoint} is damaged: {damage}")
        if world.is_main:
            say(f"warning: {damaged[-1]}; the checkpoint before it is tried")
    if damaged:
        raise CheckpointError(
            f"{directory}: no checkpoint is intact; {'; '.join(damaged[:3])}; to start again from the model, choose "
            "another run.directory, or delete this one"
        )
    return None


def load_weights(checkpoint: Path, policy: Policy, world: World) -> None:
    """Load the trained weights of a checkpoint into the policy, whose frozen weights stay as they are.

    Raises CheckpointError if it is damaged, or of another model.
    """
    manifest, damage = _read(checkpoint, policy, parts_of(policy, None), world)
    if manifest is None:
        raise CheckpointError(f"{checkpoint} is damaged: {damage}; choose another checkpoint of the run")


def _read(checkpoint: Path, policy: Policy, parts: Parts, world: World) -> tuple[Manifest | None, str]:
    """Read the parts of a checkpoint; its manifest, or None and the damage that a rank found.

    While tensors are read, a thread computes the digests of this rank's share of the files.
    """
    manifest, damages = None, []
    try:
        manifest = Manifest.read(checkpoint)
        _compare(checkpoint, manifest.model, policy)
        files = sorted(_files_of(manifest, parts))
        for name in files:
            check_size(checkpoint / name, manifest.files[name])
        with ThreadPoolExecutor(1) as pool:
            own = files[world.rank :: world.size]
            checks = [pool.submit(check_digest, checkpoint / name, manifest.files[name]) for name in own]
            damages += _error_of(lambda: read_parts(checkpoint, manifest, parts))
            damages += [problem for check in checks for problem in _error_of(check.result)]
    except DamageError as error:
        damages.append(str(error))
    release(policy)  # weights gathered before are the old ones
    # A digest names the file that was changed; what else went wrong is a consequence.
    found = exchange_rows(damages[::-1], world)
    return (None, found[0]) if found else (manifest, "")


def _files_of(manifest: Manifest, parts: Parts) -> set[str]:
    """The files that hold the parts; also those of tensors that are not wanted, because their bytes are there too."""
    return {
        piece.file
        for part in parts for tensor in manifest.tensors.get(part, {}).values() for piece in tensor.pieces
    }  # fmt: skip


def _error_of(call: Callable[[], Any]) -> list[str]:
    """Call a function; the words of its error, if it fails because of a file."""
    try:
        call()
    except (DamageError, OSError) as error:
        return [_words(error)]
    return []


def _words(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.partition("\n")[0][:300] or type(error).__name__


def _agreed(paths: Sequence[Path], world: World) -> list[Path]:
    """What rank 0 has found, on all ranks: directories on a shared disk may differ for a moment."""
    return exchange_rows(list(paths) if world.is_main else [], world)


def candidates(directory: Path, at_most: float = math.inf) -> list[Path]:
    """Directories that have the name of a checkpoint that can be resumed, oldest first; they may be damaged."""
    return [path for path in _named(directory) if step_of(path) <= at_most and not _has_weights_only(path)]


def checkpoints(directory: Path, *, resumable: bool = False) -> list[Path]:
    """Finished checkpoints, oldest first; `resumable`: only those that still have the optimizer's state."""
    found = [path for path in _named(directory) if (path / manifests.NAME).exists()]
    return [path for path in found if not (resumable and _has_weights_only(path))]


def _named(directory: Path) -> list[Path]:
    """Directories that have the name of a checkpoint, oldest first."""
    found = [path for path in directory.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=step_of)


def newest_intact(directory: Path) -> Manifest | None:
    """The manifest of the newest checkpoint to resume from; only manifests are read."""
    for checkpoint in reversed(candidates(directory)):
        try:
            return Manifest.read(checkpoint)
        except DamageError:
            continue
    return None


def _has_weights_only(checkpoint: Path) -> bool:
    """Whether the optimizer's state was deleted, by the manifest: a file that is lost does not count."""
    try:
        return MOMENTS not in Manifest.read(checkpoint).tensors
    except DamageError:
        return False


def step_of(checkpoint: Path) -> int:
    """How many steps were finished when a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def _compare(path: Path, saved: Mapping[str, Sequence[int]], policy: Policy) -> None:
    own = {name: list(tensor.shape) for name, tensor in policy.model.state_dict().items()}
    differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {len(differing)} tensors differ, the first is "
            f"{shown(name, LONGEST_NAME)}, {saved.get(name, 'absent')} in the checkpoint and "
            f"{own.get(name, 'absent')} in model.path; use the model.path of that run, or another run.directory"
        )
