"""What is read of a model directory: ordinary files inside it, of a sensible size.

A model directory is often somebody else's. A link in it could name any file of its reader, a pipe would never end, and
a device has no size.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from hark.models.policy import PolicyError

# Endings of weights, which are read tensor by tensor and never copied: an export writes them anew.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".h5", ".msgpack", ".onnx", ".ckpt")
LARGEST_FILE = 256 << 20  # bytes of any other file; the largest tokenizers have 40 MB
TEMPLATES = "additional_chat_templates"  # a directory of templates, which transformers reads with the tokenizer


def check_directory(directory: Path) -> None:
    """Raise PolicyError if a file of a model directory leaves it, is a pipe, a socket or a device, or is too large."""
    for path in (*_entries(directory), *_entries(directory / TEMPLATES)):
        _check(path, directory)


def files_to_copy(directory: Path) -> list[Path]:
    """The files of a model directory that its copy needs beside the weights: config, tokenizer, processor, licence.

    Raises PolicyError as `check_directory` does, before anything is copied.
    """
    check_directory(directory)
    return [path for path in _entries(directory) if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES)]


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
