"""Changes that make a damaged or hostile file out of a good one: of bytes, of values in JSON, of tensors, of files.

Every change is drawn from a `random.Random`, so that an input is known by its number.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hark.launch.common.plain_yaml import plain_yaml

MOST = 1 << 20  # bytes that repetitions add to a file
HOLE = (
    600 << 20
)  # bytes of a file without content: more than any file but weights may have, less than the bound of memory
LENGTH = struct.Struct("<Q")  # of the header of a safetensors file
# Texts that have broken readers: control characters, separators, markup, paths, numbers that are none, expansion.
TEXTS = (
    b"", b"\0", b"\n", b"\r", b"\x1b[2J", b"\xff\xfe", b"\xed\xa0\x80", "\u2028".encode(), b"'", b'"',
    "\u202e".encode(), b"</script>",
    b"../../etc/passwd", b"/dev/zero", b"[" * 2000, b"{" * 2000, b'{"a":' * 500, b"9" * 5000,
    b"1e999",
    b"-1", b"NaN", b"-Infinity", b"null", b"\\ud800", b"&a [*a, *a]", b"!!python/object/apply:os.system [x]", b"%s%n",
    b"{{ 1 }}", b"{% for i in range(99999999) %}{% endfor %}", b"x" * 3000, b"RIFF", b"OggS", b"fLaC", b"PAR1",
)  # fmt: skip
# Values in the place of any other.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e-320, 1e300, float("nan"), float("inf"), 2**31, 2**53 + 1, 2**63,
    -(2**63), 10**30, "", " ", "x", "0", "-1", "nan", "\0", "\x1b[2J", "\u2028", "\ud800", "/dev/zero",
    "../../etc/passwd", "a" * 5000, "<b>", [], {}, [None], [[]], [{}], {"": None}, {"a": []}, [1, 2, 3], [0.5, "x"],
)  # fmt: skip
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63, 2**64 - 1)


# Bytes ----------------------------------------------------------------------------------------------------------------


def of_bytes(content: bytes, chance: random.Random) -> bytes:
    """One or several changes of bytes, half of them near the beginning, where headers are."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        chance.choice(BYTES)(changed, _place(changed, chance), chance)
    return bytes(changed)


def _place(content: bytearray, chance: random.Random) -> int:
    end = len(content) + 1
    return chance.randrange(min(end, 256) if chance.random() < 0.5 else end)


def _flip(content: bytearray, at: int, chance: random.Random) -> None:
    if at < len(content):
        content[at] ^= 1 << chance.randrange(8)


def _byte(content: bytearray, at: int, chance: random.Random) -> None:
    content[at : at + 1] = bytes([chance.randrange(256)])


def _number(content: bytearray, at: int, chance: random.Random) -> None:
    size = chance.choice((1, 2, 4, 8))
    number = chance.choice(NUMBERS) % 256**size
    content[at : at + size] = number.to_bytes(size, chance.choice(("little", "big")))


def _lost(content: bytearray, at: int, chance: random.Random) -> None:
    del content[at : at + chance.choice((1, 4, 64, 1024))]


def _repeated(content: bytearray, at: int, chance: random.Random) -> None:
    piece = content[at : at + chance.choice((1, 16, 256))]
    content[at:at] = piece * min(chance.choice((1, 4, 1000)), MOST // max(len(piece), 1))


def _inserted(content: bytearray, at: int, chance: random.Random) -> None:
    content[at:at] = chance.choice(TEXTS) if chance.random() < 0.7 else chance.randbytes(chance.choice((1, 8, 100)))


def _cut(content: bytearray, at: int, chance: random.Random) -> None:
    del content[at:]


def _moved(content: bytearray, at: int, chance: random.Random) -> None:
    size, to = chance.choice((4, 64)), _place(content, chance)
    piece = content[at : at + size]
    content[to : to + len(piece)] = piece


BYTES: tuple[Callable[[bytearray, int, random.Random], None], ...] = (
    _flip, _flip, _byte, _number, _number, _lost, _repeated, _inserted, _cut, _moved,
)  # fmt: skip


# Values ---------------------------------------------------------------------------------------------------------------


def of_values(value: Any, chance: random.Random) -> Any:
    """The same value of JSON with one or several parts replaced, lost, renamed, repeated, or moved."""
    holder = [copy.deepcopy(value)]
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        places = [(parent, key) for parent, key in _places(holder)]
        if places:
            _change(*chance.choice(places), places, chance)
    return holder[0] if holder else None


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each part of a value, by what holds it and its key there."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        parent = left.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        found += [(parent, key) for key in keys]
        left += [parent[key] for key in keys]
    return found


def _change(parent: Any, key: Any, places: list[tuple[Any, Any]], chance: random.Random) -> None:
    try:
        old = parent[key]
    except (KeyError, IndexError):
        return
    kind = chance.randrange(8)
    if kind < 3:
        parent[key] = copy.deepcopy(chance.choice(VALUES))
    elif kind == 3:
        parent[key] = _near(old, chance)
    elif kind == 4:
        del parent[key]
    elif kind == 5 and isinstance(parent, dict):
        parent[str(chance.choice(VALUES))] = parent.pop(key)
    elif kind == 5:
        parent.insert(key, copy.deepcopy(old))
    elif kind == 6:
        other, name = chance.choice(places)
        if isinstance(other, dict) and name in other or isinstance(other, list) and name < len(other):
            parent[key] = copy.deepcopy(other[name])
    else:
        for _ in range(chance.choice((1, 3, 70, 3000))):
            old = [old] if chance.random() < 0.5 else {"a": old}
        parent[key] = old


def _near(value: Any, chance: random.Random) -> Any:
    """A value of the same kind: another number, a text with something put into it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return chance.choice((-value, value + 1, value - 1, value * 1000, float(value), str(value), value / 3))
    if isinstance(value, str):
        at = chance.randrange(len(value) + 1)
        return value[:at] + chance.choice(TEXTS).decode("utf-8", "replace") + value[at:]
    return value


# Files ----------------------------------------------------------------------------------------------------------------


def of_file(path: Path, content: bytes, chance: random.Random) -> None:
    """Write a changed file in the place of a good one: by what its name says it holds, or bytes of it."""
    change = KINDS.get(path.suffix, of_bytes)
    try:
        changed = change(content, chance) if chance.random() < 0.7 else of_bytes(content, chance)
    except (ValueError, RecursionError):  # a value that cannot be written
        changed = of_bytes(content, chance)
    if chance.random() < 0.02:
        _other_kind(path, chance)
    else:
        path.write_bytes(changed)


def _other_kind(path: Path, chance: random.Random) -> None:
    """Something that is no ordinary file, or none at all."""
    path.unlink()
    kind = chance.randrange(6)
    if kind == 0:
        path.write_bytes(b"")
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(chance.choice(("/etc/passwd", "/dev/zero", path.name, "../none")))
    elif kind == 4:
        with path.open("wb") as file:
            file.truncate(HOLE)  # which takes no space


def restored(path: Path, content: bytes) -> None:
    """Put the good file back."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists() and not path.is_file():
        path.unlink()
    path.write_bytes(content)


def _json(content: bytes, chance: random.Random) -> bytes:
    return _text(of_values(json.loads(content), chance), chance)


def _lines(content: bytes, chance: random.Random) -> bytes:
    """JSON lines, of which some are changed, lost or repeated."""
    lines = content.splitlines()
    for _ in range(chance.choice((1, 1, 3, 20))):
        at = chance.randrange(len(lines)) if lines else 0
        if lines and chance.random() < 0.9:
            lines[at] = _json(lines[at], chance) if lines[at][:1] == b"{" else lines[at]
        else:
            lines[at : at + 1] = lines[at : at + 1] * chance.choice((0, 2))
    return b"\n".join(lines) + chance.choice((b"\n", b"\n", b"", b"\r\n"))


def _text(value: Any, chance: random.Random) -> bytes:
    return json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def _yaml(content: bytes, chance: random.Random) -> bytes:
    value = of_values(plain_yaml(content.decode()), chance)
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def _tensors(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header, or with some values of a tensor that are not those of a model."""
    size = LENGTH.unpack_from(content)[0]
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    if chance.random() < 0.5:
        header = of_values(header, chance)
    else:
        at = chance.randrange(max(len(data) // 4, 1)) * 4
        data[at : at + 4] = struct.pack("<f", chance.choice((float("nan"), float("inf"), -1e38, 1e-40, 65504.0)))
    text = _text(header, chance)
    return LENGTH.pack(len(text)) + text + data


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": _json, ".jsonl": _lines, ".yaml": _yaml, ".safetensors": _tensors,
}  # fmt: skip
