"""`SplitAttention` equals masked attention of the whole row, in values and in gradients."""

from types import SimpleNamespace

import pytest
import torch

from hark.grpo.tree import branches_layout, prompt_layout, tree_mask
from hark.models.attention import AfterPrompt, sdpa_attention
from hark.models.split_attention import SplitAfterPrompt, SplitAttention

MODULE = SimpleNamespace(training=False, num_key_value_groups=2, is_causal=True)
PROMPT, GROUP, STEPS, SIZE = 7, 3, 5, 16
LENGTHS = torch.tensor([7, 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_of_a_row_give_what_its_tree_mask_gives(dtype):
    """In float32 the sums differ by their order, some 1e-7 of values around 1; bfloat16 has a unit of 8e-3 there."""
    generator = torch.Generator().manual_seed(0)
    row = prompt_layout(LENGTHS, PROMPT) + branches_layout(LENGTHS, GROUP, STEPS)
    width = row.position.shape[1]
    shapes = [(2, heads, width, SIZE) for heads in (4, 2, 2)]  # two query heads share a key head
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    wanted = torch.randn(2, width, 4, SIZE, generator=generator).to(dtype)
    wanted = wanted * row.real[:, :, None, None]  # outputs at padding are never used

    def addends(mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)

    results = []
    for attend, mask in (
        (sdpa_attention, tree_mask(row[PROMPT:], row)),
        (SplitAttention(PROMPT, GROUP), row.real[:, None, None, :PROMPT]),
    ):
        output = attend(MODULE, *inputs, addends(mask), scaling=0.3)
        gradients = torch.autograd.grad((output * wanted).sum(), inputs)
        results.append([output * row.real[:, :, None, None], *gradients])
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for expected, got in zip(*results, strict=True):
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", [SIZE, SIZE // 2])
def test_branches_after_a_known_prompt_give_what_the_whole_row_gives(size):
    """In values and in the gradients of all keys and values, with values as wide as keys and narrower ones."""
    generator = torch.Generator().manual_seed(0)
    branches = branches_layout(LENGTHS, GROUP, STEPS)
    row = prompt_layout(LENGTHS, PROMPT) + branches
    width = row.position.shape[1]
    shapes = [(2, heads, width, last) for heads, last in ((4, SIZE), (2, SIZE), (2, size))]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    query, key, value = inputs
    wanted = torch.randn(2, width - PROMPT, 4, size, generator=generator)

    def addends(mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    whole = sdpa_attention(MODULE, *inputs, addends(tree_mask(row[PROMPT:], row)), scaling=0.3)[:, PROMPT:]
    expected = [whole, *torch.autograd.grad((whole * wanted).sum(), inputs)]
    layers = [(key[:, :, :PROMPT], value[:, :, :PROMPT])]
    for attend, mask in (
        (AfterPrompt(layers), tree_mask(branches, row)),
        (SplitAfterPrompt(layers, GROUP), row.real[:, None, None, :PROMPT]),
        (SplitAfterPrompt(layers, GROUP), tree_mask(branches, row)),
    ):
        own = query[:, :, PROMPT:], key[:, :, PROMPT:], value[:, :, PROMPT:]
        module = SimpleNamespace(**vars(MODULE), layer_idx=0)
        output = attend(module, *own, addends(mask), scaling=0.3)
        for one, other in zip(expected, [output, *torch.autograd.grad((output * wanted).sum(), inputs)], strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
