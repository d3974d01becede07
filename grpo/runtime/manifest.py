"""The manifest of a checkpoint: its files with size and digest, and where in them each tensor is.

It is a JSON file with a digest of itself, written after all other files. Nothing in it is executed, and what it says is
checked before it is used, because a checkpoint may come from anywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hark.files import sync, write_whole
from hark.limits import is_plain

NAME = "hark.json"
LARGEST = 2**26  # bytes of a manifest that are read; that of 7 B parameters on 64 ranks has 4 MB
FILE_NAME = re.compile(r"[A-Za-z0-9_.]+-[0-9]{5}-of-[0-9]{5}\.safetensors")  # in the checkpoint's own directory
BLOCK = 2**22  # bytes hashed at a time

Shape = tuple[int, ...]


class DamageError(Exception):
    """A checkpoint whose files are not those that were written. The message names the file."""


@dataclass(frozen=True)
class File:
    """The size in bytes and the SHA-256 of a file."""

    size: int
    sha256: str

    @staticmethod
    def of(path: Path) -> File:
        """Those of a file as it is now."""
        return File(path.stat().st_size, sha256_of(path))


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: the file that holds it under the tensor's name, its first index, and its shape."""

    file: str
    offset: Shape
    shape: Shape


@dataclass(frozen=True)
class Tensor:
    """The shape of a whole tensor, and the pieces of which it consists."""

    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    model: the shape of every tensor of the policy's model, by which another model is recognised. tensors: what is
    saved, by part and name. state: values that the learner needs to go on. about: the run that wrote it.
    """

    step: int
    model: dict[str, list[int]]
    files: dict[str, File]
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write the manifest of a checkpoint; the old one is there until the new one is on the disk."""
        write_whole(directory / NAME, signed(dataclasses.asdict(self)))
        sync(directory)

    @staticmethod
    def read(checkpoint: Path) -> Manifest:
        """The manifest of a checkpoint. Raises DamageError if it is not as it was written, or is not that of its name.

        Only the manifest is read; see `File` for the other files.
        """
        path = checkpoint / NAME
        try:
            if not is_plain(path, LARGEST):
                raise DamageError(f"{NAME} is not a file of at most {LARGEST >> 20} MB")
            manifest = _manifest(**unsigned(path.read_bytes(), NAME))
        except OSError as error:
            raise DamageError(f"{NAME} cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError) as error:
            raise DamageError(f"{NAME} is no manifest ({type(error).__name__})") from error
        if checkpoint.name != name_of(manifest.step):
            raise DamageError(f"{NAME} is that of step {manifest.step}")
        return manifest


def name_of(step: int) -> str:
    """The name of the directory of a checkpoint after `step` finished steps."""
    return f"step-{step:06d}"


def check_size(path: Path, file: File) -> None:
    """Raise DamageError if a file is missing, is no plain file, or has another size."""
    if not path.is_file() or path.is_symlink():
        raise DamageError(f"{path.name} is missing")
    if path.stat().st_size != file.size:
        raise DamageError(f"{path.name} has {path.stat().st_size} bytes instead of {file.size}")


def check_digest(path: Path, file: File) -> None:
    """Raise DamageError if a file has other contents than those that were written."""
    if sha256_of(path) != file.sha256:
        raise DamageError(f"{path.name} does not agree with its digest")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file. The interpreter's lock is free meanwhile."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(BLOCK))
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def signed(body: dict[str, Any]) -> bytes:
    """The bytes of a file of JSON with a digest of itself: its values and their digest."""
    return _encoded(body | {"sha256": _digest(body)})


def unsigned(raw: bytes, name: str) -> dict[str, Any]:
    """The values of such a file. Raises DamageError if it is not as it was written; ValueError and others for no JSON.

    name: of the file, for the message.
    """
    values = json.loads(raw)
    body = {key: value for key, value in values.items() if key != "sha256"}
    # The bytes are compared, not only the values: so each byte is covered.
    if raw != _encoded(values) or values.get("sha256") != _digest(body):
        raise DamageError(f"{name} does not agree with its own digest")
    return body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_encoded(body)).hexdigest()


def _encoded(values: dict[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode()


def _manifest(*, step: Any, model: Any, files: Any, tensors: Any, state: Any, about: Any) -> Manifest:
    """The manifest of decoded JSON. Raises what `Manifest.read` takes for damage if it is not one."""
    if not all(isinstance(part, dict) for part in (model, files, tensors, state, about)):
        raise TypeError("an object was expected")
    _check_kinds(state, about)
    known = {_file_name(name): File(_count(file["size"]), str(file["sha256"])) for name, file in files.items()}
    return Manifest(
        step=_count(step),
        model={str(name): list(_shape(shape)) for name, shape in model.items()},
        files=known,
        tensors={
            str(part): {str(name): _tensor(values, known) for name, values in group.items()}
            for part, group in tensors.items()
        },
        state=state,
        about=about,
    )


def _check_kinds(state: dict[str, Any], about: dict[str, Any]) -> None:
    """Raise TypeError, AttributeError or OverflowError for what a resume uses if it is of another kind than written.

    Each may be missing: other learners have another state, and an older checkpoint says less.
    """
    sections, figures = about.get("config", {}), about.get("validation", {})
    digests = [about.get(kind, {}) for kind in ("data", "model", "own_files")]
    if not all(isinstance(part, dict) for part in (*sections.values(), *digests)):
        raise TypeError("an object was expected")
    if not isinstance(about.get("clips", ""), str):
        raise TypeError("a text was expected")
    for names in (state.get("lost", []), about.get("left_out", [])):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("a list of names was expected")
    numbers = [state.get("beta", 0.0), *(figure for figure in figures.values() if figure is not None)]
    for step, share in state.get("failing", []):
        _count(step)
        numbers.append(share)
    for number in numbers:
        if type(number) not in (int, float) or not math.isfinite(number):
            raise TypeError("a number was expected")
    for count in (state.get("skipped", 0), state.get("cursor") or 0, about.get("ranks", 1)):
        _count(count)


def _tensor(values: Any, files: dict[str, File]) -> Tensor:
    shape = _shape(values["shape"])
    pieces = tuple(_piece(piece, shape, files) for piece in values["pieces"])
    if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
        raise ValueError("the pieces of a tensor do not make the whole")
    return Tensor(shape, pieces)


def _piece(values: Any, whole: Shape, files: dict[str, File]) -> Piece:
    offset, shape = _shape(values["offset"]), _shape(values["shape"])
    if values["file"] not in files or len(offset) != len(whole) or len(shape) != len(whole):
        raise ValueError("a piece of a tensor is in no file, or has another number of dimensions")
    if any(first + size > limit for first, size, limit in zip(offset, shape, whole, strict=True)):
        raise ValueError("a piece of a tensor ends outside it")
    return Piece(values["file"], offset, shape)


def _shape(values: Any) -> Shape:
    return tuple(_count(value) for value in values)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("a count was expected")
    return value


def _file_name(name: str) -> str:
    if not FILE_NAME.fullmatch(name):
        raise ValueError("a file with such a name is not part of a checkpoint")
    return name
