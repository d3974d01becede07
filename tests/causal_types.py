"""Small random checkpoints of transformers' causal language models, by model type, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerBase

# The types that are loaded and are equal to Hugging Face; every one is tested.
ACCEPTED = (
    "afmoe apertus apertus1p5_text arcee aria_text axk1 beam biogpt bitnet cohere cohere2 cohere2_moe cwm "
    "deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe flex_olmo fuyu gemma gemma3 "
    "gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt_neox granite "
    "granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder "
    "jais2 jetmoe kolibri1 laguna lfm2 llama mellum minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 "
    "mistral mixtral modernbert-decoder moshi nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 "
    "phimoe qwen2 qwen2_moe qwen3 qwen3_moe sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 "
    "whisper youtu"
).split()
SIZES = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, sliding_window=8, initializer_range=0.1,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_k=2,
    moe_topk=2, moe_intermediate_size=32, first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1,
    shared_expert_intermediate_size=32, shared_intermediate_size=32, q_lora_rank=24, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, num_layers=2, hidden_dropout=0.0, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, vocab_size_per_layer_input=320,
)  # fmt: skip
LATENT = dict(num_key_value_heads=4, head_dim=8)  # multi-head latent attention has as many key heads as query heads
KINDS = ["sliding_attention", "full_attention"]
TEXT = {name: SIZES[name] for name in list(SIZES)[:10] if name != "sliding_window"}
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 sarvam_mla youtu".split(), LATENT),
    "fuyu": dict(text_config=dict(TEXT, model_type="persimmon"), image_size=28, patch_size=14),
    "gemma3": dict(
        text_config=dict(TEXT, model_type="gemma3_text", sliding_window=8), vision_config=VISION, mm_tokens_per_image=4
    ),
    "gemma3n_text": dict(
        hidden_size_per_layer_input=16, num_kv_shared_layers=2, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4,
        altup_num_inputs=2, num_hidden_layers=4, layer_types=2 * KINDS,
    ),
    "gemma4_text": dict(
        hidden_size_per_layer_input=16, num_kv_shared_layers=2, global_head_dim=32, num_hidden_layers=4,
        layer_types=2 * KINDS, enable_moe_block=True, top_k_experts=2,
    ),
    "gemma4_unified_text": dict(layer_types=KINDS),
    "whisper": dict(d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96),
}  # fmt: skip


def config_of(kind: str, **overrides: Any) -> Any:
    """A config of small sizes: those of SIZES that the type has, and its own."""
    cls = CONFIG_MAPPING[kind]
    base = cls()
    other_names = getattr(cls, "attribute_map", {})
    has = set(base.to_dict()) | set(other_names)
    sizes = {name: value for name, value in SIZES.items() if name in has and other_names.get(name) not in SIZES}
    layers = list(getattr(base, "layer_types", None) or ())
    if layers and not isinstance(getattr(cls, "layer_types", None), property):
        kinds = list(dict.fromkeys(layers))
        sizes["layer_types"] = kinds[:2] if len(kinds) > 1 else layers[:2]
    return cls(**(sizes | MORE.get(kind, {}) | overrides))


def build(kind: str, directory: Path, tokenizer: PreTrainedTokenizerBase, **overrides: Any) -> None:
    """Write a checkpoint with random weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(kind, **overrides)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
