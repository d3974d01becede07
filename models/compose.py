"""A Qwen2-Audio from a pretrained Whisper encoder, a pretrained language model and a new projector between them.

The result is a Hugging Face checkpoint directory, loaded like that of Qwen2-Audio-7B-Instruct.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hark.data.errors import DataError
from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.loading import load_tokenizer, meta_parameters, read_config
from hark.models.mini import like_whisper, whisper_encoder
from hark.models.policy import PolicyError

AUDIO, AUDIO_BOS, AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"  # Qwen2-Audio's names
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
POSITIONS = 50  # of a Whisper encoder, per second
NOT_OF_QWEN2 = {"model_type", "architectures", "transformers_version"}  # keys of a Llama's config
TOLERANCE = 1e-3  # between logits of the language model alone and inside, relative to the largest

# Put before the language model's own template, which takes the content of a message as one string.
PARTS_TO_TEXT = (
    "{%- set joined = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set joined.messages = joined.messages + [message] -%}{%- else -%}"
    "{%- set text = namespace(value='') -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'audio' -%}"
    f"{{%- set text.value = text.value ~ '{AUDIO_BOS}{AUDIO}{AUDIO_EOS}' -%}}"
    "{%- else -%}{%- set text.value = text.value ~ part['text'] -%}{%- endif -%}{%- endfor -%}"
    "{%- set joined.messages = joined.messages + [{'role': message['role'], 'content': text.value}] -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- set messages = joined.messages %}"
)


class Composed(NamedTuple):
    """What was composed: parameters of its parts, and the language model's tokens that stand for audio."""

    tower: int
    projector: int
    decoder: int  # with its head
    tokens: dict[str, str]  # the name of a token in the checkpoint -> its name in the language model
    family: str  # the decoder's model type


def compose(
    audio: Path, text: Path, out: Path, *, seconds: int = 30, layers: int | None = None, seed: int = 0
) -> Composed:
    """Write a Qwen2-Audio with the encoder of a Whisper checkpoint and a language model; return what it consists of.

    seconds: the longest clip; Whisper's table of positions is cut to it. layers: how many of the language model are
    kept, the first ones; None is all. seed: of the projector's random weights.
    Raises DataError for checkpoints that do not fit together.
    """
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    encoder, decoder = whisper_encoder(audio), language_model(text)
    if layers is not None:
        _cut(decoder, layers, text)
    tokenizer, tokens = _tokenizer(text, decoder)
    positions = POSITIONS * seconds
    if not 0 < positions <= encoder.config.max_source_positions:
        longest = encoder.config.max_source_positions // POSITIONS
        raise DataError(f"--seconds {seconds}: the encoder of {audio} takes clips of 1 to {longest} s")
    model = _model(encoder, positions, decoder, tokenizer.convert_tokens_to_ids(AUDIO), seed)
    _check_text(model, decoder, text)
    model.save_pretrained(out)
    # transformers pads clips to chunk_length seconds, for which the table of positions must suffice.
    extractor = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins, chunk_length=seconds)
    Qwen2AudioProcessor(extractor, tokenizer, chat_template=tokenizer.chat_template).save_pretrained(out)
    parts = (model.model.audio_tower, model.model.multi_modal_projector, model.model.language_model, model.lm_head)
    tower, projector, layers, head = (sum(p.numel() for p in part.parameters()) for part in parts)
    return Composed(tower, projector, layers + head, tokens, model.config.text_config.model_type)


def language_model(directory: Path) -> Any:
    """The causal language model of a Hugging Face directory; DataError if it is none, or not safe to be read."""
    from transformers import AutoModelForCausalLM

    try:
        read_config(directory)
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", use_safetensors=True, trust_remote_code=False
        ).eval()
    except (PolicyError, OSError, ValueError) as error:
        raise DataError(
            f"{directory}: no causal language model of transformers ({' '.join(str(error).split())[:200]}); "
            "expected the directory of an instruction-tuned one, such as SmolLM2-135M-Instruct"
        ) from error


def _cut(decoder: Any, layers: int, directory: Path) -> None:
    """Keep the first layers of a language model alone."""
    config, model = decoder.config, decoder.base_model
    if not 0 < layers <= len(model.layers):
        raise DataError(f"--layers {layers}: the language model of {directory} has 1 to {len(model.layers)} to keep")
    model.layers, config.num_hidden_layers = model.layers[:layers], layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _tokenizer(directory: Path, decoder: Any) -> tuple[Any, dict[str, str]]:
    """The tokenizer with three unused special tokens renamed to Qwen2-Audio's, and their old names."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    old = load_tokenizer(directory)
    if not isinstance(old.chat_template, str):
        raise DataError(
            f"{directory}: its tokenizer has no chat template; expected an instruction-tuned model, whose "
            "tokenizer_config.json or chat_template.jinja holds one"
        )
    if not old.is_fast:
        raise DataError(f"{directory}: its tokenizer has no tokenizer.json; save it with a fast tokenizer first")
    names = dict(zip(_spare_tokens(old, decoder, directory), _missing(old), strict=True))
    new = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_renamed(old.backend_tokenizer.to_str(), names)),
        **{name: token for name in ROLES if (token := getattr(old, name, None)) is not None},
        extra_special_tokens={"audio_token": AUDIO, "audio_bos_token": AUDIO_BOS, "audio_eos_token": AUDIO_EOS},
        clean_up_tokenization_spaces=False,
        chat_template=PARTS_TO_TEXT + old.chat_template,
    )
    return new, {new_name: old_name for old_name, new_name in names.items()}


def _missing(tokenizer: Any) -> list[str]:
    """The names of Qwen2-Audio's audio tokens that a tokenizer does not have."""
    return [name for name in (AUDIO, AUDIO_BOS, AUDIO_EOS) if name not in tokenizer.get_vocab()]


def _spare_tokens(tokenizer: Any, decoder: Any, directory: Path) -> list[str]:
    """Special tokens that neither the chat template nor generation uses, as many as are needed; reserved ones first."""
    stop = decoder.generation_config.eos_token_id
    stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
    used = {getattr(tokenizer, name, None) for name in ROLES} | set(tokenizer.convert_ids_to_tokens(stops))
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for token in special if token not in used and token not in tokenizer.chat_template]
    spare.sort(key=lambda token: not ("reserved" in token or "unused" in token))
    needed = len(_missing(tokenizer))
    if len(spare) < needed:
        raise DataError(
            f"{directory}: {len(spare)} special tokens are not in use ({', '.join(spare) or 'none'}); audio needs "
            f"{needed}; choose another language model, or add special tokens to this one and resize its embeddings"
        )
    return spare[:needed]


def _renamed(tokenizer: str, names: dict[str, str]) -> str:
    """A tokenizer.json with some of its tokens renamed; their ids stay."""
    content = json.loads(tokenizer)
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        content["model"]["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
    elif vocabulary is not None:  # of a unigram model: pairs of token and score
        content["model"]["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    return json.dumps(content, ensure_ascii=False)


def _as_qwen2(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The config and the weights of a decoder; those of a Llama as a Qwen2 whose biases are 0, which is the same.

    vLLM runs the decoder of every Qwen2-Audio as a Qwen2.
    """
    from transformers import Qwen2Config

    config, weights = model.config, dict(model.base_model.state_dict())
    plain = not (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))
    if config.model_type != "llama" or not plain or config.head_dim * config.num_attention_heads != config.hidden_size:
        return config, weights
    for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        weights[name.removesuffix("weight") + "bias"] = weights[name].new_zeros(len(weights[name]))
    own = config.to_dict()
    kept = {key: own[key] for key in Qwen2Config().to_dict() if key in own and key not in NOT_OF_QWEN2}
    return Qwen2Config(**kept), weights


def _model(encoder: Any, positions: int, decoder: Any, audio_id: int, seed: int) -> Any:
    """The whole model with all of its weights."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    text_config, weights = _as_qwen2(decoder)
    head = decoder.get_output_embeddings().weight
    config = Qwen2AudioConfig(
        audio_config=like_whisper(encoder.config) | {"max_source_positions": positions},
        # transformers 5 ties nothing in a Qwen2-Audio: the head of a tied model is saved as a copy.
        text_config=text_config.to_dict() | {"tie_word_embeddings": False},
        audio_token_index=audio_id,
        dtype=head.dtype,
    )
    with meta_parameters():
        model = Qwen2AudioForConditionalGeneration(config).eval()
    tower = {name: tensor.to(head.dtype) for name, tensor in encoder.state_dict().items()}
    tower["embed_positions.weight"] = tower["embed_positions.weight"][:positions].clone()
    model.model.audio_tower.load_state_dict(tower, assign=True)
    model.model.language_model.load_state_dict(weights, assign=True)
    model.lm_head.load_state_dict({"weight": head.detach().clone()}, assign=True)
    model.model.multi_modal_projector.load_state_dict(_projector(model, seed), assign=True)
    model.generation_config = decoder.generation_config
    return model


def _projector(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """Random weights of a scale at which audio embeddings are on average as long as the embeddings of tokens.

    The length of the encoder's outputs follows from its last layer norm.
    """
    norm, tokens = model.model.audio_tower.layer_norm, model.model.language_model.get_input_embeddings().weight
    length = (norm.weight.float().square() + norm.bias.float().square()).sum().sqrt()
    scale = tokens.float().square().mean().sqrt() / length
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(tokens.shape[1], norm.weight.shape[0], generator=generator) * scale
    return {"linear.weight": weight.to(tokens.dtype), "linear.bias": torch.zeros(tokens.shape[1], dtype=tokens.dtype)}


@torch.no_grad()
def _check_text(model: Any, decoder: Any, directory: Path) -> None:
    """DataError if the decoder inside gives other logits than alone: its head does more than Qwen2-Audio's."""
    ids = torch.arange(min(16, decoder.config.vocab_size))[None]
    alone, inside = decoder(input_ids=ids).logits, model(input_ids=ids).logits
    difference = (alone - inside).abs().max().item()
    if not difference <= TOLERANCE * alone.abs().max().item():
        raise DataError(
            f"{directory}: its logits differ by {difference:.2g} inside a Qwen2-Audio, whose head is a matrix product "
            f"without scale, cap or bias; {type(decoder).__name__} cannot be composed; choose a Llama or a Qwen2"
        )
