"""A group is one row: the prompt once, followed by its G completions as branches.

    row n:   [ prompt n, P tokens | completion 0 | completion 1 | ... | completion G-1 ]

A token attends to the prompt, to the earlier tokens of its own branch and to itself, never to another branch. The
positions of each branch continue those of the prompt, as if it were the only branch. The scorer computes complete rows.
The sampler computes one new token per branch, with the keys of its prompt and its branch. Both use this mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

PROMPT = -1  # the branch number of prompt tokens, to which every branch attends


@dataclass(frozen=True)
class Layout:
    """The tokens of N rows: the branch of each, its position, and whether it is real (not padding), all (N, L)."""

    branch: torch.Tensor
    position: torch.Tensor
    real: torch.Tensor

    def __getitem__(self, columns: slice) -> Layout:
        return Layout(self.branch[:, columns], self.position[:, columns], self.real[:, columns])

    def __add__(self, other: Layout) -> Layout:
        pairs = ((self.branch, other.branch), (self.position, other.position), (self.real, other.real))
        return Layout(*(torch.cat(pair, dim=1) for pair in pairs))


def prompt_layout(lengths: torch.Tensor, longest: int) -> Layout:
    """Prompts of the given lengths (N,), padded on the right to `longest`."""
    position = torch.arange(longest, device=lengths.device).expand(len(lengths), -1)
    return Layout(torch.full_like(position, PROMPT), position, position < lengths[:, None])


def branches_layout(lengths: torch.Tensor, group_size: int, steps: int) -> Layout:
    """G branches of `steps` tokens each, in order, that follow prompts of the given lengths (N,)."""
    branch, step = torch.arange(group_size, device=lengths.device), torch.arange(steps, device=lengths.device)
    position = lengths[:, None] + step.repeat(group_size)
    # Padding at a completion's end needs no mask: only later tokens of its branch attend to it, all padding.
    return Layout(
        branch.repeat_interleave(steps).expand_as(position), position, torch.ones_like(position, dtype=torch.bool)
    )


def tree_mask(queries: Layout, keys: Layout, window: int | None = None) -> torch.Tensor:
    """Which query may attend to which key, (N, 1, L, S) bool; with `window` only the last `window` positions."""
    branch, position = queries.branch[:, :, None], queries.position[:, :, None]
    key = keys.branch[:, None, :], keys.position[:, None, :], keys.real[:, None, :]
    return _attends(branch, position, *key, window_start(position, window)).unsqueeze(1)


def tree_masks(
    windows: Mapping[str, int | None], queries: Layout, keys: Layout, *, prompt: int = 0
) -> dict[str, torch.Tensor]:
    """The tree mask for each type of layer, given the sliding window of each; None is full attention.

    prompt: how many queries at the start of the rows are prompt tokens. The mask for full attention leaves them out,
    because `sdpa_attention` computes the causal attention within the prompt without a mask.
    """
    return {
        kind: tree_mask(queries[slice(prompt if window is None else 0, None)], keys, window)
        for kind, window in windows.items()
    }


def tree_rule(queries: Layout, keys: Layout, window: int | None = None) -> Callable[..., torch.Tensor]:
    """The tree mask as FlexAttention's `mask_mod`, a function of the indices of one query and one key."""
    # Contiguous, because the kernel is compiled for their strides; int32, because it reads them for each pair.
    parts = queries.branch, queries.position, keys.branch, keys.position
    branch, position, key_branch, key_position = (tensor.int().contiguous() for tensor in parts)
    real, start = keys.real.contiguous(), window_start(position, window)

    def attends(n: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        key = key_branch[n, k], key_position[n, k], real[n, k]
        return _attends(branch[n, q], position[n, q], *key, None if start is None else start[n, q])

    return attends


def _attends(
    branch: torch.Tensor,
    position: torch.Tensor,
    key_branch: torch.Tensor,
    key_position: torch.Tensor,
    key_real: torch.Tensor,
    start: torch.Tensor | None,
) -> torch.Tensor:
    """Whether queries may attend to keys; never to keys before position `start`."""
    mask = ((key_branch == branch) | (key_branch == PROMPT)) & key_real & (key_position <= position)
    return mask if start is None else mask & (key_position >= start)


def window_start(position: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """The first position that queries at these positions may attend to; None without a window."""
    return None if window is None else position - (window - 1)
