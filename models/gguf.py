"""A language model of llama.cpp, a GGUF file, as a Hugging Face directory.

The file holds, little-endian: "GGUF", a version, the numbers of tensors and of settings; the settings, each a name, a
type and a value; of each tensor its name, shape, type and place; then the weights. What it promises is compared with
its size before transformers reads it, because transformers' reader goes on for as long as a length in the file says.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import torch

from hark import UserError
from hark.data.errors import DataError
from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.directory import in_short

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type
TEXT, LIST = 8, 9  # the other types
MOST_SETTINGS, MOST_TENSORS, MOST_DIMENSIONS = 1 << 12, 1 << 16, 4
LONGEST_NAME, LONGEST_TEXT = 1 << 10, 1 << 20  # bytes of a name, and of a text, such as a chat template
MOST_ITEMS = 1 << 22  # of a list; a vocabulary has at most 262,144 tokens
MOST_LAYERS = 1024
SPARE = 1.5  # a model has at most so many times the weights of its file; the output layer may be a copy


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def import_gguf(source: Path, out: Path) -> int:
    """Write the model and the tokenizer of a GGUF file to `out` in float32; return the number of parameters.

    Quantised weights are written as what they stand for. Raises DataError for a file that transformers cannot read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    weights_in_file = check_header(source)
    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
        _check_config(source, config, weights_in_file)
        stored = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    except UserError:
        raise
    except ImportError as error:
        raise DataError(f"{source}: reading GGUF needs two more packages: pip install gguf accelerate") from error
    except Exception as error:  # its readers raise any kind for a file that is damaged
        raise DataError(f"{source}: transformers cannot read it ({in_short(error)})") from error
    # A model that was read from GGUF refuses to be saved, so its weights go to one that is not marked as such.
    weights, config = stored.state_dict(), stored.config
    broken = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if broken:
        raise DataError(f"{source}: {in_short(broken)} holds a value that is not finite; copy the file again")
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(weights)
    model.generation_config = stored.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model.num_parameters()


def _check_config(source: Path, config: object, weights_in_file: int) -> None:
    """Raise DataError for a config that asks for more layers or weights than the file can have."""
    from transformers import AutoModelForCausalLM

    layers = getattr(config, "num_hidden_layers", 0)
    if layers > MOST_LAYERS:
        raise DataError(f"{source}: has {in_short(layers)} layers; expected at most {MOST_LAYERS}")
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
    if count > SPARE * weights_in_file:
        raise DataError(f"{source}: its settings are of {count} weights, and it holds {weights_in_file}; copy it again")


def check_header(path: Path) -> int:
    """The number of weights that a GGUF file promises. Raises DataError if it promises what it cannot hold."""
    try:
        with path.open("rb") as file:
            return Header(file).check()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
    except (EOFError, ValueError) as error:
        reason = str(error) or "it ends too early"
        raise DataError(f"{path}: transformers cannot read it ({reason}); copy it again") from error


class Header:
    """Reads what stands before the weights, and keeps nothing of it. Raises EOFError or ValueError."""

    def __init__(self, file: BinaryIO):
        self._file, self._left = file, os.fstat(file.fileno()).st_size

    def check(self) -> int:
        """The number of weights of all tensors."""
        self._skip(len(MAGIC))
        version = self._number(4)
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}; expected {' or '.join(map(str, VERSIONS))}")
        tensors = self._number(8, MOST_TENSORS, "tensors")
        for _ in range(self._number(8, MOST_SETTINGS, "settings")):
            self._skip(self._number(8, LONGEST_NAME, "bytes in a name"))
            self._value(self._number(4))
        return sum(self._tensor() for _ in range(tensors))

    def _value(self, kind: int) -> None:
        if kind == TEXT:
            self._skip(self._number(8, LONGEST_TEXT, "bytes in a text"))
        elif kind == LIST:
            kind, count = self._number(4), self._number(8, MOST_ITEMS, "items in a list")
            if kind == TEXT:
                for _ in range(count):
                    self._value(kind)
            else:
                self._skip(count * self._size(kind))  # a list in a list is in no model
        else:
            self._skip(self._size(kind))

    def _tensor(self) -> int:
        self._skip(self._number(8, LONGEST_NAME, "bytes in a name"))
        dimensions = self._number(4, MOST_DIMENSIONS, "dimensions")
        weights = 1
        for _ in range(dimensions):
            weights *= self._number(8)
        if weights > 8 * os.fstat(self._file.fileno()).st_size:  # the smallest types have about 1.5 bits a weight
            raise ValueError(f"a tensor of {weights} weights is larger than the file")
        self._skip(4 + 8)  # its type and its place
        return weights

    def _size(self, kind: int) -> int:
        if kind not in SIZES:
            raise ValueError(f"a setting has the type {kind}")
        return SIZES[kind]

    def _number(self, size: int, most: int = 1 << 63, what: str = "") -> int:
        if size > self._left:
            raise EOFError
        self._left -= size
        value = int.from_bytes(self._file.read(size), "little")
        if value > most:
            raise ValueError(f"it has {value} {what}; expected at most {most}")
        return value

    def _skip(self, size: int) -> None:
        if size > self._left:
            raise EOFError
        self._left -= size
        self._file.seek(size, os.SEEK_CUR)
