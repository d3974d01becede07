"""Two caches: the keys and values of a rollout, and the outputs of a frozen audio tower."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

STEPS = 64  # tokens of a branch for which a rollout's cache has room at first


class GroupCache:
    """The KV cache of a rollout: a prompt's keys and values are stored once for all branches of its group.

    Each layer has keys and values of prompts, (R, heads, P, head size), and of branches, (B, heads, T, head size).
    They are allocated when the layer is first prefilled, and start at 0: a masked entry has attention weight 0, and 0
    times an uninitialised NaN would be NaN. T begins at STEPS and grows with the completions, to at most one less than
    `max_new_tokens`, because a completion's last token is never fed to the decoder.
    """

    def __init__(self, rows: int, prompt: int, branches: int, steps: int):
        self.prompt = prompt
        self._rows, self._branches, self._limit, self.steps = rows, branches, steps, min(steps, STEPS)
        self._layers: dict[int, list[torch.Tensor]] = {}

    @property
    def has_grown(self) -> bool:
        """Whether branches have more room than at first."""
        return self.steps > STEPS

    def renew(self, rows: int, prompt: int, branches: int, steps: int) -> bool:
        """Begin another rollout, for which sizes may grow and never shrink; returns whether tensors will have moved."""
        before = self._rows, self.prompt, self._branches, self.steps
        self._rows, self.prompt, self._branches = map(max, before, (rows, prompt, branches))
        self._limit, self.steps = steps, max(self.steps, min(steps, STEPS))
        moved = before != (self._rows, self.prompt, self._branches, self.steps)
        if moved:
            self._layers.clear()
        for tensor in (tensor for tensors in self._layers.values() for tensor in tensors):
            tensor.zero_()
        return moved

    def fill(self, layer: int, rows: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the keys and values (N, heads, L, head size) of N prompts in the given N rows."""
        if layer not in self._layers:
            sizes = (self._rows, self.prompt), (self._branches, self.steps)
            self._layers[layer] = [
                new.new_zeros((count, new.shape[1], length, new.shape[-1]))
                for count, length in sizes
                for new in (keys, values)
            ]
        for cached, new in zip(self.prompts(layer), (keys, values), strict=True):
            for n, row in enumerate(rows):
                cached[row, :, : new.shape[2]] = new[n]

    def grow(self, steps: int) -> bool:
        """Make room for branches of so many tokens; returns whether tensors have moved. The room doubles."""
        if steps <= self.steps:
            return False
        self.steps = min(self._limit, max(steps, 2 * self.steps))
        for tensors in self._layers.values():
            for place in (2, 3):  # one tensor after the other, so that little exists twice
                old = tensors[place]
                tensors[place] = old.new_zeros((*old.shape[:2], self.steps, old.shape[-1]))
                tensors[place][:, :, : old.shape[2]] = old
        return True

    def prompts(self, layer: int) -> list[torch.Tensor]:
        """The keys and the values of the prompts, (R, heads, P, head size) each."""
        return self._layers[layer][:2]

    def branches(self, layer: int) -> list[torch.Tensor]:
        """The keys and the values of the branches, (B, heads, T, head size) each."""
        return self._layers[layer][2:]

    def move_rows(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy the prompts in rows `sources` to rows `targets`."""
        for layer in self._layers:
            _move(self.prompts(layer), sources, targets)

    def move_branches(self, sources: torch.Tensor, targets: torch.Tensor, steps: int) -> None:
        """Copy the first `steps` tokens of branches `sources` to branches `targets`."""
        for layer in self._layers:
            _move([tensor[:, :, :steps] for tensor in self.branches(layer)], sources, targets)


def _move(tensors: Sequence[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
    for tensor in tensors if len(sources) else ():
        tensor[targets] = tensor[sources]


class TowerCache:
    """Outputs of a frozen audio tower, up to `capacity` bytes; the least recently used are dropped first.

    Each clip is encoded separately, so an output depends neither on other clips nor on whether it was cached.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._outputs: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, digest: str, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tower's output for the clip with this digest; `encode` computes it where it is not cached."""
        output = self._outputs.pop(digest, None)
        if output is None:
            output = encode().detach()
            self._bytes += output.nbytes
        self._outputs[digest] = output
        while self._bytes > self.capacity:
            self._bytes -= self._outputs.popitem(last=False)[1].nbytes
        return output
