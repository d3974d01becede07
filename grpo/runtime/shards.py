"""The trained tensors of a policy as pieces: those of this rank copied to host memory, written, and read back.

A rank writes the pieces that it holds. Any number of ranks reads them; each reads the parts that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hark.files import sync
from hark.grpo.runtime.manifest import DamageError, File, Manifest, Piece, Shape, Tensor
from hark.models.policy import Policy
from hark.shown import LONGEST_NAME, shown

WEIGHTS, MOMENTS, FURTHER = "weights", "optimizer", "further"

Parts = dict[str, dict[str, torch.Tensor]]  # part of a checkpoint -> name -> tensor, whole or sharded


@dataclass(frozen=True)
class Shard:
    """This rank's box of a tensor, in host memory; `whole` is the shape of the tensor."""

    data: torch.Tensor
    offset: Shape
    whole: Shape


def parts_of(policy: Policy, optimizer: torch.optim.Optimizer | None, further: Mapping[str, Policy] = {}) -> Parts:
    """The tensors of a checkpoint: trained weights, the optimizer's state, and the trained weights of other policies.

    Frozen weights are not saved; they are those of model.path.
    """
    names: dict[torch.Tensor, str] = {
        parameter: name for name, parameter in policy.named_parameters() if parameter.requires_grad
    }
    parts: Parts = {WEIGHTS: {name: parameter.detach() for parameter, name in names.items()}}
    if optimizer is not None:
        parts[MOMENTS] = {
            f"{names[parameter]}/{key}": value
            for parameter, state in optimizer.state.items() if parameter in names for key, value in state.items()
        }  # fmt: skip
    for name, other in further.items():
        parts[f"{FURTHER}.{name}"] = {
            weight: parameter.detach() for weight, parameter in other.named_parameters() if parameter.requires_grad
        }
    return parts


def held(parts: Parts, *, is_main: bool) -> dict[str, dict[str, Shard]]:
    """Copies in host memory of what this rank writes. What several ranks hold is written by the first of them."""
    return {
        part: {name: shard for name, tensor in tensors.items() if (shard := _shard(tensor, is_main)) is not None}
        for part, tensors in parts.items()
    }


def _shard(tensor: torch.Tensor, is_main: bool) -> Shard | None:
    if not isinstance(tensor, DTensor):
        whole = tuple(tensor.shape)
        return Shard(_copied(tensor), (0,) * len(whole), whole) if is_main else None
    mesh = tensor.device_mesh
    first = all(
        mesh.get_local_rank(dimension) == 0 or not isinstance(placement, Replicate)
        for dimension, placement in enumerate(tensor.placements)
    )
    local, offset, _ = _box(tensor)
    return Shard(_copied(local), offset, tuple(tensor.shape)) if first and local.numel() else None


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _box(tensor: torch.Tensor) -> tuple[torch.Tensor, Shape, Shape]:
    """This rank's part of a tensor: the memory that holds it, its first index, and its shape."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim(), tuple(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset), tuple(shape)


def write_shards(shards: Mapping[str, Shard], path: Path) -> File:
    """Write shards to a safetensors file, and the file to the disk; returns its size and digest."""
    save_file({name: shard.data for name, shard in shards.items()}, path)
    sync(path)
    return File.of(path)


def piece_of(shard: Shard, file: str) -> Piece:
    return Piece(file, shard.offset, tuple(shard.data.shape))


def read_parts(checkpoint: Path, manifest: Manifest, parts: Parts) -> None:
    """Read this rank's part of each tensor into its memory. Raises DamageError if that is not in the files."""
    for part, tensors in parts.items():
        saved = manifest.tensors.get(part, {})
        if saved.keys() != tensors.keys():
            differing = shown(min(saved.keys() ^ tensors.keys()), LONGEST_NAME)
            raise DamageError(f"the part {part} has other tensors than the policy; the first is {differing}")
        with ExitStack() as stack:
            opened = cache(partial(_opened, checkpoint, stack))
            for name, tensor in tensors.items():
                _read_tensor(name, tensor, saved[name], opened)


def _opened(checkpoint: Path, stack: ExitStack, name: str) -> Any:
    """A file of a checkpoint, open until the stack is closed."""
    return stack.enter_context(safe_open(checkpoint / name, framework="pt"))


@torch.no_grad()
def _read_tensor(name: str, tensor: torch.Tensor, saved: Tensor, opened: Callable[[str], Any]) -> None:
    """Read this rank's part of a tensor into its memory."""
    if saved.shape != tuple(tensor.shape):
        raise DamageError(f"{name} has the shape {saved.shape}")
    local, offset, shape = _box(tensor)
    count = 0
    for piece, inside, within in _overlaps(saved.pieces, offset, shape):
        try:
            read = opened(piece.file).get_slice(name)
            if tuple(read.get_shape()) != piece.shape:
                raise DamageError(f"{piece.file}: {name} has another shape than the manifest says")
            values = read[inside or ...]
        except (OSError, SafetensorError) as error:
            raise DamageError(f"{piece.file} cannot be read ({str(error)[:200]})") from error
        local[within].copy_(values)
        count += values.numel()
    if count != math.prod(shape):
        raise DamageError(f"{name} is not whole")


def _overlaps(
    pieces: tuple[Piece, ...], offset: Shape, shape: Shape
) -> Iterator[tuple[Piece, tuple[slice, ...], tuple[slice, ...]]]:
    """Each piece that overlaps a box: the piece, the overlap inside the piece, and the overlap inside the box."""
    for piece in pieces:
        begin = [max(a, b) for a, b in zip(piece.offset, offset, strict=True)]
        end = [min(a + m, b + n) for a, m, b, n in zip(piece.offset, piece.shape, offset, shape, strict=True)]
        if all(first < last for first, last in zip(begin, end, strict=True)):
            yield (
                piece,
                tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, piece.offset, strict=True)),
                tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offset, strict=True)),
            )


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer allocate its moments, by a step with gradients of 0 at a learning rate of 0.

    The weights do not change. `optimizer.state.clear()` frees the moments.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
