"""Figures of a policy's trained weights by module, the same for any number of ranks: gradient norms and digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hark.grpo.runtime.collectives import World, reduce_tensor
from hark.models.policy import Policy

CHUNK = 2**22  # elements whose 64-bit products exist at the same time
INTEGERS = {2: torch.int16, 4: torch.int32}  # by the bytes of an element


def module_of(name: str) -> str:
    """The module that a parameter is counted with: its layer, or else the module that holds it."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
    return ".".join(parts[: number + 1])


def gradient_norms(policy: Policy, world: World) -> dict[str, float]:
    """The L2 norm of the gradient of each module; a collective."""
    squares: dict[str, torch.Tensor] = {}
    for name, parameter in _trained(policy):
        module = module_of(name)
        local = _local(parameter.grad) if parameter.grad is not None else torch.zeros(1)
        square = local.double().square().sum().to(world.device) * _counts(policy)
        squares[module] = squares.get(module, torch.zeros_like(square)) + square
    total = reduce_tensor(torch.stack(list(squares.values())), world)
    return dict(zip(squares, total.sqrt().tolist(), strict=True))


def weight_digests(policy: Policy, world: World) -> dict[str, str]:
    """A 64-bit checksum of the bits of each module's trained weights, in hexadecimal; a collective.

    sum_i bits_i * (2 * i + 1) modulo 2^64 over the elements of a parameter, times an odd number that its name gives. A
    sum can be split over the ranks, so it does not depend on how many there are. It notices changes; it does not resist
    an attacker.
    """
    sums: dict[str, torch.Tensor] = {}
    for name, parameter in _trained(policy):
        module, checksum = module_of(name), _checksum(parameter).to(world.device) * _factor(name) * _counts(policy)
        sums[module] = sums.get(module, torch.zeros_like(checksum)) + checksum
    total = reduce_tensor(torch.stack(list(sums.values())), world)
    return {module: f"{value % 2**64:016x}" for module, value in zip(sums, total.tolist(), strict=True)}


def _trained(policy: Policy) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _counts(policy: Policy) -> int:
    """1 on the ranks of the first replica and 0 on the others, which hold the same weights."""
    mesh = policy.mesh
    return int(mesh is None or mesh.ndim == 1 or mesh.get_local_rank(0) == 0)


def _factor(name: str) -> int:
    """An odd 64-bit integer for a name, as int64: parameters of one module are not interchangeable."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True) | 1


def _checksum(parameter: nn.Parameter) -> torch.Tensor:
    local = _local(parameter.detach()).contiguous()
    bits = local.view(INTEGERS[local.element_size()]).flatten()
    start = _rows_before(parameter) * (parameter.numel() // max(len(parameter), 1))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, len(bits), CHUNK):
        part = bits[first : first + CHUNK]
        odd = torch.arange(2 * (start + first) + 1, 2 * (start + first + len(part)), 2, device=bits.device)
        total += (part * odd).sum()
    return total


def _rows_before(parameter: nn.Parameter) -> int:
    """How many rows of a parameter are on the ranks before this one: FSDP gives each ceil(rows / ranks) of them."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, shard = parameter.device_mesh, parameter.device_mesh.ndim - 1
    rows, ranks = len(parameter), mesh.size(shard)
    return min(mesh.get_local_rank(shard) * -(-rows // ranks), rows)
