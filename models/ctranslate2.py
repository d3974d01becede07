"""A Whisper checkpoint of CTranslate2 (the format of faster-whisper) as a Hugging Face directory.

model.bin holds, little-endian: the version 6, the name of the model, its revision, the number of tensors, and for each
its name, shape, type and bytes; then names that stand for other tensors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hark.data.errors import DataError
from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)

VERSION = 6
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
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    if not (source / "tokenizer.json").exists():
        raise DataError(f"{source}: has no tokenizer.json; copy that of the same Whisper from its Hugging Face page")
    stored = read_tensors(source / "model.bin")
    tokens = {token["content"]: token["id"] for token in _json(source / "tokenizer.json")["added_tokens"]}
    weights = dict(_renamed(stored))
    model = WhisperForConditionalGeneration(_config(weights, stored, tokens))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if set(missing) != {"proj_out.weight"} or unexpected:  # the head is the table of embeddings
        raise DataError(f"{source}: tensors do not fit a Whisper: missing {missing[:3]}, unknown {unexpected[:3]}")
    model.generation_config = _generation(model.config, _json(source / "config.json"), tokens)
    model.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(out)
    shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", **end}))
    return model.num_parameters()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model.bin; DataError for a file that is not one of a Whisper."""
    with path.open("rb") as file:
        version = _number(file, 4)
        name = _text(file) if version == VERSION else None
        if name != "WhisperSpec":
            raise DataError(f"{path}: expected a Whisper of CTranslate2, format {VERSION}; this is {name or version!r}")
        _number(file, 4)  # the revision of the model's names
        return dict(_tensor(file, path) for _ in range(_number(file, 4)))


def _tensor(file: BinaryIO, path: Path) -> tuple[str, torch.Tensor]:
    name = _text(file)
    shape = [_number(file, 4) for _ in range(_number(file, 1))]
    dtype = DTYPES.get(_number(file, 1))
    content = bytearray(file.read(_number(file, 4)))
    if dtype is None or len(content) != dtype.itemsize * torch.Size(shape).numel():
        raise DataError(f"{path}: cannot be read at {name}; is the file complete?")
    return name, torch.frombuffer(content, dtype=dtype).reshape(shape)


def _number(file: BinaryIO, size: int) -> int:
    return int.from_bytes(file.read(size), "little")


def _text(file: BinaryIO) -> str:
    """A name: its length, and its characters with a final zero."""
    return file.read(_number(file, 2))[:-1].decode(errors="replace")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); copy it again") from error


def _renamed(stored: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under the names of transformers."""
    for name, tensor in stored.items():
        if tensor.dim() == 0 or not name.startswith(("encoder/", "decoder/")) or "/alignment_" in name:
            continue  # settings
        if not tensor.dtype.is_floating_point:
            raise DataError(f"{name} is quantised ({tensor.dtype}); expected a float16 or float32 conversion")
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
