"""A JSON-lines file that a long measurement writes row by row, and continues after an interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hark.data.json_files import write_json
from hark.grpo.config import ConfigError


def begin(path: Path, settings: dict[str, Any]) -> list[dict]:
    """The rows that an earlier call with the same settings wrote, in their order; none if there is no file.

    An incomplete last line, left by a crash, is removed. The settings are kept beside the file, in FILE.settings.json.
    Raises ConfigError if the file is of other settings, or of something else.
    """
    beside = path.with_name(f"{path.name}.settings.json")
    if not path.exists():
        write_json(beside, settings)
        path.touch()
        return []
    if not beside.exists():
        raise ConfigError(f"{path} is there already, and is not of `hark pass-rate`; choose another file")
    before = json.loads(beside.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{path} was begun with {name}={before.get(name)}, not {value}; go on with that, or choose another file"
            )
    return _whole_rows(path)


def _whole_rows(path: Path) -> list[dict]:
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.decode("utf-8").splitlines()]


def append(path: Path, rows: Sequence[dict]) -> None:
    """Add rows to a file; they are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def drop(path: Path, *, key: str, known: set[str]) -> None:
    """Remove the rows of a file whose `key` is not among the known ones; create the file if there is none."""
    rows = _whole_rows(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("", encoding="utf-8")
    append(path, [row for row in rows if row[key] in known])
