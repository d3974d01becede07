"""A small model with its tokenizer and processor, built from code: the model of `make demo` and `hark new-model`.

The result is a Hugging Face checkpoint directory, loaded like that of Qwen2-Audio-7B-Instruct. Its weights are random.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hark.data.errors import DataError
from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.codec_tokens import add_codec
from hark.models.directory import check_directory, read_json
from hark.models.mini_families import FAMILIES, Sizes
from hark.models.policy import PolicyError

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# One token each, to keep answers short. They are not special tokens, so they stay in the completions' texts.
TAGS = ("<answer>", "</answer>", "<think>", "</think>")
CLIP = "CLIP"  # in the template below: what a family writes for a clip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}CLIP{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Arguments of `build_mini` by the name of a size.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(vocabulary=512, hidden=64, layers=2, tower_hidden=64, tower_layers=1),
    "small": dict(vocabulary=768, hidden=192, layers=4, tower_hidden=128, tower_layers=2),
    "medium": dict(vocabulary=2048, hidden=384, layers=6, tower_hidden=256, tower_layers=4),
}


def build_mini(
    directory: str | Path,
    texts: Iterable[str],
    *,
    family: str = "qwen2_audio",
    seed: int = 0,
    tower_from: str | Path | None = None,
    **sizes: int,
) -> None:
    """Write a checkpoint of a family with random parameters; equal seeds give equal weights.

    texts: the tokenizer's training data. It is a byte-level tokenizer, so it can encode any other text too.
    tower_from: a Whisper checkpoint directory; its encoder, with its sizes, becomes the audio tower of a qwen2_audio.
    sizes: fields of `Sizes`.
    """
    import transformers

    if tower_from is not None and family != "qwen2_audio":
        raise DataError(f"the encoder of {tower_from} fits a qwen2_audio only; leave it out for a {family}")
    made, chosen = FAMILIES[family], Sizes(**sizes)
    tokenizer = _build_tokenizer(texts, chosen.vocabulary, made.tokens)
    encoder = None if tower_from is None else whisper_encoder(Path(tower_from))
    config = made.config(tokenizer, chosen)
    if encoder is not None:
        config.audio_config = transformers.AutoConfig.for_model(**like_whisper(encoder.config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, made.model)(config)
        _init_tower(model.model)
    if encoder is not None:
        model.model.audio_tower.load_state_dict(encoder.state_dict())
    stop = tokenizer.convert_tokens_to_ids(END)
    model.generation_config = transformers.GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    bins = 80 if encoder is None else config.audio_config.num_mel_bins
    model.save_pretrained(directory)
    made.processor(tokenizer, CHAT_TEMPLATE.replace(CLIP, made.audio), bins).save_pretrained(directory)


def build_mini_speaker(directory: str | Path, texts: Iterable[str], *, codes: int, seed: int = 0, **sizes: int) -> None:
    """Write a text-to-speech checkpoint: a Qwen2 with random parameters and a token for each of `codes` codes.

    texts: the tokenizer's training data. sizes: fields of `Sizes`, of which those of the tower change nothing.
    """
    import transformers

    chosen = Sizes(**sizes)
    tokenizer = _build_tokenizer(texts, chosen.vocabulary, [])
    tokenizer.chat_template = CHAT_TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(**chosen.text("qwen2", len(tokenizer)))
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        add_codec(model, tokenizer, codes)
    stop = tokenizer.convert_tokens_to_ids(END)
    model.generation_config = transformers.GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _build_tokenizer(texts: Iterable[str], vocabulary: int, tokens: dict[str, str] | list[str]) -> Any:
    """Byte-level BPE: 256 bytes, the special tokens, and merges learned from `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = tokens if isinstance(tokens, dict) else {}
    specials = [PAD, START, END, *(tokens.values() if isinstance(tokens, dict) else tokens)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(TAGS),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "user", "assistant"], trainer)  # the role names of the chat template
    tokenizer.add_tokens(list(TAGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=dict(names) or list(tokens),
        clean_up_tokenization_spaces=False,
    )


def like_whisper(config: Any) -> dict:
    """The sizes of a Whisper encoder as the audio_config of a Qwen2-Audio."""
    keys = "num_mel_bins d_model encoder_layers encoder_attention_heads encoder_ffn_dim activation_function".split()
    sizes = {key: getattr(config, key) for key in (*keys, "max_source_positions", "scale_embedding")}
    return {"model_type": "qwen2_audio_encoder", **sizes}


@torch.no_grad()
def _init_tower(model: Any) -> None:
    """Initialise the convolutions at twice Kaiming's scale, and the position embeddings at a fifth of Whisper's.

    The audio features then outweigh the positions. With Whisper's scale, training takes far longer to use the audio.
    """
    tower = getattr(model, "audio_tower", None) or model.encoder
    for convolution in tower.children():
        if isinstance(convolution, (nn.Conv1d, nn.Conv2d)):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu").mul_(2)
    if hasattr(tower, "embed_positions"):
        tower.embed_positions.weight.copy_(0.2 * _sinusoids(*tower.embed_positions.weight.shape))


def whisper_encoder(directory: Path) -> Any:
    """The encoder of a Whisper checkpoint; DataError for a directory that holds none."""
    from transformers import WhisperModel

    check_whisper(directory)
    try:
        loaded: Any = WhisperModel.from_pretrained(directory, output_loading_info=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory}: cannot be loaded ({' '.join(str(error).split())[:200]}); copy it again"
        ) from error
    model, loading = loaded
    missing = [name for name in loading["missing_keys"] if name.startswith("encoder.")]
    if missing:
        raise DataError(f"{directory}: its weights lack {len(missing)} tensors of the encoder, such as {missing[0]}")
    return model.encoder


def check_whisper(directory: Path) -> None:
    """DataError if the directory does not hold a Whisper checkpoint."""
    try:
        check_directory(directory)
        kind = read_json(directory / "config.json").get("model_type")
    except PolicyError as error:
        raise DataError(f"{directory}: no checkpoint of Whisper, such as whisper-tiny ({error})") from None
    if kind != "whisper":
        raise DataError(f"{directory}: holds a {kind} model; expected a Whisper checkpoint, such as whisper-tiny")


def _sinusoids(length: int, channels: int) -> torch.Tensor:
    """Whisper's position embeddings (length, channels): sines, then cosines, of wavelengths 2 pi to 20000 pi."""
    rates = torch.exp(-math.log(10_000) / (channels // 2 - 1) * torch.arange(channels // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
