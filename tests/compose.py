"""Small random checkpoints to compose: a Whisper and a Llama with a chat template and special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}system: Help.<end>{% endif %}"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIAL = ("<end>", "<pad>", "<tool>", "<file>", "<|reserved_0|>")


def build_whisper(directory: Path) -> Path:
    """A Whisper of two layers for clips of at most 10 s."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=60, d_model=32, num_mel_bins=80, max_source_positions=500, max_target_positions=16,
        decoder_start_token_id=51, bos_token_id=50, eos_token_id=50, pad_token_id=50, suppress_tokens=[],
        begin_suppress_tokens=[], **sizes,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, mean=1.5, std=0.3)
            torch.nn.init.normal_(module.bias, std=0.3)
    model.save_pretrained(directory)
    return directory


def build_tokenizer() -> Any:
    """A byte-level tokenizer with the special tokens of SPECIAL, and a chat template for texts only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["Rising or falling, which comes second? "], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE
    )


def build_llama(directory: Path) -> Path:
    """A Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.15, rope_parameters=dict(
            rope_type="default", rope_theta=500.0), rms_norm_eps=1e-5, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
