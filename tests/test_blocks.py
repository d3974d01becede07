"""The blocks that FlexAttention computes, found from the layout of rows, mean the tree mask exactly."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from hark.grpo.blocks import tree_block_mask, tree_blocks
from hark.grpo.instruments.memory_tracker import MemoryTracker
from hark.grpo.tree import Layout, branches_layout, prompt_layout, tree_mask, tree_rule
from hark.models.attention import BLOCK, BlockMask

WORKED = [  # lengths of prompts, group size, tokens of a branch, window
    ([130, 3, 77], 4, 9, None),
    ([130, 3, 77], 4, 9, 5),
    ([5], 1, 1, None),
    ([20, 20], 3, 60, 1),
    ([128, 128], 2, 128, None),  # every border of the row is one of blocks
    ([256, 300], 2, 256, 40),
    ([300, 9], 1, 0, None),  # no token of a branch is fed
    ([40], 3, 300, 128),
    ([400], 2, 300, 200),  # a block of which a window takes some pairs, with each query seeing some key
    ([600], 2, 400, 300),  # a block of all pairs within a window
]


def drawn(seed: int) -> tuple[list[int], int, int, int | None]:
    """A layout of some hundred tokens, with and without padding, short and long branches, windows of any size."""
    draw = random.Random(seed)
    lengths = [draw.choice([1, draw.randint(2, 60), draw.randint(61, 400)]) for _ in range(draw.randint(1, 3))]
    steps = draw.choice([1, draw.randint(2, 30), draw.randint(31, 300)])
    return lengths, draw.randint(1, 6), steps, draw.choice([None, None, 1, draw.randint(2, 60), draw.randint(61, 500)])


def rows_of(lengths, group_size: int, steps: int) -> tuple[Layout, Layout]:
    """Whole rows, and their branches."""
    counts = torch.tensor(lengths)
    branches = branches_layout(counts, group_size, steps)
    return prompt_layout(counts, int(counts.max())) + branches, branches


def dense(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Lists of blocks, (N, 1, A) and (N, 1, A, B), as (N, A, B) bool."""
    found = torch.zeros(indices.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        found[(*place, indices[(*place,)][: counts[(*place,)]].long())] = True
    return found.squeeze(1)


def lists_of(mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks in which the rule is applied, and those without it, (N, query blocks, key blocks) bool.

    The backward has lists of its own, which must name the same blocks.
    """
    parts, wholes = dense(mask.kv_num_blocks, mask.kv_indices), dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(dense(mask.q_num_blocks, mask.q_indices).mT, parts)
    assert torch.equal(dense(mask.full_q_num_blocks, mask.full_q_indices).mT, wholes)
    return parts, wholes


def assert_means_the_tree_mask(queries: Layout, keys: Layout, window: int | None) -> None:
    allowed = tree_mask(queries, keys, window)
    mask = tree_block_mask(queries, keys, window)
    rows, _, height, width = allowed.shape
    assert mask.shape == (rows, 1, height, width)
    parts, wholes = lists_of(mask)
    assert not (parts & wholes).any()
    of_rule = create_mask(mask.mask_mod, rows, None, height, width, device="cpu")
    parts, wholes = (
        b.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, None, :height, :width] for b in (parts, wholes)
    )
    assert torch.equal(parts & of_rule | wholes, allowed)


@pytest.mark.parametrize("case", WORKED + [drawn(seed) for seed in range(60)])
def test_the_blocks_and_the_rule_in_them_mean_the_tree_mask(case):
    """Of whole rows, and of branches after known prompts."""
    *sizes, window = case
    row, branches = rows_of(*sizes)
    assert_means_the_tree_mask(row, row, window)
    if sizes[-1]:
        assert_means_the_tree_mask(branches, row, window)


@pytest.mark.parametrize("case", WORKED + [drawn(seed) for seed in range(60)])
def test_they_are_the_blocks_that_torch_finds_by_all_pairs(case):
    *sizes, window = case
    row, branches = rows_of(*sizes)
    for queries in (row, branches)[: 1 + bool(sizes[-1])]:
        lengths = queries.branch.shape[1], row.branch.shape[1]
        expected = create_block_mask(tree_rule(queries, row, window), len(sizes[0]), None, *lengths, device="cpu")
        for found, exact in zip(lists_of(tree_block_mask(queries, row, window)), lists_of(expected), strict=True):
            assert torch.equal(found, exact)


def test_branches_leave_blocks_of_their_siblings_out():
    row, branches = rows_of([128], 8, 128)
    some, every = tree_blocks(row, row)
    assert some.sum() == 1 + 8 + 8 and every.sum() == 8, "of 81: the prompt, and of each branch two"
    some, every = tree_blocks(branches, row)
    assert some.sum() == 8 + 8 and every.sum() == 8


def test_no_memory_for_all_pairs_is_taken():
    """For 4,096 tokens the mask of all pairs has 16 MiB."""
    row, _ = rows_of([512], 7, 512)
    with MemoryTracker() as tracker:
        tree_block_mask(row, row)
    assert tracker.peak < 2**20
