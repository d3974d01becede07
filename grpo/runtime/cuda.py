"""How the host and a GPU go on without waiting for each other while completions grow; the CPU needs none of it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable

import torch

WARM_UP_CALLS = 3  # calls for some sizes before one is recorded


def send(values: list[int], device: torch.device) -> torch.Tensor:
    """Whole numbers as a tensor on the device; a GPU gets them from pinned memory, when it comes to that."""
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def round_up(count: int, most: int, device: torch.device, least: int = 1) -> int:
    """A size for `count` things: exact on the CPU; on a GPU a power of two up to `most`, so that few sizes occur."""
    return count if device.type != "cuda" else min(most, max(least, 1 << (count - 1).bit_length()))


class DelayedFlags:
    """What stands in a tensor of booleans; on a GPU what stood there a look ago, so that none waits for the present."""

    def __init__(self, flags: torch.Tensor):
        self._flags = flags
        self._looks: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def __call__(self) -> list[bool]:
        if self._flags.device.type != "cuda":
            return self._flags.tolist()
        copy = torch.empty(self._flags.shape, dtype=torch.bool, pin_memory=True)
        copy.copy_(self._flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._looks.append((copy, event))
        if len(self._looks) == 1:
            return [True] * len(copy)
        copy, event = self._looks.popleft()
        event.synchronize()
        return copy.tolist()


class CudaGraphs:
    """A function of a tensor and of sizes, recorded as a CUDA graph for each sizes, so that a GPU repeats it by itself.

    The function must change nothing when it is called a second time with the same numbers, wait for nothing, and find
    whatever else it reads where it was. The first calls for some sizes are made as they are, which makes libraries
    ready, and because a recording costs more than a call; then one is recorded, and from then on it is replayed. Memory
    for all recordings is shared: nothing that is made in one is read after it. The function is not kept, as it may well
    hold this.
    """

    def __init__(self) -> None:
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[..., None], tensor: torch.Tensor, sizes: Hashable) -> None:
        self._calls[sizes] += 1
        if self._calls[sizes] <= WARM_UP_CALLS:
            function(tensor, sizes)
            return
        if sizes not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile, such as NCCL's watchdog, which asks for events, must not end it.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function(tensor, sizes)
            self._graphs[sizes] = graph, tensor
        graph, place = self._graphs[sizes]
        place.copy_(tensor)
        graph.replay()
