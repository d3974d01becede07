"""Which blocks of pairs of tokens FlexAttention computes under the tree mask, found from the layout of the rows.

A block has BLOCK queries and BLOCK keys. The first and last token of each and the extremes of positions and branches
tell whether some pair or every pair of a block attends. So no mask of all pairs is made: for rows of L tokens the
memory is (L / BLOCK)^2, not L^2.
"""

from __future__ import annotations

import torch

from hark.grpo.tree import PROMPT, Layout, tree_rule, window_start
from hark.models.attention import BLOCK, BlockMask, block_mask


def tree_block_mask(queries: Layout, keys: Layout, window: int | None = None) -> BlockMask:
    """`tree_mask` for FlexAttention."""
    lengths = queries.branch.shape[1], keys.branch.shape[1]
    return block_mask(*tree_blocks(queries, keys, window), tree_rule(queries, keys, window), lengths)


def tree_blocks(queries: Layout, keys: Layout, window: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each block whether some pair attends, and whether every pair does, two (N, query blocks, key blocks) bool.

    keys: rows of `prompt_layout` and `branches_layout`. queries: the same rows, or their branches.
    Both are exact for these layouts. A block that is not complete, at the end of a row, does not count as of all pairs.
    """
    query, key = (_in_blocks(layout) for layout in (queries, keys))
    start = window_start(query.position, window)
    begins, ends = _ends(queries, keys)  # (query blocks, 1), as columns of the keys
    key_begins, key_ends = (column.squeeze(1) for column in _ends(keys, keys))
    before, after = key_ends < begins, key_begins > ends

    # Tokens of branches: in columns of both, a token attends to itself. Otherwise a branch ends the block of the keys
    # and begins that of the queries.
    shared = (_keys(key.branch[..., -1]) == _queries(query.branch[..., 0])) & _keys(key.branch[..., -1] != PROMPT)
    if start is not None:
        shared &= _keys(key.position[..., -1]) >= _queries(start[..., 0])
    of_branches = before & shared | ~before & ~after & _keys(key.real.any(dim=-1))
    # Tokens of the prompt: their positions are consecutive, and windows of branches that reach it all reach its end.
    hidden = ~(key.real & (key.branch == PROMPT))
    lowest = key.position.masked_fill(hidden, torch.iinfo(key.position.dtype).max).amin(dim=-1)
    of_prompt = _keys(lowest) <= _queries(query.position.amax(dim=-1))
    if start is not None:
        highest = key.position.masked_fill(hidden, torch.iinfo(key.position.dtype).min).amax(dim=-1)
        of_prompt &= _keys(highest) >= _queries(start.amin(dim=-1))

    complete = (ends - begins == BLOCK - 1) & (key_ends - key_begins == BLOCK - 1)
    earlier = _keys(key.position.amax(dim=-1)) <= _queries(query.position.amin(dim=-1))
    every = _one_branch(query.branch, key.branch) & _keys(key.real.all(dim=-1)) & earlier & complete
    if start is not None:
        every &= _keys(key.position.amin(dim=-1)) >= _queries(start.amax(dim=-1))
    return of_branches | of_prompt, every


def _one_branch(branch: torch.Tensor, key_branch: torch.Tensor) -> torch.Tensor:
    """Whether all keys of a block are of the prompt or of the one branch that all queries are of."""
    (least, most), (key_least, key_most) = (tensor.aminmax(dim=-1) for tensor in (branch, key_branch))
    alone = (key_least == key_most) | (key_most == 0)  # branch 0 follows the prompt
    return _keys(key_most == PROMPT) | _keys(alone) & _queries(least == most) & (_keys(key_most) == _queries(most))


def _in_blocks(layout: Layout) -> Layout:
    """(N, L) as (N, blocks, BLOCK); the last token stands again where the last block has none."""
    length = layout.branch.shape[1]
    columns = torch.arange(-(-length // BLOCK) * BLOCK, device=layout.branch.device).clamp(max=length - 1)
    parts = layout.branch, layout.position, layout.real
    return Layout(*(part[:, columns].unflatten(1, (-1, BLOCK)) for part in parts))


def _ends(part: Layout, keys: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last column of each block of the last columns of rows, (blocks, 1), counted in the rows."""
    length, total = part.branch.shape[1], keys.branch.shape[1]
    first = torch.arange(total - length, total, BLOCK, device=keys.branch.device)[:, None]
    return first, (first + BLOCK - 1).clamp(max=total - 1)


def _queries(of_blocks: torch.Tensor) -> torch.Tensor:
    """(N, query blocks) as (N, query blocks, 1)."""
    return of_blocks[:, :, None]


def _keys(of_blocks: torch.Tensor) -> torch.Tensor:
    """(N, key blocks) as (N, 1, key blocks)."""
    return of_blocks[:, None, :]
