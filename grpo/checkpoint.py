"""Sharded checkpoints for exact resume, and export to an ordinary Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from grpo.sharding import World
from models.loading import tied_names
from models.policy import Policy

SHARD_BYTES = "5GB"  # of one safetensors file of an export
# Not part of an export: weights, and what belongs to weights.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, broken, or of another model."""


def save_checkpoint(
    directory: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, world: World, *, keep: int
) -> None:
    """Write `directory/step-NNNNNN` after `step` finished steps; every rank writes its shards.

    The name appears when all of it is written, so a crash leaves no half checkpoint; the newest `keep` stay.
    """
    final = directory / f"step-{step:06d}"
    partial = directory / f"{final.name}.partial"
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(_state(policy, optimizer), checkpoint_id=partial)
    if world.is_main:
        (partial / "hark.json").write_text(json.dumps({"step": step, "tensors": _signature(policy)}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _complete(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(directory: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest checkpoint under `directory`, saved by any number of ranks; how many steps it had finished.

    Raises CheckpointError where there is none, or it is of a model with other tensors.
    """
    complete = _complete(directory)
    if not complete:
        raise CheckpointError(f"{directory}: no checkpoint to resume from; run without run.resume=true to start afresh")
    newest = complete[-1]
    settings = [{key: group[key] for key in ("betas", "weight_decay")} for group in optimizer.param_groups]
    try:
        saved = json.loads((newest / "hark.json").read_text())
        _compare(newest, saved["tensors"], _signature(policy))
        state = _state(policy, optimizer)
        dcp.load(state, checkpoint_id=newest)
    except (OSError, ValueError, KeyError, CheckpointException) as error:
        raise CheckpointError(
            f"{newest} cannot be read ({error}); expected a whole checkpoint; delete it to resume from the one before"
        ) from error
    set_state_dict(policy, optimizer, model_state_dict=state["policy"], optim_state_dict=state["optimizer"])
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # the configuration's, not the checkpoint's
    return saved["step"]


def export(policy: Policy, target: Path, world: World) -> None:
    """Write a directory that transformers' `from_pretrained` loads, with the hub's tensor names, in float32.

    Config, tokenizer and processor files are copied from the directory the policy came from.
    """
    from huggingface_hub import save_torch_state_dict

    state, tied = {}, {name for name, first in tied_names(policy.model).items() if name != first}
    for name, tensor in policy.model.state_dict().items():
        if name in tied:
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # every rank takes part
        if world.is_main:
            state[policy.hub_name(name)] = whole.detach().cpu().clone()
    if world.is_main:
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in policy.directory.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copy2(file, partial / file.name)
        save_torch_state_dict(state, partial, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    dist.barrier()


def _state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict:
    weights, moments = get_state_dict(policy, optimizer)
    return {"policy": weights, "optimizer": moments}


def _complete(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if (path / "hark.json").exists() and not path.suffix)


def _signature(policy: Policy) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in policy.model.state_dict().items()}


def _compare(path: Path, saved: dict[str, list[int]], own: dict[str, list[int]]) -> None:
    differing = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {len(differing)} tensors differ, the first is {name}, "
            f"{saved.get(name, 'absent')} there and {own.get(name, 'absent')} in model.path; "
            "use the model.path of that run, or another run.directory"
        )
