"""What is computed once and kept: the keys and values of a group row, and what a frozen tower has heard."""

from collections import OrderedDict
from collections.abc import Callable

import torch


class KVCache:
    """Preallocated key-value cache with the two methods that transformers' decoders call.

    A decode step writes its keys behind those of the steps before it; the prompt's stand once for the whole group.
    Memory is taken on the first write, when the shapes are known: layers x 2 x (N, heads, capacity, head size).
    """

    def __init__(self, capacity: int):
        self.capacity = capacity  # tokens per row
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._used: list[int] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        """Append (N, heads, L, head size) keys and values to a layer; give all that the layer has so far."""
        if layer == len(self._keys):
            shape = (*keys.shape[:2], self.capacity, keys.shape[-1])
            self._keys.append(keys.new_empty(shape))
            self._values.append(values.new_empty((*shape[:-1], values.shape[-1])))
            self._used.append(0)
        start, stop = self._used[layer], self._used[layer] + keys.shape[2]
        if stop > self.capacity:
            raise ValueError(f"KV cache of {self.capacity} tokens per row is full; {stop} were needed")
        self._keys[layer][:, :, start:stop] = keys
        self._values[layer][:, :, start:stop] = values
        self._used[layer] = stop
        return self._keys[layer][:, :, :stop], self._values[layer][:, :, :stop]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens per row that a layer holds."""
        return self._used[layer] if layer < len(self._used) else 0


class TowerCache:
    """What a frozen audio tower made of the clips it heard last, up to `capacity` bytes; the oldest go first.

    Each clip is heard alone, so that what it gives does not depend on what else was heard, or whether it was kept.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._heard: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, sound: str, hear: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tower's output for a clip, from memory or by `hear`."""
        output = self._heard.pop(sound, None)
        if output is None:
            output = hear().detach()
            self._bytes += output.nbytes
        self._heard[sound] = output
        while self._bytes > self.capacity:
            self._bytes -= self._heard.popitem(last=False)[1].nbytes
        return output
