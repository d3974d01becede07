"""Text-only families: each is loaded from a directory that transformers wrote and equal to it, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.models.loading import load_policy
from hark.models.mini import build_mini
from hark.models.policy import Policy, PolicyError, Prompt
from tests.causal_types import ACCEPTED, build


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_mini(directory, ["a b c"], vocabulary=320, hidden=64, layers=1, tower_hidden=64, tower_layers=1)
    return AutoTokenizer.from_pretrained(directory)


def draw(policy: Policy, lengths=(7, 40), **changes):
    generator = torch.Generator().manual_seed(1)
    prompts = [Prompt(torch.randint(3, 300, (size,), generator=generator)) for size in lengths]
    settings = dict(group_size=3, max_new_tokens=14, temperature=1.0, keys=[(n,) for n in range(len(prompts))], batch=1)
    return sample(policy, prompts, **(settings | changes))


def native_logprobs(hf, prompt: Prompt, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = hf(input_ids=torch.cat([prompt.ids, tokens])[None], use_cache=False).logits[0]
    return logits[-len(tokens) - 1 : -1].float().log_softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)


@pytest.mark.parametrize("kind", ACCEPTED)
def test_the_sampler_and_the_scorer_give_the_logprobs_of_hugging_face(kind, tokenizer, tmp_path):
    """With windows of 8 positions where the type has windows, shorter than a prompt and than a completion."""
    build(kind, tmp_path, tokenizer)
    policy, hf = load_policy(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rollout = draw(policy)
    scored, _ = score(policy, rollout.prompts, rollout.tokens, rollout.mask, group_size=3)
    torch.testing.assert_close(rollout.logprobs, scored.detach(), atol=1e-5, rtol=1e-5)  # as in test_parity.py
    for row, (tokens, mask) in enumerate(zip(rollout.tokens, rollout.mask, strict=True)):
        expected = native_logprobs(hf, rollout.prompts[row // 3], tokens[mask])
        torch.testing.assert_close(rollout.logprobs[row][mask], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("mamba", "MambaForCausalLM has .*only attention layers"),
        ("qwen3_next", "Qwen3NextForCausalLM has layers of type linear_attention"),
        ("lfm2", "Lfm2ForCausalLM has layers of type conv"),
        ("bart", "takes no positions"),
        ("gpt_oss", "uses 'eager' attention"),
        ("doge", "no policy for model type 'doge' .*a mask of their own"),
    ],
)
def test_a_family_that_cannot_be_exact_is_refused_by_name_with_the_reason(kind, reason, tokenizer, tmp_path):
    build(kind, tmp_path, tokenizer, **({"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}))
    with pytest.raises(PolicyError, match=reason):
        load_policy(tmp_path)


def test_layers_that_attend_twice_are_refused_because_only_one_set_of_keys_would_be_kept(tokenizer, tmp_path):
    build("diffllama", tmp_path, tokenizer)
    with pytest.raises(PolicyError, match=r"DiffLlamaForCausalLM: its layers called attention as \[0, 0, 1, 1\]"):
        draw(load_policy(tmp_path))


LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("kind, rope", [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_rotary_frequencies_that_depend_on_the_longest_sequence_are_exact_up_to_their_limit(
    kind, rope, tokenizer, tmp_path
):
    original = dict(original_max_position_embeddings=64) if kind == "phi3" else {}
    build(kind, tmp_path, tokenizer, rope_parameters=rope, max_position_embeddings=64, **original)
    policy, hf = load_policy(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rollout = draw(policy, lengths=(7, 50), batch=2, max_new_tokens=15)
    expected = native_logprobs(hf, rollout.prompts[0], rollout.tokens[0][rollout.mask[0]])
    torch.testing.assert_close(rollout.logprobs[0][rollout.mask[0]], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(PolicyError, match="a sequence of 65 tokens; above 64 its rotary frequencies"):
        draw(policy, lengths=(7, 51), batch=2, max_new_tokens=15)
    with pytest.raises(PolicyError, match="above 64 its rotary frequencies"):
        score(policy, rollout.prompts, rollout.tokens.repeat(1, 2), rollout.mask.repeat(1, 2), group_size=3)


def test_a_generic_checkpoint_of_a_type_is_the_one_on_disk(tokenizer, tmp_path: Path):
    """GPT-NeoX stores its head under another name than its model has it."""
    build("gpt_neox", tmp_path, tokenizer)
    policy, hf = load_policy(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    own = dict(policy.model.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in hf.named_parameters())
