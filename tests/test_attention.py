"""FlexAttention under the tree mask equals sdpa; on the CPU it is torch's uncompiled reference."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex

from hark.grpo.blocks import tree_block_mask
from hark.grpo.prefill import prefilled
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.sharding import device_mesh, shard
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.tree import branches_layout, prompt_layout, tree_mask
from hark.models.attention import KERNEL, sdpa_attention
from hark.models.loading import load_policy
from hark.models.lora import whole
from tests.conftest import TEXTS, Case, build_causal_lm
from tests.ranks import on_ranks
from tests.simulation import whole_rows
from tests.test_models import build_mixed_windows, build_scaled

VALUES = dict(atol=1e-5, rtol=1e-5)  # as in test_parity.py


@pytest.fixture(autouse=True)
def forget_compiled_functions():
    torch._dynamo.reset()


def row_of(lengths, group_size, steps):
    lengths = torch.tensor(lengths)
    return prompt_layout(lengths, int(lengths.max())) + branches_layout(lengths, group_size, steps)


def test_masks_have_rows_that_the_memory_efficient_kernel_reads_without_a_copy(case: Case, monkeypatch):
    """The kernel copies a mask of which a stride, but for the last, is no multiple of 8 (aligned_tensor in torch)."""
    seen = []

    def noted(module, query, key, value, mask, **kwargs):
        seen.append(mask)
        return sdpa_attention(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr("hark.models.policy.sdpa_attention", noted)
    rollout = drawn(case.policy, case.prompts)
    split, _ = score(case.policy, case.prompts, rollout.tokens, rollout.mask, group_size=4)
    assert not seen, "on the CPU rows are split"
    monkeypatch.setattr("hark.grpo.scorer.row_attention", whole_rows)
    whole, _ = score(case.policy, case.prompts, rollout.tokens, rollout.mask, group_size=4)
    torch.testing.assert_close(whole, split, **VALUES)
    assert len(seen) == len(case.policy.decoder.layers) and seen[0].shape[-1] % 8, "a length that needs it"
    for mask in seen:
        assert mask.stride(-1) == 1 and not any(stride % 8 for stride in mask.stride()[:-1])


def drawn(policy, prompts):
    keys = [(0, 0, n) for n in range(len(prompts))]
    return sample(policy, prompts, group_size=4, max_new_tokens=12, temperature=1.0, keys=keys)


@torch.no_grad()
def assert_flex_scores_alike(policy, prompts):
    rollout = drawn(policy, prompts)
    everywhere = torch.ones_like(rollout.mask)
    expected, entropy = score(policy, prompts, rollout.tokens, everywhere, group_size=4)
    policy.attention = "flex"
    logprobs, spread = score(policy, prompts, rollout.tokens, everywhere, group_size=4)
    torch.testing.assert_close(logprobs, expected, **VALUES)
    torch.testing.assert_close(spread.entropy, entropy.entropy, **VALUES)
    prefix = prefilled(policy, prompts).select(range(len(prompts)))
    apart, _ = score(policy, prompts, rollout.tokens, everywhere, group_size=4, prefix=prefix)
    torch.testing.assert_close(apart, expected, **VALUES)


def test_flexattention_scores_as_sdpa_does(case):
    """Three prompts of different lengths, also apart from their completions; the text model has two query heads per
    key head.
    """
    assert_flex_scores_alike(case.policy, case.prompts)


@pytest.mark.parametrize("name", ["sliding", "mixed", "Granite"])
def test_flexattention_takes_windows_and_scales_as_sdpa_does(name, tmp_path):
    if name == "sliding":
        build_causal_lm(tmp_path, sliding_window=8)
    elif name == "mixed":
        build_mixed_windows(tmp_path)
    else:
        build_scaled(tmp_path, name)
    policy = load_policy(tmp_path)
    assert_flex_scores_alike(policy, [policy.prepare(text) for text in TEXTS])


def gradients(case: Case, **settings) -> dict[str, torch.Tensor]:
    policy = load_policy(case.directory, **settings)
    rollout = drawn(case.policy, case.prompts)
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    logprobs, _ = score(policy, case.prompts, rollout.tokens, rollout.mask, group_size=4)
    (weights * logprobs).sum().backward()
    return {name: whole(p.grad) for name, p in policy.model.named_parameters() if p.requires_grad}


def test_gradients_pass_through_flexattention_recomputed_and_sharded_or_not(case, monkeypatch):
    """The uncompiled reference can compute a backward on the CPU, but torch refuses it; the patches allow it."""
    expected = gradients(case)
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)

    def check(world: World) -> None:
        split = dict(shard=lambda policy: shard(policy, device_mesh(world)))
        for settings in ({}, {"recompute": True}, {"recompute": True} | split):
            found = gradients(case, attention="flex", **settings)
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                scale = expected[name].abs().max()
                torch.testing.assert_close(gradient / scale, expected[name] / scale, atol=1e-4, rtol=0)

    on_ranks(1, check)


@torch.no_grad()
def test_rows_of_any_length_and_number_share_one_compilation():
    """The first batch has 2 rows of 3 blocks, because torch assumes that sizes which are equal at first always are.

    Branches after known prompts have fewer queries than keys, and share a second one.
    """
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex.flex_attention, dynamic=True, fullgraph=True, backend=counter)
    for apart in (False, True):
        for lengths, steps in (([300, 9], 40), ([310, 20, 7, 400, 30], 51), ([900, 901, 902], 100), ([257] * 6, 35)):
            row, longest = row_of(lengths, 4, steps), max(lengths)
            queries = row[longest:] if apart else row
            query = torch.randn(len(lengths), 8, queries.branch.shape[1], 16)
            key, value = (torch.randn(len(lengths), 8, row.branch.shape[1], 16) for _ in range(2))
            result = compiled(query, key, value, block_mask=tree_block_mask(queries, row), kernel_options=KERNEL)
            mask = tree_mask(queries, row)
            expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
            torch.testing.assert_close(result, expected, **VALUES)
        assert counter.frame_count == 1 + apart
