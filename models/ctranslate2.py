"""A Whisper checkpoint of CTranslate2 (the format of faster-whisper) as a Hugging Face directory.

model.bin holds, little-endian: the version 6, the name of the model, its revision, the number of tensors, and for each
its name, shape, type and bytes; then names that stand for other tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hark import UserError
from hark.data.errors import DataError
from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.directory import check_directory, in_short, read_json

VERSION = 6
MOST_DIMENSIONS, MOST_LAYERS, MOST_TOKENS = 4, 256, 1 << 20  # of a Whisper; the largest has 32 layers
MULTILINGUAL_START = 50258  # the id of <|startoftranscript|>; English models have one token less before it
DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}

# Names in CTranslate2 -> in transformers. The projections of an attention are one tensor there: see PROJECTIONS.
NAMES = (
    (r"layer_(\d+)/", r"layers/\1/"),
    (r"self_attention/layer_norm", "self_attn_layer_norm"),
    (r"(\d)/attention/layer_norm", r"\1/encoder_attn_layer_norm"),
    (r"ffn/layer_norm", "final_layer_norm"),
    (r"ffn/linear_0", "fc1"),
    (r"ffn/linear_1", "fc2"),
    (r"self_attention/", "self_attn/"),
    (r"(\d)/attention/", r"\1/encoder_attn/"),
    (r"embeddings/weight", "embed_tokens/weight"),
    (r"position_encodings/encodings", "embed_positions/weight"),
    (r"gamma$", "weight"),
    (r"beta$", "bias"),
)
PROJECTIONS = {
    "self_attn/linear_0": ("q_proj", "k_proj", "v_proj"),
    "self_attn/linear_1": ("out_proj",),
    "encoder_attn/linear_0": ("q_proj",),
    "encoder_attn/linear_1": ("k_proj", "v_proj"),
    "encoder_attn/linear_2": ("out_proj",),
}


def import_whisper(source: Path, out: Path) -> int:
    """Write the Whisper of a CTranslate2 directory to `out` in float32; return its number of parameters.

    Raises DataError for a directory that holds another model, or quantised weights.
    """
    from transformers import WhisperFeatureExtractor

    check_directory(source)
    if not (source / "tokenizer.json").exists():
        raise DataError(f"{source}: has no tokenizer.json; copy that of the same Whisper from its Hugging Face page")
    stored = read_tensors(source / "model.bin")
    tokenizer, settings = (read_json(source / name) for name in ("tokenizer.json", "config.json"))
    try:
        model = _model(source, stored, tokenizer, settings)
    except UserError:
        raise
    except Exception as error:  # whatever values of other kinds, or that do not agree, lead to
        reason = in_short(f"{type(error).__name__} {error}")
        raise DataError(f"{source}: not a Whisper that can be converted ({reason}); copy it again") from error
    model.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(out)
    shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", **end}))
    return model.num_parameters()


def _model(source: Path, stored: dict[str, torch.Tensor], tokenizer: dict, settings: dict) -> Any:
    from transformers import WhisperForConditionalGeneration

    tokens = {str(token["content"]): _id(token["id"]) for token in tokenizer["added_tokens"]}
    weights = dict(_renamed(stored))
    config = _config(weights, stored, tokens)
    with torch.device("meta"):  # so that sizes that do not agree take no memory
        model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if set(missing) != {"proj_out.weight"} or unexpected:  # the head is the table of embeddings
        raise DataError(f"{source}: tensors do not fit a Whisper: missing {missing[:3]}, unknown {unexpected[:3]}")
    model.tie_weights()
    model.generation_config = _generation(config, settings, tokens)
    return model


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MOST_TOKENS:
        raise ValueError(f"the id of a token is {in_short(value)}")
    return value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model.bin; DataError for a file that is not one of a Whisper."""
    name = "its beginning"
    try:
        with path.open("rb") as file:
            version = _number(file, 4)
            kind = _text(file) if version == VERSION else ""
            if kind != "WhisperSpec":
                found = repr(in_short(kind)) if kind else version
                raise DataError(f"{path}: expected a Whisper of CTranslate2, format {VERSION}; this is {found}")
            _number(file, 4)  # the revision of the model's names
            stored: dict[str, torch.Tensor] = {}
            for _ in range(_number(file, 4)):
                name = _text(file)
                stored[name] = _tensor(file)
            return stored
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
    except EOFError:
        raise DataError(f"{path}: cannot be read at {in_short(name)}; is the file complete?") from None


def _tensor(file: BinaryIO) -> torch.Tensor:
    shape = [_number(file, 4) for _ in range(_number(file, 1))]
    dtype = DTYPES.get(_number(file, 1))
    size = _number(file, 4)
    if dtype is None or size != dtype.itemsize * math.prod(shape) or len(shape) > MOST_DIMENSIONS or not size:
        raise EOFError
    return torch.frombuffer(bytearray(_read(file, size)), dtype=dtype).reshape(shape)


def _read(file: BinaryIO, size: int) -> bytes:
    """The next bytes; EOFError if the file has fewer. What a file promises is compared with its size, not allocated."""
    if size > os.fstat(file.fileno()).st_size - file.tell():
        raise EOFError
    return file.read(size)


def _number(file: BinaryIO, size: int) -> int:
    return int.from_bytes(_read(file, size), "little")


def _text(file: BinaryIO) -> str:
    """A name: its length, and its characters with a final zero."""
    return _read(file, _number(file, 2))[:-1].decode(errors="replace")


def _renamed(stored: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under the names of transformers."""
    for name, tensor in stored.items():
        if tensor.dim() == 0 or not name.startswith(("encoder/", "decoder/")) or "/alignment_" in name:
            continue  # settings
        if not tensor.dtype.is_floating_point:
            name = in_short(name)
            raise DataError(f"{name} is quantised ({tensor.dtype}); expected a float16 or float32 conversion")
        if not tensor.isfinite().all():
            raise DataError(f"{in_short(name)} holds a value that is not finite; copy model.bin again")
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        module, _, kind = name.rpartition("/")
        attention = next((key for key in PROJECTIONS if module.endswith(key)), None)
        for part, weight in _parts(module, attention, tensor.float()):
            if not (part.endswith("k_proj") and kind == "bias"):  # Whisper's keys have no bias: zeros here
                yield f"model.{part}.{kind}".replace("/", "."), weight


def _parts(module: str, attention: str | None, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if attention is None:
        return [(module, tensor)]
    names = PROJECTIONS[attention]
    parent = module.rpartition("/")[0]
    return [(f"{parent}/{name}", part.contiguous()) for name, part in zip(names, tensor.chunk(len(names)), strict=True)]


def _config(weights: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], tokens: dict[str, int]) -> Any:
    """The config that the shapes of the weights and the numbers of heads give."""
    from transformers import WhisperConfig

    sizes: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        layers = {name.split(".")[3] for name in weights if name.startswith(f"model.{part}.layers.")}
        if len(layers) > MOST_LAYERS:
            raise DataError(f"model.bin has {len(layers)} layers of the {part}; expected at most {MOST_LAYERS}")
        sizes[f"{part}_layers"] = len(layers)
        sizes[f"{part}_ffn_dim"] = len(weights[f"model.{part}.layers.0.fc1.weight"])
        sizes[f"{part}_attention_heads"] = int(stored[f"{part}/num_heads"])
    vocabulary, width = weights["model.decoder.embed_tokens.weight"].shape
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokens["<|endoftext|>"])
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        max_source_positions=len(weights["model.encoder.embed_positions.weight"]),
        max_target_positions=len(weights["model.decoder.embed_positions.weight"]),
        decoder_start_token_id=tokens["<|startoftranscript|>"],
        **sizes,
    )


def _generation(config: Any, settings: dict, tokens: dict[str, int]) -> Any:
    """What Whisper's `generate` needs: its special tokens, suppressed tokens, languages and tasks."""
    from transformers import GenerationConfig

    more: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), config.eos_token_id)
    multilingual = tokens["<|startoftranscript|>"] == MULTILINGUAL_START
    if multilingual:
        languages = settings.get("lang_ids") or []
        more["lang_to_id"] = {token: index for token, index in tokens.items() if index in languages}
        more["task_to_id"] = {task: tokens[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return GenerationConfig(
        suppress_tokens=settings.get("suppress_ids"),
        begin_suppress_tokens=settings.get("suppress_ids_begin"),
        alignment_heads=settings.get("alignment_heads"),
        no_timestamps_token_id=tokens["<|notimestamps|>"],
        is_multilingual=multilingual,
        max_length=config.max_target_positions,
        decoder_start_token_id=config.decoder_start_token_id,
        **more,
    )
