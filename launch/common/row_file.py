"""A JSON-lines file that a long measurement writes row by row, and continues after an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hark.data.errors import DataError
from hark.data.json_files import LARGEST_ROW, check_regular, read_object, read_rows, write_json
from hark.grpo.config import ConfigError
from hark.shown import shown

LONGEST = 200  # characters of a setting, in a message


def begin(path: Path, settings: dict[str, Any], is_row: Callable[[dict], bool]) -> list[dict]:
    """The rows that an earlier call with the same settings wrote, in their order; none if there is no file.

    An incomplete last line, left by a crash, is removed. The settings are kept beside the file, in FILE.settings.json.
    is_row: whether a row is one of this file. Raises ConfigError or DataError if the file is of other settings, or of
    something else.
    """
    beside = path.with_name(f"{path.name}.settings.json")
    if not path.exists():
        write_json(beside, settings)
        path.touch()
        return []
    if not beside.exists():
        raise ConfigError(f"{path} is there already, and is not of `hark pass-rate`; choose another file")
    before = read_object(beside)
    for name, value in settings.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{path} was begun with {name}={shown(before.get(name), LONGEST)}, not {value}; go on with that, or "
                "choose another file"
            )
    return _whole_rows(path, is_row)


def _whole_rows(path: Path, is_row: Callable[[dict], bool]) -> list[dict]:
    check_regular(path)
    _cut(path)
    rows = []
    for where, row in read_rows(path):
        if isinstance(row, DataError):
            raise DataError(f"{where}: {row}; delete the line")
        if not is_row(row):
            raise DataError(f"{where}: not a row of `hark pass-rate`; delete the line, or choose another file")
        rows.append(row)
    return rows


def _cut(path: Path) -> None:
    """Remove what follows the last end of a line."""
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - LARGEST_ROW, 0))
            *whole, rest = file.read().rsplit(b"\n", 1)
            if not whole and size > LARGEST_ROW:
                raise DataError(f"{path}: its last line has more than {LARGEST_ROW >> 20} MB; choose another file")
            file.truncate(size - len(rest))
    except OSError as error:
        raise DataError(f"{path}: cannot be used ({error.strerror}); choose another file") from None


def append(path: Path, rows: Sequence[dict]) -> None:
    """Add rows to a file; they are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def drop(path: Path, *, key: str, known: set[str]) -> None:
    """Remove the rows of a file whose `key` is not among the known ones; create the file if there is none."""
    rows = _whole_rows(path, lambda row: isinstance(row.get(key), str)) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("", encoding="utf-8")
    append(path, [row for row in rows if row[key] in known])
