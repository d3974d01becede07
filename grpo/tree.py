"""A group is one row: the prompt stands once and the G completions are branches behind it.

    row n:   [ prompt n, P tokens | completion 0 | completion 1 | ... | completion G-1 ]

A token attends to the prompt and to its own branch, never to a sibling, and each branch counts its positions on from
the prompt's end, as if it stood alone behind it. The scorer lays out whole rows; the sampler, which adds a token to
each branch at a time, lays out each branch with its prompt. They share this one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

PROMPT = -1  # the branch of prompt tokens; every branch sees them


@dataclass(frozen=True)
class Layout:
    """Where the tokens of N rows stand: branch, position and whether each is real, all (N, L)."""

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
    """G branches of `steps` tokens, one behind the other, behind prompts of the given lengths (N,)."""
    branch, step = torch.arange(group_size, device=lengths.device), torch.arange(steps, device=lengths.device)
    position = lengths[:, None] + step.repeat(group_size)
    # Padding behind a completion's end needs no mask: only later tokens of its own branch could see it.
    return Layout(
        branch.repeat_interleave(steps).expand_as(position), position, torch.ones_like(position, dtype=torch.bool)
    )


def tree_mask(queries: Layout, keys: Layout, window: int | None = None) -> torch.Tensor:
    """Which query may attend to which key, (N, 1, Lq, Lk) bool; `window` is how many positions back one may look."""
    branch, position = queries.branch[:, :, None], queries.position[:, :, None]
    key = keys.branch[:, None, :], keys.position[:, None, :], keys.real[:, None, :]
    return _attends(branch, position, *key, _since(position, window)).unsqueeze(1)


def tree_masks(
    windows: Mapping[str, int | None], queries: Layout, keys: Layout, *, prompt: int = 0
) -> dict[str, torch.Tensor]:
    """The tree mask for each type of layer, given how many positions back each type attends.

    prompt: how many queries at the start of the rows are prompt tokens. A type of layer without a window gets a mask
    without these queries: attention of the prompt to itself is plainly causal and needs none.
    """
    return {
        kind: tree_mask(queries[slice(prompt if window is None else 0, None)], keys, window)
        for kind, window in windows.items()
    }


def tree_rule(row: Layout, window: int | None = None) -> Callable[..., torch.Tensor]:
    """The tree mask of rows as FlexAttention asks for it: a function of the places of single queries and keys."""
    # Contiguous and of four bytes: the function is compiled for their strides, and reads them for each pair.
    branch, position = (tensor.int().contiguous() for tensor in (row.branch, row.position))
    real, since = row.real.contiguous(), _since(position, window)

    def attends(n: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        key = branch[n, k], position[n, k], real[n, k]
        return _attends(branch[n, q], position[n, q], *key, None if since is None else since[n, q])

    return attends


def _attends(
    branch: torch.Tensor,
    position: torch.Tensor,
    key_branch: torch.Tensor,
    key_position: torch.Tensor,
    key_real: torch.Tensor,
    since: torch.Tensor | None,
) -> torch.Tensor:
    """Whether queries may attend to keys, which look no further back than to position `since`."""
    mask = ((key_branch == branch) | (key_branch == PROMPT)) & key_real & (key_position <= position)
    return mask if since is None else mask & (key_position >= since)


def _since(position: torch.Tensor, window: int | None) -> torch.Tensor | None:
    return None if window is None else position - (window - 1)
