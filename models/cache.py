"""What is computed once and kept: the keys and values of groups, and what a frozen tower has heard."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch


class GroupCache:
    """Keys and values of a rollout, layer by layer: a prompt's stand once for its group, a branch has its own.

    prompts: (R, heads, P, head size) and branches: (B, heads, T, head size), for keys and for values. Memory is taken
    when a layer is first prefilled, and is 0 where nothing was kept: what is masked counts 0 times what stands there.
    A completion's last token is drawn and never fed, so T is one less than its length.
    """

    def __init__(self, rows: int, prompt: int, branches: int, steps: int):
        self.prompt = prompt
        self._sizes = (rows, prompt), (branches, steps)
        self._layers: dict[int, list[torch.Tensor]] = {}

    def fill(self, layer: int, rows: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the keys and values (N, heads, L, head size) of prompts in these rows."""
        if layer not in self._layers:
            self._layers[layer] = [
                new.new_zeros((count, new.shape[1], length, new.shape[-1]))
                for count, length in self._sizes
                for new in (keys, values)
            ]
        for place, new in zip(self.prompts(layer), (keys, values), strict=True):
            for n, row in enumerate(rows):
                place[row, :, : new.shape[2]] = new[n]

    def prompts(self, layer: int) -> list[torch.Tensor]:
        """The keys and the values of the prompts."""
        return self._layers[layer][:2]

    def branches(self, layer: int) -> list[torch.Tensor]:
        """The keys and the values of the branches."""
        return self._layers[layer][2:]

    def move_rows(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy the prompts of some rows over those of others."""
        for layer in self._layers:
            _move(self.prompts(layer), sources, targets)

    def move_branches(self, sources: torch.Tensor, targets: torch.Tensor, steps: int) -> None:
        """Copy some branches over others, as far as their first `steps` tokens."""
        for layer in self._layers:
            _move([tensor[:, :, :steps] for tensor in self.branches(layer)], sources, targets)


def _move(tensors: Sequence[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
    for tensor in tensors if len(sources) else ():
        tensor[targets] = tensor[sources]


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
