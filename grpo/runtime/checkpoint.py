"""Sharded checkpoints for exact resume, and export to an ordinary Hugging Face directory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from hark import UserError
from hark.grpo.runtime.collectives import World
from hark.models.loading import tied_names
from hark.models.lora import adapter_delta, adapter_tensors, is_adapter, whole, write_adapters
from hark.models.policy import Policy
from hark.models.stored import StoredTensors

WEIGHTS, OPTIMIZER, FURTHER = "weights", "optimizer", "further"
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen weights are read from model.path
SHARD_BYTES = "5GB"  # of one safetensors file of an export
# Files of a checkpoint directory that an export does not copy: the weights, which it writes anew.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, broken, or of another model."""


def save_checkpoint(
    directory: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    keep: int,
    keep_weights: bool = False,
    state: dict[str, Any] | None = None,
    further: Mapping[str, Policy] = MappingProxyType({}),
) -> None:
    """Write `directory/step-NNNNNN` after `step` finished steps: trained weights and the optimizer's state.

    state: further values, for JSON. further: other policies whose trained weights are saved, by name.

    Every rank writes its shards. The directory is renamed to its final name when all files are written, so a crash
    leaves no partial checkpoint of that name. The newest `keep` checkpoints are kept; older ones are deleted, or, with
    `keep_weights`, only their optimizer's state is.
    """
    final = directory / f"step-{step:06d}"
    partial = directory / f"{final.name}.partial"
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    weights, moments = get_state_dict(policy, optimizer, options=TRAINED)
    with _writable(partial):
        dcp.save(weights, checkpoint_id=partial / WEIGHTS)
        dcp.save(moments, checkpoint_id=partial / OPTIMIZER)
        for name, other in further.items():
            dcp.save(get_model_state_dict(other, options=TRAINED), checkpoint_id=partial / FURTHER / name)
    if world.is_main:
        manifest = {"step": step, "tensors": _signature(policy), "state": state or {}}
        (partial / "hark.json").write_text(json.dumps(manifest))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(directory, resumable=True)[:-keep]:
            for part in (OPTIMIZER, FURTHER) if keep_weights else (".",):
                shutil.rmtree(old / part, ignore_errors=part == FURTHER)
    dist.barrier()


def load_checkpoint(
    directory: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    *,
    at_most: float = math.inf,
    further: Mapping[str, Policy] = MappingProxyType({}),
) -> tuple[int, dict[str, Any]]:
    """Load the newest complete checkpoint in `directory`, saved by any number of ranks: its finished steps, its state.

    at_most: the largest number of finished steps that is wanted. further: as it was saved.

    Raises CheckpointError if there is none, or if it is of a model with other tensors.
    """
    usable = [path for path in checkpoints(directory, resumable=True) if step_of(path) <= at_most]
    if not usable:
        raise CheckpointError(f"{directory}: no checkpoint to resume from; run without run.resume=true to start afresh")
    settings = [{key: group[key] for key in ("betas", "weight_decay")} for group in optimizer.param_groups]
    with _readable(usable[-1], policy) as saved:
        weights, moments = get_state_dict(policy, optimizer, options=TRAINED)
        dcp.load(weights, checkpoint_id=usable[-1] / WEIGHTS)
        dcp.load(moments, checkpoint_id=usable[-1] / OPTIMIZER)
        for name, other in further.items():  # in place, as in `load_weights`
            dcp.load(get_model_state_dict(other, options=TRAINED), checkpoint_id=usable[-1] / FURTHER / name)
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments, options=TRAINED)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # keep those of the configuration
    return saved["step"], saved.get("state", {})


def load_weights(checkpoint: Path, policy: Policy) -> None:
    """Load the trained weights of a checkpoint into the policy, whose frozen weights stay as they are."""
    with _readable(checkpoint, policy):
        # The state dict holds the policy's own tensors, and they are loaded in place.
        dcp.load(get_model_state_dict(policy, options=TRAINED), checkpoint_id=checkpoint / WEIGHTS)


def checkpoints(directory: Path, *, resumable: bool = False) -> list[Path]:
    """Finished checkpoints, oldest first; `resumable`: only those that still have the optimizer's state."""
    finished = (path for path in directory.glob("step-*") if (path / "hark.json").exists() and not path.suffix)
    return sorted(path for path in finished if (path / OPTIMIZER).exists() or not resumable)


def step_of(checkpoint: Path) -> int:
    """How many steps were finished when a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def export(policy: Policy, target: Path, world: World, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a directory that transformers' `from_pretrained` loads, with the hub's tensor names, adapters merged.

    Frozen weights, tokenizer and processor are copied from the checkpoint that the policy was loaded from.
    """
    from huggingface_hub import save_torch_state_dict

    stored = StoredTensors(policy.directory, policy)
    state: dict[str, torch.Tensor] = {}
    tied = {name for name, first in tied_names(policy.model).items() if name != first}
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if name in tied or is_adapter(name):
            continue
        delta = adapter_delta(policy, name)  # a collective, like `whole` in the next line
        trained = whole(tensor) if tensor.requires_grad else None
        if world.is_main:
            value = stored.read(name) if trained is None else trained
            value = value if delta is None else value.to(delta) + delta
            is_buffer = not isinstance(tensor, torch.nn.Parameter)  # a buffer keeps its dtype, which may be integer
            state[name] = value.cpu() if is_buffer else value.to("cpu", dtype)
    if world.is_main:
        with _replaced(target) as partial:
            for file in policy.directory.iterdir():
                if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
                    shutil.copy2(file, partial / file.name)
            _set_dtype(partial / "config.json", dtype)
            state = stored.as_stored(state) | {name: stored.read_stored(name) for name in stored.untouched}
            state = {name: _own_memory(tensor) for name, tensor in state.items()}
            save_torch_state_dict(state, partial, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})
    dist.barrier()


def export_adapters(policy: Policy, target: Path, world: World) -> None:
    """Write the policy's adapters in PEFT's format."""
    state = adapter_tensors(policy)
    if world.is_main:
        with _replaced(target) as partial:
            write_adapters(policy, state, partial)
    dist.barrier()


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that shares its memory with no other: pieces of one would be taken for tied weights."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """An empty directory to write to; at the end of the block it replaces `target`."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the stored weights into their config.json."""
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)  # its name in older files
    path.write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")


@contextmanager
def _readable(checkpoint: Path, policy: Policy) -> Iterator[dict[str, Any]]:
    """Check a checkpoint and yield its manifest; reading errors, inside the block too, become CheckpointErrors."""
    try:
        saved = json.loads((checkpoint / "hark.json").read_text())
        _compare(checkpoint, saved["tensors"], _signature(policy))
        yield saved
    except (OSError, ValueError, KeyError, CheckpointException) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be read ({error}); expected a complete checkpoint; delete it to use the one before, "
            "if there is one"
        ) from error


@contextmanager
def _writable(partial: Path) -> Iterator[None]:
    """Turn torch's errors of writing, which are no Exceptions, into CheckpointErrors."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise CheckpointError(
            f"{partial} cannot be written ({cause}); make room there, then continue from the checkpoint before, if "
            "there is one, with run.resume=true"
        ) from error


def _signature(policy: Policy) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in policy.model.state_dict().items()}


def _compare(path: Path, saved: dict[str, list[int]], own: dict[str, list[int]]) -> None:
    differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {len(differing)} tensors differ, the first is {name}, "
            f"{saved.get(name, 'absent')} in the checkpoint and {own.get(name, 'absent')} in model.path; "
            "use the model.path of that run, or another run.directory"
        )
