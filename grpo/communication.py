"""What ranks send one another in a step: a meter of the collectives, and the formula they follow.

    bytes     = (n - 1) / n * (d * gathered + 4 * reduced) + 2 (R - 1) / R * 4 * reduced / n
    gathered  = root * (1 + copy + E M) + layers * (1 + reference + E M * (2 if resharding else 1))
    reduced   = trained * E M
    reference = M if resharding else copy; 0 without a reference

are the bytes that each rank receives; with rings it sends as many. n ranks share one copy of the weights, and each
receives (n - 1) / n of a tensor that they gather, or reduce and scatter; of one that R replicas reduce, 2 (R - 1) / R.

root, layers: elements of sharded weights in FSDP's root and in its layers (the reference's where it has its own);
trained: those with a gradient. A weight counts with the rows that pad it to a multiple of n. d: bytes of the dtype that
computes; gradients travel in float32. E M: inner epochs times micro-batches, of which there are fewer where groups are
skipped. The rollout gathers everything once. copy:
1 where the reference has weights of its own, whose root is gathered once; else 0, because what the policy gathered to
be its own reference, and has not freed, its first micro-batch finds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.distributed import ProcessGroup, Work
from torch.distributed.fsdp import FSDPModule

# Not exported, but here in torch 2.11 to 2.13, and they know by which names these call the collectives.
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from grpo.sharding import whole_weights
from models.lora import WithoutAdapters
from models.policy import Policy

FLOAT = 4  # bytes of float32
GIB = 2**30
CUDA = "cuda"

Moment: TypeAlias = "float | torch.cuda.Event"  # by the host's clock, or in a stream of the GPU


class Meter:
    """Counts this rank's bytes and time in FSDP's collectives, for the policies it watches, and in `collective`.

    The time is that in which at least one was under way: on the CPU from its call to its end, on a GPU from when its
    stream came to it, and there most of it passes beside computation. Waiting for slower ranks is part of it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self.bytes = 0.0
        self._spans: list[tuple[Moment, Moment]] = []
        self._started = self.now()

    def watch(self, policy: Policy) -> None:
        """Count what a sharded policy sends from now on."""
        for unit in policy.modules():
            if isinstance(unit, FSDPModule):
                reduction = _Reduction(self, replicas=policy.mesh.size(0) if policy.mesh.ndim == 2 else 1)
                unit.set_custom_all_gather(_AllGather(self))
                unit.set_custom_reduce_scatter(reduction)
                if reduction.replicas > 1:
                    unit.set_all_reduce_hook(reduction.replicas_reduced)

    @contextmanager
    def collective(self, received: float = 0.0) -> Iterator[None]:
        """Count the time inside, and so many bytes."""
        began = self.now()
        yield
        self.add(began, received)

    def add(self, began: Moment, received: float) -> None:
        """Count the time from a moment until now, and so many bytes."""
        self._spans.append((began, self.now()))
        self.bytes += received

    def now(self) -> Moment:
        """On a GPU this is when the current stream comes here: the host does not wait for it."""
        if self._device.type != CUDA:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def measured(self) -> dict[str, float]:
        """Seconds and GiB since `start`; waits until the device has finished."""
        if self._device.type == CUDA:
            torch.cuda.synchronize(self._device)
        seconds, latest = 0.0, -math.inf
        for first, last in sorted((self._seconds(began), self._seconds(ended)) for began, ended in self._spans):
            seconds += max(last - max(first, latest), 0.0)
            latest = max(latest, last)
        return {"seconds/communication": seconds, "communication/gib": self.bytes / GIB}

    def _seconds(self, moment: Moment) -> float:
        """Since the start."""
        return moment - self._started if isinstance(moment, float) else self._started.elapsed_time(moment) / 1000


class _AllGather(DefaultAllGather):
    def __init__(self, meter: Meter):
        self._meter = meter

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: ProcessGroup, async_op: bool = False
    ) -> Work | None:
        with self._meter.collective(output_tensor.nbytes * (group.size() - 1) / group.size()):
            return super().__call__(output_tensor, input_tensor, group, async_op)


class _Reduction(DefaultReduceScatter):
    """A reduce-scatter, and with replicas the all-reduce behind it, of which FSDP tells when it is over."""

    def __init__(self, meter: Meter, replicas: int):
        self._meter, self.replicas = meter, replicas

    def allocate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._began = self._meter.now()  # the last that FSDP asks for before it reduces is room for the result
        return super().allocate(*args, **kwargs)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Work | None:
        with self._meter.collective(input_tensor.nbytes * (group.size() - 1) / group.size()):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)

    def replicas_reduced(self, result: torch.Tensor) -> None:
        self._meter.add(self._began, 2 * result.nbytes * (self.replicas - 1) / self.replicas)


@dataclass(frozen=True)
class Sharded:
    """Elements of a policy's sharded weights, each with the rows that pad it to a multiple of the ranks."""

    root: int
    layers: int
    trained: int


def sharded_elements(policy: Policy, shards: int) -> Sharded:
    """What is sharded of a policy, before or after it is."""
    whole = whole_weights(policy)
    padded = {p: _padded(p.shape, shards) for p in policy.parameters() if p not in whole}
    in_layers = {p for layer in policy.layers() for p in layer.parameters()}
    return Sharded(
        root=sum(size for p, size in padded.items() if p not in in_layers),
        layers=sum(size for p, size in padded.items() if p in in_layers),
        trained=sum(size for p, size in padded.items() if p.requires_grad),
    )


def step_bytes(
    policy: Policy,
    reference: Policy | WithoutAdapters | None,
    *,
    shards: int,
    replicas: int = 1,
    dtype: torch.dtype = torch.float32,
    reshard: bool = True,
    micro_batches: int,
    inner_epochs: int = 1,
) -> float:
    """Bytes that a rank receives in a step of GRPO, by the formula above."""
    own, updates = sharded_elements(policy, shards), inner_epochs * micro_batches
    gathered = own.root * (1 + updates) + own.layers * (1 + updates * (2 if reshard else 1))
    if reference is not None:
        copy = isinstance(reference, Policy)
        theirs = sharded_elements(reference, shards) if copy else own
        gathered += copy * theirs.root + (micro_batches if reshard else copy) * theirs.layers
    reduced = FLOAT * own.trained * updates
    within = (dtype.itemsize * gathered + reduced) * (shards - 1) / shards
    return within + 2 * reduced / shards * (replicas - 1) / replicas


def _padded(shape: torch.Size, shards: int) -> int:
    return -(-shape[0] // shards) * shards * shape[1:].numel()
