"""The processes of a run, their collectives, and a meter of the bytes and the time of these."""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from hark.grpo.config import ConfigError
from hark.grpo.runtime.device import set_up
from hark.grpo.runtime.interrupt import Interrupted, Interruption
from hark.grpo.runtime.leaving import leave_with_launcher
from hark.grpo.runtime.out_of_memory import reason

# Of one collective. The watchdog ends a run long before; ranks wait while rank 0 writes an export of many gigabytes.
TIMEOUT = timedelta(hours=1)
GIB = 2**30

Timestamp: TypeAlias = "float | torch.cuda.Event"  # the host's clock, or an event in a stream of the GPU


class CollectiveMeter:
    """Measures the time of this rank's collectives since `start`, and counts the bytes that those of FSDP receive.

    The time is that during which at least one collective was running, including the wait for slower ranks. On the CPU
    it is the time of the calls. On a GPU it is measured by events in the stream, and mostly overlaps computation.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.waits = False  # whether a collective is running
        self.start()

    def start(self) -> None:
        """Reset the counts."""
        self.bytes = 0.0
        self._spans: list[tuple[Timestamp, Timestamp]] = []
        self._started = self.now()

    @contextmanager
    def measure(self, received: float = 0.0) -> Iterator[None]:
        """Add the time of the block and the bytes that it received."""
        began = self.now()
        self.waits = True
        yield
        self.waits = False  # not after an error: then this rank is not the cause
        self.add(began, received)

    def add(self, began: Timestamp, received: float) -> None:
        """Add the time from `began` until now and the bytes received in it."""
        self._spans.append((began, self.now()))
        self.bytes += received

    def now(self) -> Timestamp:
        """The time; on a GPU an event in the current stream, for which the host does not wait."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def measured(self) -> dict[str, float]:
        """Seconds and GiB since `start`; waits until the device has finished."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spans = sorted((self._seconds(began), self._seconds(ended)) for began, ended in self._spans)
        seconds, latest = 0.0, -math.inf
        for began, ended in spans:  # spans may overlap
            seconds += max(ended - max(began, latest), 0.0)
            latest = max(latest, ended)
        return {"seconds/communication": seconds, "communication/gib": self.bytes / GIB}

    def _seconds(self, moment: Timestamp) -> float:
        """Seconds from `start` to a moment."""
        if isinstance(moment, float) and isinstance(self._started, float):
            return moment - self._started
        assert isinstance(moment, torch.cuda.Event) and isinstance(self._started, torch.cuda.Event)
        return self._started.elapsed_time(moment) / 1000


class Progress:
    """Where the main thread of this rank is; the watchdog of another rank reads it.

    doing: the phase, in words. A phase that is `long`, such as reading the weights of a large model, makes no marks;
    in it, each second of processor time of this process is progress.
    """

    def __init__(self, meter: CollectiveMeter):
        self._meter = meter
        self._count = 0
        self.doing, self._long = "start", True  # data are checked and weights read

    def mark(self, doing: str | None = None, *, long: bool = False) -> None:
        """Note that there is progress, and what begins, if that is something else."""
        self._count += 1
        if doing is not None:
            self.doing, self._long = doing, long

    @contextmanager
    def during(self, doing: str, *, long: bool = False) -> Iterator[None]:
        """Note what the block does."""
        doing_before, long_before = self.doing, self._long
        self.mark(doing, long=long)
        yield
        self.mark(doing_before, long=long_before)

    def now(self) -> tuple[tuple[int, int], bool, str]:
        """Counts that change with progress, whether a collective waits for other ranks, and the phase.

        The processor time of the thread that calls it, which is the watchdog, is not counted.
        """
        seconds = int(time.process_time() - time.thread_time()) if self._long else 0
        return (self._count, seconds), self._meter.waits, self.doing


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes, and of this one the device, the meter, where it is, and the
    signal that it has received.
    """

    rank: int
    size: int
    device: torch.device
    meter: CollectiveMeter = field(init=False, repr=False, compare=False)
    progress: Progress = field(init=False, repr=False, compare=False)
    interruption: Interruption = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "meter", CollectiveMeter(self.device))
        object.__setattr__(self, "progress", Progress(self.meter))
        object.__setattr__(self, "interruption", Interruption())

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def joined_world(*, threads: int = 0, patience: float = 600.0) -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun, form a world of one process.

    patience: seconds to wait for the others; 0 is long. Raises ConfigError if they have not come.

    From here on the process ends when torchrun does: ranks would wait for one another for an hour.
    """
    leave_with_launcher()
    device = set_up(threads)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        _join(backend, timedelta(seconds=patience) if patience else TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    size = dist.get_world_size()
    try:
        yield World(dist.get_rank(), size, device)
    except BaseException:
        # Destroying the group would wait for other ranks, which may be waiting for this one. torchrun ends them all.
        if size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _join(backend: str, patience: timedelta) -> None:
    """Join the other ranks once all of them are there: the library waits without this bound for one that hangs."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    here, missing = [f"rank {one}" for one in range(size)], "another rank"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
        # torchrun's store outlives processes that it starts again, which would find the addresses of the dead in it.
        own = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        own.set(here[rank], "")
        for name in here:
            missing = name
            own.wait([name], patience)
        missing = "another rank"
        own.set_timeout(patience)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=TIMEOUT)
    except dist.DistStoreError as error:
        raise ConfigError(
            f"rank {rank}: {missing} of {size} has not joined within {patience.total_seconds():g} s "
            "(run.patience); its process hangs, or its machine cannot be reached"
        ) from error
    except dist.DistError as error:  # the store, which is in the launcher, or at rank 0
        raise ConfigError(
            f"rank {rank}: cannot join the {size} ranks ({reason(error)}); their launcher has ended, or its "
            "machine cannot be reached"
        ) from error


def reduce_sums(values: dict[str, Any], world: World) -> dict[str, float]:
    """Sum every value over the ranks in one all-reduce, in float64.

    For a mean over all ranks, sum numerator and denominator in one call. Raises ValueError if their names differ.
    """
    names = sorted(values)
    if world.size == 1:
        return {name: float(values[name]) for name in names}
    checksum = float(zlib.crc32("\n".join(names).encode()))  # 32 bits: exact in float64, also summed over ranks
    numbers = [checksum, *(float(values[name]) for name in names)]
    sums = torch.tensor(numbers, dtype=torch.float64, device=world.device)
    with world.meter.measure():
        dist.all_reduce(sums)
    total, *reduced = sums.tolist()
    if total != checksum * world.size:
        raise ValueError(f"reduce_sums: the ranks passed different names; this one passed {', '.join(names)}")
    return dict(zip(names, reduced, strict=True))


def reduce_tensor(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The sum of a tensor over the ranks, in its own dtype; integers wrap around."""
    if world.size > 1:
        with world.meter.measure():
            dist.all_reduce(tensor)
    return tensor


def check_interrupted(world: World) -> None:
    """Raise Interrupted on all ranks if one of them has received a signal."""
    if number := reduce_max(world.interruption.signal, world):
        raise Interrupted("interrupted", number)


def reduce_max(value: int, world: World) -> int:
    """The largest of the ranks' values. It is exchanged by the hosts, so that none waits for its GPU."""
    if world.size == 1:
        return value
    largest = torch.tensor(value)
    with world.meter.measure():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def wait_for_all(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        with world.meter.measure():
            dist.barrier()


def gather_rows(rows: list, world: World) -> list | None:
    """All ranks' rows, in rank order, on rank 0; None on the others."""
    if world.size == 1:
        return rows
    parts: list | None = [None] * world.size if world.is_main else None
    with world.meter.measure():
        dist.gather_object(rows, parts)
    return [row for part in parts for row in part] if parts is not None else None


def exchange_rows(rows: list, world: World) -> list:
    """All ranks' rows, in rank order, on every rank."""
    if world.size == 1:
        return rows
    parts: list = [None] * world.size
    with world.meter.measure():
        dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
