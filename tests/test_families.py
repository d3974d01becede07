"""Families whose layers call attention in unusual ways: equal to Hugging Face, or refused by name."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.models.families.causal_lm import CausalLMPolicy
from hark.models.policy import Policy, PolicyError, Prompt

SIZES = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
# Multi-head latent attention: values have half the head size of keys, and keys consist of two parts.
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1, n_group=1,
    topk_group=1, head_dim=8,
)  # fmt: skip
FAMILIES = {
    "deepseek_v2": LATENT,
    "nemotron": {},  # its layers do not pass on keyword arguments that they do not know
    "jetmoe": {},  # takes a view of the attention output, which must be contiguous
    "phi": {},
    "gemma3_text": dict(head_dim=16, sliding_window=8),
    "cohere2": dict(sliding_window=8),
}


def policy_of(family: str, **sizes) -> Policy:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | sizes)))
    policy = CausalLMPolicy.__new__(CausalLMPolicy)
    Policy.__init__(policy, model, SimpleNamespace(eos_token_id=2, pad_token_id=0, chat_template=None))
    return policy


def draw(policy: Policy):
    generator = torch.Generator().manual_seed(1)
    prompts = [Prompt(torch.randint(3, 320, (size,), generator=generator)) for size in (7, 40)]
    return sample(policy, prompts, group_size=3, max_new_tokens=14, temperature=1.0, keys=[(0,), (1,)], batch=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_and_the_scorer_give_the_logprobs_of_hugging_face(family):
    policy, hf = (policy_of(family, **FAMILIES[family]) for _ in range(2))
    hf.decoder.config._attn_implementation = "sdpa"
    rollout = draw(policy)
    scored, _ = score(policy, rollout.prompts, rollout.tokens, rollout.mask, group_size=3)
    torch.testing.assert_close(rollout.logprobs, scored.detach(), atol=1e-5, rtol=1e-5)  # as in test_parity.py
    for row, (tokens, mask) in enumerate(zip(rollout.tokens, rollout.mask, strict=True)):
        ids = torch.cat([rollout.prompts[row // 3].ids, tokens[mask]])
        with torch.no_grad():
            logits = hf.model(input_ids=ids[None], use_cache=False).logits[0]
        predicted = logits[-int(mask.sum()) - 1 : -1].float().log_softmax(dim=-1)
        expected = predicted.gather(-1, tokens[mask][:, None]).squeeze(-1)
        torch.testing.assert_close(rollout.logprobs[row][mask], expected, atol=1e-5, rtol=1e-5)


def test_layers_that_attend_twice_are_refused_because_only_one_set_of_keys_would_be_kept():
    with pytest.raises(PolicyError, match=r"DiffLlamaForCausalLM: its layers called attention as \[0, 0, 1, 1\]"):
        draw(policy_of("diffllama"))


def test_a_decoder_that_takes_no_positions_is_refused():
    with pytest.raises(PolicyError, match="BartDecoder takes no positions"):
        policy_of("bart")
