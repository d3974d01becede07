"""FSDP2: how a policy is sharded, and `gathered()`, which gathers all weights once for sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup, Work
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

# Private in torch; present in 2.11 to 2.13.
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import TIMEOUT, CollectiveMeter, World
from hark.models.policy import Policy


def device_mesh(world: World, replicas: int = 1) -> DeviceMesh:
    """The ranks to shard over; with several replicas a (replicate, shard) mesh, each row of which holds one replica.

    Neighbouring ranks, on one machine if possible, form a replica. Between replicas only gradients are sent.
    Raises ConfigError if the number of ranks is not a multiple of `replicas`.
    """
    if world.size % replicas:
        raise ConfigError(f"sharding.replicas is {replicas}; it must divide the number of processes, {world.size}")
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,))
    ranks = torch.arange(world.size).view(replicas, -1)
    # Not init_device_mesh, whose groups of ranks would have the library's timeout instead of the run's.
    groups = [dist.new_subgroups_by_enumeration(part.tolist(), timeout=TIMEOUT)[0] for part in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, world.device.type, ranks, mesh_dim_names=("replicate", "shard"))


def shard(
    policy: Policy,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype = torch.float32,
    reshard: bool = True,
    offload: bool = False,
    meter: CollectiveMeter | None = None,
) -> None:
    """Wrap a policy in FSDP2: each layer is a unit, all other weights belong to the root unit.

    dtype: of gathered weights and activations. Gradients are reduced in float32 and summed, not averaged, because the
    token weights contain every normalisation.
    reshard: free a layer's gathered weights after its forward and gather them again for its backward.
    offload: keep the sharded weights, their gradients and the optimizer's state in host memory.
    meter: measures the collectives of the policy.
    A frozen tower is not sharded: each rank holds all of it. Its outputs are cached, and the ranks may have cached
    different clips, so its forward must not issue collectives. With one shard and no offloading, FSDP ignores all
    frozen weights. One process alone that computes in float32, in which trained weights are stored then, uses them as
    they are: FSDP would copy all weights and gradients several times a step.
    """
    policy.mesh, policy.reshards, policy.offloads = mesh, reshard, offload
    if mesh.size() == 1 and dtype == torch.float32 and not offload:
        return
    one_shard = mesh.size(mesh.ndim - 1) == 1 and not offload
    ignored = {p for p in policy.parameters() if not p.requires_grad} if one_shard else whole_weights(policy)
    units = [*(layer for layer in policy.layers() if not ignored.issuperset(layer.parameters())), policy]
    cast = None if dtype == torch.float32 else dtype
    for unit in units:
        sharded = fully_shard(
            unit,
            mesh=mesh,
            # The root's inputs are prompts, masks and the sampler's settings, none of which may be cast.
            mp_policy=MixedPrecisionPolicy(cast, reduce_dtype=torch.float32, cast_forward_inputs=unit is not policy),
            offload_policy=CPUOffloadPolicy(pin_memory=policy.device.type == "cuda") if offload else OffloadPolicy(),
            reshard_after_forward=reshard and unit is not policy,
            ignored_params=ignored,
        )
        if mesh.size() > 1:  # one rank divides by 1 anyway, and a factor would cost a copy
            sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        if meter is not None:
            _measure_collectives(sharded, meter, replicas=mesh.size(0) if mesh.ndim == 2 else 1)


def whole_weights(policy: Policy) -> set[nn.Parameter]:
    """The weights that each rank holds in full although others are sharded: those of a frozen tower."""
    tower = None if policy.tower_cache is None else policy.tower
    return set() if tower is None else set(tower.parameters())


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Gather all weights. Forward passes inside issue no collectives, so ranks may do different numbers of them."""
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


def reduce_between_replicas(policy: Policy, *, now: bool) -> None:
    """Whether the next backwards reduce gradients between replicas, or sum them up in each until one does.

    Within a replica each backward reduces them, because no rank has room for whole gradients.
    """
    if policy.mesh is not None and policy.mesh.ndim == 2:
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(now, recurse=False)


def gather_root(policy: Policy) -> None:
    """Gather the weights outside of the layers for a backward that follows no forward; the backward frees them."""
    if isinstance(policy, FSDPModule):
        policy.unshard()


def release(policy: Policy) -> None:
    """Free gathered weights after a forward without a backward: those of the root, and of layers with reshard=False."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def mix_weights(policy: Policy, other: Policy, *, share: float) -> None:
    """Move the trained weights of `other` towards those of the policy: other + share * (policy - other).

    Both are sharded alike, so each rank moves its shards and nothing is sent. share: 0 to 1; 1 copies exactly.
    """
    own = dict(policy.named_parameters())
    for name, weight in other.named_parameters():
        if weight.requires_grad:
            local, target = _local(weight), _local(own[name])
            local.lerp_(target.to(local), share)
    release(other)  # weights gathered earlier are those before


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _measure_collectives(unit: FSDPModule, meter: CollectiveMeter, replicas: int) -> None:
    """Make FSDP use collectives that a meter measures."""
    reduction = _ReduceScatter(meter, replicas)
    unit.set_custom_all_gather(_AllGather(meter))
    unit.set_custom_reduce_scatter(reduction)
    if replicas > 1:
        unit.set_all_reduce_hook(reduction.count_all_reduce)


class _AllGather(DefaultAllGather):
    def __init__(self, meter: CollectiveMeter):
        self._meter = meter

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: ProcessGroup, async_op: bool = False
    ) -> Work | None:
        with self._meter.measure(output_tensor.nbytes * (group.size() - 1) / group.size()):
            return super().__call__(output_tensor, input_tensor, group, async_op)


class _ReduceScatter(DefaultReduceScatter):
    """A reduce-scatter. With replicas FSDP does an all-reduce after it, and calls a hook when that has finished."""

    def __init__(self, meter: CollectiveMeter, replicas: int):
        self._meter, self._replicas = meter, replicas

    def allocate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._began = self._meter.now()  # FSDP allocates the output just before it calls the reduce-scatter
        return super().allocate(*args, **kwargs)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Work:
        with self._meter.measure(input_tensor.nbytes * (group.size() - 1) / group.size()):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)

    def count_all_reduce(self, result: torch.Tensor) -> None:
        self._meter.add(self._began, 2 * result.nbytes * (self._replicas - 1) / self._replicas)
