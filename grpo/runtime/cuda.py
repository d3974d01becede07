"""What keeps a GPU busy during decoding: copies without waiting, few tensor sizes, and CUDA graphs.

On the CPU, copies are plain reads and writes, sizes are not rounded, and CUDA graphs are not used.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

WARM_UP_CALLS = 3  # plain calls with the same sizes before a call with them is recorded

Inputs = TypeVar("Inputs", bound="tuple[torch.Tensor, ...]")  # a named tuple of tensors


def send(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Integers as a tensor on the device; to a GPU through pinned memory, so that the host does not wait."""
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def round_up(count: int, most: int, device: torch.device, least: int = 1) -> int:
    """A size for `count` items: on a GPU the next power of two, from `least` to `most`; on the CPU `count` itself.

    With few different sizes, few CUDA graphs have to be recorded.
    """
    return count if device.type != "cuda" else min(most, max(least, 1 << (count - 1).bit_length()))


def recorder(device: torch.device) -> CudaGraphs | None:
    """Records a function as CUDA graphs on a GPU; None on the CPU, which has none."""
    return CudaGraphs() if device.type == "cuda" else None


class DelayedFlags:
    """Reads a tensor of booleans to the host; on a GPU each call returns the values at the previous call.

    The host thus never waits for the GPU's current work. The first call on a GPU returns True everywhere.
    """

    def __init__(self, flags: torch.Tensor):
        self._flags = flags
        self._copies: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def __call__(self) -> list[bool]:
        if self._flags.device.type != "cuda":
            return self._flags.tolist()
        copy = torch.empty(self._flags.shape, dtype=torch.bool, pin_memory=True)
        copy.copy_(self._flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._copies.append((copy, event))
        if len(self._copies) == 1:
            return [True] * len(copy)
        copy, event = self._copies.popleft()
        event.synchronize()
        return copy.tolist()


class CudaGraphs:
    """Calls a function of tensors, and records it as a CUDA graph, one for each key.

    Calls with the same key must do the same with their tensors. The function must not wait for the GPU, and must find
    the other tensors that it reads at the same addresses in every call. The first calls with a key are plain calls:
    libraries initialise in them, and a recording costs more than a call. The next call is recorded and replayed, later
    ones are replayed. All graphs share one memory pool, so tensors allocated in a graph must not be read after its
    replay. The function is passed to each call and not stored: it may refer to the owner of this object, and the
    reference cycle would keep the owner's memory allocated until Python's garbage collection.
    """

    def __init__(self) -> None:
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def forget(self) -> None:
        """Record anew what is called next, because tensors that the function reads have moved."""
        self._graphs.clear()

    def __call__(self, function: Callable[[Inputs], None], inputs: Inputs, key: Hashable) -> None:
        """Raises RuntimeError if the function cannot be recorded."""
        self._calls[key] += 1
        if self._calls[key] <= WARM_UP_CALLS:
            function(inputs)
            return
        if key not in self._graphs:
            self._graphs[key] = self._record(function, inputs), inputs
        graph, recorded = self._graphs[key]
        for kept, new in zip(recorded, inputs, strict=True):
            kept.copy_(new)
        graph.replay()

    def _record(self, function: Callable[[Inputs], None], inputs: Inputs) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # By default a CUDA call in any other thread, such as NCCL's watchdog, would abort the recording.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function(inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"a decode step cannot be recorded as a CUDA graph ({error}); set rollout.cuda_graphs=false"
            ) from error
        return graph
