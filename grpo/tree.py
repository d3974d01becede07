"""A group is one row: the prompt stands once and the G completions are branches behind it.

    row n:   [ prompt n, P tokens | completion 0 | completion 1 | ... | completion G-1 ]

A token attends to the prompt and to its own branch, never to a sibling, and each branch counts its positions on from
the prompt's end, as if it stood alone behind it. The scorer lays out whole rows; the sampler, which adds a token to
each branch at a time, lays out each branch with its prompt. They share this one rule.
"""

from __future__ import annotations

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
    query, key = queries.position[:, :, None], keys.position[:, None, :]
    own = queries.branch[:, :, None] == keys.branch[:, None, :]
    mask = (own | (keys.branch[:, None, :] == PROMPT)) & keys.real[:, None, :] & (key <= query)
    if window is not None:
        mask &= query - key < window
    return mask.unsqueeze(1)
