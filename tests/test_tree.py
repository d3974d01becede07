"""Who attends to whom in a row: worked out token by token."""

import torch

from hark.grpo.tree import PROMPT, branches_layout, prompt_layout, tree_mask

LENGTHS = torch.tensor([3, 2])


def expected(layout, n):
    """The rule, written as a loop over pairs of tokens."""
    size = layout.branch.shape[1]
    mask = torch.zeros(size, size, dtype=torch.bool)
    for q in range(size):
        for k in range(size):
            same_branch = layout.branch[n, k] in (PROMPT, layout.branch[n, q])
            mask[q, k] = same_branch and layout.real[n, k] and layout.position[n, k] <= layout.position[n, q]
    return mask


def test_a_row_worked_by_hand():
    row = prompt_layout(LENGTHS, 3) + branches_layout(LENGTHS, 2, 2)
    assert row.branch[1].tolist() == [PROMPT, PROMPT, PROMPT, 0, 0, 1, 1]
    assert row.position[1].tolist() == [0, 1, 2, 2, 3, 2, 3], "branches restart at the prompt's own length"
    mask = tree_mask(row, row)
    assert mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],  # padding: its query is never read, its key never seen
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]
    near = tree_mask(row, row, window=2)
    assert near[1, 0, 6].int().tolist() == [0, 0, 0, 0, 0, 1, 1], "the prompt's end is two positions back"


def test_no_token_sees_a_sibling_padding_or_the_future():
    row = prompt_layout(LENGTHS, 3) + branches_layout(LENGTHS, 3, 4)
    mask = tree_mask(row, row)
    for n in range(2):
        assert torch.equal(mask[n, 0], expected(row, n))
