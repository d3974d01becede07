"""The question that a row of a source is converted to, and functions that read the values of a row."""

import reprlib
from dataclasses import dataclass
from typing import Any

from hark.data.errors import DataError
from hark.data.json_files import as_text


@dataclass(frozen=True)
class Question:
    """The question of one row, before its clip is searched for."""

    id: str
    clips: tuple[str, ...]  # possible names of the clip's file, the likeliest first; the suffix may be missing
    text: str
    choices: list[str]  # none for an open question
    answer: int | str | list[str] | None  # an index; a text or accepted texts of an open question; in a benchmark also
    # the text of no choice, or None if unknown
    task: str = ""
    category: str = ""
    sub_category: str = ""
    difficulty: str = ""
    system: str = ""
    start: float | None = None  # seconds
    end: float | None = None


class SourceError(DataError):
    """A row cannot be converted; `kind` is the fault without its details, by which rows are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def value(row: dict, *keys: str) -> Any:
    """The value of the first of these keys that is not null; SourceError if there is none."""
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    names = " or ".join(f'"{key}"' for key in keys)
    raise SourceError(f'no "{keys[0]}"', f"{names} is missing; the row has {', '.join(row)}")


def text(row: dict, *keys: str) -> str:
    """`value` as text; a number is converted to its text."""
    return _text(value(row, *keys), keys[0])


def label(row: dict, *keys: str) -> str:
    """The text at the first of these keys that is not null, "" without any; texts of a list are joined by commas."""
    found = next((row[key] for key in keys if row.get(key) is not None), "")
    return ", ".join(_text(part, keys[0]) for part in found) if isinstance(found, list) else _text(found, keys[0])


def texts(row: dict, *keys: str) -> list[str]:
    """The list of texts at the first of these keys that is not null."""
    found = value(row, *keys)
    if not isinstance(found, list):
        raise SourceError(f'wrong "{keys[0]}"', f'"{keys[0]}" is {reprlib.repr(found)}; expected a list of texts')
    return [_text(part, keys[0]) for part in found]


def _text(found: object, key: str) -> str:
    result = as_text(found)
    if result is None:
        raise SourceError(f'wrong "{key}"', f'"{key}" is {reprlib.repr(found)}; expected text')
    if any("\ud800" <= character <= "\udfff" for character in result):
        raise SourceError(f'wrong "{key}"', f'"{key}" is {result!r}, which holds half of a surrogate pair')
    return result
