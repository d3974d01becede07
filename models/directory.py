"""What is read of a model directory: ordinary files inside it, of a sensible size.

A model directory is often somebody else's. A link in it could name any file of its reader, a pipe would never end, and
a device has no size. Its settings could name code and files elsewhere, which transformers would use.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hark.limits import is_plain
from hark.models.policy import PolicyError
from hark.shown import shown

# Endings of weights, which are read tensor by tensor and never copied: an export writes them anew.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".h5", ".msgpack", ".onnx", ".ckpt")
LARGEST_FILE = 256 << 20  # bytes of any other file; the largest tokenizers have 40 MB
DIGESTS = "hark.json"  # of an export: the sizes and SHA-256 of its own files, which are not those of a copy
TEMPLATES = "additional_chat_templates"  # a directory of templates, which transformers reads with the tokenizer
# The files of settings in which transformers looks for the names of code and of other files.
SETTINGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
IMPLEMENTATION = re.compile(
    r"_?(attn|experts)_implementation(_internal)?"
)  # may name a kernel on the hub, which is code
LONGEST_REASON = 200  # characters of what a library says of a file, in an error message


def check_directory(directory: Path) -> None:
    """Raise PolicyError if a model directory is not safe to be read by transformers.

    Its files must be ordinary ones inside it, of a sensible size, and its settings must not name others.
    """
    for path in (*_entries(directory), *_entries(directory / TEMPLATES)):
        _check(path, directory)
    for path in (directory / name for name in SETTINGS):
        if path.exists():
            _check_settings(path, read_json(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model. Raises PolicyError for a file that is none, or too large."""
    try:
        if not is_plain(path, LARGEST_FILE):
            raise PolicyError(f"{path}: not a JSON file of at most {LARGEST_FILE >> 20} MB; copy it again")
        value = json.loads(path.read_bytes())
    except PolicyError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or too many digits
        raise PolicyError(f"{path}: not readable as JSON ({in_short(error)}); copy it again") from error
    if not isinstance(value, dict):
        raise PolicyError(f"{path}: is a JSON {type(value).__name__}; expected an object; copy it again")
    return value


def in_short(error: object) -> str:
    """What an error says, or a value, on one line of limited length."""
    return shown(" ".join((str(error) or type(error).__name__).split()), LONGEST_REASON)


def files_to_copy(directory: Path) -> list[Path]:
    """The files of a model directory that its copy needs beside the weights: config, tokenizer, processor, licence.

    Raises PolicyError as `check_directory` does, before anything is copied.
    """
    check_directory(directory)
    others = (*WEIGHT_SUFFIXES, DIGESTS)
    return [path for path in _entries(directory) if path.is_file() and not path.name.endswith(others)]


def inside(path: Path, directory: Path) -> bool:
    """Whether a path, its links resolved, is inside a directory, or is a blob of its repository in the hub's cache.

    The cache keeps a model in REPOSITORY/snapshots/REVISION, whose files are links to REPOSITORY/blobs.
    """
    whole, real = path.resolve(), directory.resolve()
    if whole.is_relative_to(real):
        return True
    is_snapshot = real.parent.name == "snapshots" and real.parents[1].name.startswith("models--")
    return is_snapshot and whole.is_relative_to(real.parents[1] / "blobs")


def _entries(directory: Path) -> Iterator[Path]:
    try:
        yield from sorted(directory.iterdir()) if directory.is_dir() else ()
    except OSError as error:
        raise PolicyError(f"{directory}: cannot be read ({error.strerror}); check its permissions") from error


def _check(path: Path, directory: Path) -> None:
    try:
        if not inside(path, directory):
            raise PolicyError(f"{path}: a link that leaves the model directory; expected a file; copy the file there")
        status = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that form a circle, before Python 3.13
        raise PolicyError(f"{path}: cannot be read ({error}); expected a file; copy it again") from error
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise PolicyError(f"{path}: a pipe, a socket or a device; expected a file; delete it")
    if status.st_size > LARGEST_FILE and not path.name.endswith(WEIGHT_SUFFIXES):
        raise PolicyError(
            f"{path}: has {status.st_size >> 20} MB; expected at most {LARGEST_FILE >> 20} MB for a file that holds no "
            "weights; delete it if the model does not need it"
        )


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse settings by which transformers would read another directory, or load code from the hub."""
    if "audio_tokenizer" in settings:
        raise PolicyError(f"{path}: audio_tokenizer names another model to load; no policy uses one; delete the key")
    names = settings.get("fast_tokenizer_files") or ()
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise PolicyError(f"{path}: fast_tokenizer_files must name files of the directory; delete the key")
    for key, value in pairs(settings):
        if IMPLEMENTATION.fullmatch(key) and "/" in str(value):
            raise PolicyError(
                f"{path}: {key} is {in_short(value)!r}, code on the hub, which is not run; delete the key"
            )


def pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """The keys and values of an object and of those within it."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield str(key), inner
        yield from pairs(inner)
