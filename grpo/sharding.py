"""Ranks, FSDP2, and `gathered()`: whole weights without collectives, for sampling."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from grpo.config import ConfigError
from models.policy import Policy

PATIENCE = timedelta(hours=1)  # that ranks wait for one another; rank 0 may be writing an export of many gigabytes


@dataclass(frozen=True)
class World:
    """This process among the others, and the mesh that parameters are sharded over."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def joined_world(*, threads: int = 0) -> Iterator[World]:
    """Join the processes that torchrun started, or be a world of one without torchrun."""
    if threads:
        torch.set_num_threads(threads)
    device = _device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    size = dist.get_world_size()
    try:
        yield World(dist.get_rank(), size, device, init_device_mesh(device.type, (size,)))
    except BaseException:
        # Leaving in good order would wait for the others, who may be waiting for this rank; torchrun ends them.
        if size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _device() -> torch.device:
    """This process's own GPU, or the CPU of a machine without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            "start as many processes as GPUs, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def shard(policy: Policy, mesh: DeviceMesh, *, dtype: torch.dtype = torch.float32, reshard: bool = True) -> None:
    """Wrap a policy in FSDP2: each layer a unit, the rest with the root. Parameters stay float32.

    dtype: what gathered weights and activations are; gradients are reduced in float32 and summed, not averaged,
    because token weights already carry every normalisation.
    reshard: free a layer's gathered weights after its forward and gather them again for its backward.
    """
    layers = list(policy.layers())
    half = None if dtype == torch.float32 else dtype
    for layer in layers:
        precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    # The root takes prompts, masks and the sampler's float64 uniforms: none of them may be cast.
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    for module in (policy, *layers):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    policy.reshards = reshard


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Hold every weight whole on this rank: inside, forward passes issue no collective and ranks may part ways."""
    units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not policy and policy.reshards, recurse=False)


def gather_rows(rows: list, world: World) -> list | None:
    """All ranks' rows, in rank order, on rank 0; None on the others."""
    parts: list | None = [None] * world.size if world.is_main else None
    dist.gather_object(rows, parts)
    return [row for part in parts for row in part] if parts is not None else None
