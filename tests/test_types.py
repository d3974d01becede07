"""Groups of like length are scored together, and each keeps what is its own."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from hark.grpo.types import PolicyBatch
from hark.models.policy import Prompt

GROUP = 2


def batch_of(prompts: list[int], completions: list[int]) -> PolicyBatch:
    """Groups with prompts and longest completions of these lengths; every cell holds the number of its completion."""
    shorter = [length for longest in completions for length in (max(longest - 1, 1), longest)]
    mask = torch.arange(max(completions)) < torch.tensor(shorter)[:, None]  # (B, T)
    number = torch.arange(len(mask))
    return PolicyBatch(
        prompts=tuple(Prompt(torch.full((length,), n)) for n, length in enumerate(prompts)),
        group_size=GROUP,
        tokens=number[:, None] * mask,
        mask=mask,
        weights=number[:, None] * mask / 10,
        old_logprobs=number[:, None] * mask / -10,
        ref_logprobs=None,
        advantages=number / 10,
    )


def cells(batch: PolicyBatch, parts) -> int:
    """Tokens that the decoder is fed, padding included."""
    total = 0
    for groups in parts:
        micro = batch.select(groups)
        prompt = max(len(prompt.ids) for prompt in micro.prompts)
        total += len(groups) * (prompt + GROUP * (micro.tokens.shape[1] - 1))
    return total


@pytest.mark.parametrize("prompts, completions", [([9, 30, 10, 31, 9, 50], [5] * 6), ([20] * 6, [3, 40, 7, 38, 2, 9])])
def test_no_split_into_parts_of_a_size_pads_less(prompts, completions):
    batch = batch_of(prompts, completions)
    splits = [[order[:2], order[2:4], order[4:]] for order in permutations(range(6))]
    assert cells(batch, batch.split_by_length(2)) == min(cells(batch, split) for split in splits)
    assert cells(batch, batch.split_by_length(2)) < cells(batch, [[0, 1], [2, 3], [4, 5]])


def test_prompts_and_completions_both_count():
    """Rows of 10 + 2 * 29, 60 + 2 * 4, 10 + 2 * 4 and 12 + 2 * 2 tokens."""
    batch = batch_of([10, 10, 60, 12], [30, 5, 5, 3])
    assert batch.split_by_length(2) == [[0, 2], [1, 3]] and batch.split_by_length(3) == [[0, 2, 1], [3]]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_group_is_scored_once_with_what_belongs_to_it(size):
    batch = batch_of([7, 3, 9, 3, 5], [4, 6, 2, 1, 6])
    parts = batch.split_by_length(size)
    assert sorted(sum(parts, [])) == list(range(5))
    assert len(parts) == -(-5 // size), "as many on every rank, whatever the lengths"
    for groups, micro in zip(parts, map(batch.select, parts), strict=True):
        assert [prompt.ids[0].item() for prompt in micro.prompts] == groups
        assert micro.tokens.shape[1] == micro.mask.sum(dim=1).max(), "trimmed"
        rows = [GROUP * group + place for group in groups for place in range(GROUP)]
        assert micro.advantages.tolist() == batch.advantages[rows].tolist()
        for name in ("tokens", "mask", "weights", "old_logprobs"):
            part, whole = getattr(micro, name), getattr(batch, name)
            assert torch.equal(part, whole[rows, : part.shape[1]]) and not whole[rows, part.shape[1] :].any()
        assert micro.ref_logprobs is None
