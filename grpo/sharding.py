"""Ranks, FSDP2, and `gathered()`: whole weights without collectives, for sampling."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from grpo.config import ConfigError
from models.policy import Policy

PATIENCE = timedelta(hours=1)  # that ranks wait for one another; rank 0 may be writing an export of many gigabytes


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

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
        yield World(dist.get_rank(), size, device)
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


def device_mesh(world: World, replicas: int = 1) -> DeviceMesh:
    """The ranks to shard over; with more than one replica, (replicate, shard): each row of ranks holds a whole model.

    Neighbouring ranks, of one machine, share a model, so that only gradients travel between replicas.
    Raises ConfigError where the ranks cannot be divided.
    """
    if world.size % replicas:
        raise ConfigError(f"sharding.replicas is {replicas}; it must divide the number of processes, {world.size}")
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,))
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    policy: Policy,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype = torch.float32,
    reshard: bool = True,
    offload: bool = False,
) -> None:
    """Wrap a policy in FSDP2: each layer a unit, the rest with the root.

    dtype: what gathered weights and activations are; gradients are reduced in float32 and summed, not averaged,
    because token weights already carry every normalisation.
    reshard: free a layer's gathered weights after its forward and gather them again for its backward.
    offload: keep the sharded weights, their gradients and the optimizer's state in host memory.
    A frozen tower stands whole on each rank: whether it has heard a clip before may differ between ranks, and so it
    must not take part in collectives. Nor does any frozen weight where one rank holds it all anyway.
    """
    alone = mesh.size(mesh.ndim - 1) == 1 and not offload
    whole = {p for p in policy.parameters() if not p.requires_grad} if alone else whole_weights(policy)
    units = [*(layer for layer in policy.layers() if not whole.issuperset(layer.parameters())), policy]
    half = None if dtype == torch.float32 else dtype
    for unit in units:
        fully_shard(
            unit,
            mesh=mesh,
            # The root takes prompts, masks and the sampler's float64 uniforms: none of them may be cast.
            mp_policy=MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=unit is not policy),
            offload_policy=CPUOffloadPolicy(pin_memory=policy.device.type == "cuda") if offload else OffloadPolicy(),
            reshard_after_forward=reshard and unit is not policy,
            ignored_params=whole,
        )
        if mesh.size() > 1:  # else nothing is divided, but a factor costs a copy
            unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    policy.mesh, policy.reshards, policy.offloads = mesh, reshard, offload


def whole_weights(policy: Policy) -> set[nn.Parameter]:
    """The weights that stand whole on each rank although others share the model: those of a frozen tower."""
    return set(policy.tower.parameters()) if policy.tower_cache is not None else set()


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


def release(policy: Policy) -> None:
    """Free what a forward without a backward left gathered: the root, and every layer that is not resharded."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def exchange_rows(rows: list, world: World) -> list:
    """All ranks' rows, in rank order, on every rank."""
    parts: list = [None] * world.size
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
