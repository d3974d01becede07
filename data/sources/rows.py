"""What all sources share: reading a file of rows, and the question that a row becomes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hark.data.errors import DataError
from hark.data.examples import decode_line


@dataclass(frozen=True)
class Question:
    """One row of a source, understood; where its clip lies is not known yet."""

    id: str
    # Names the clip's file may have, the likeliest first; one without a suffix stands for any kind of audio file.
    clips: tuple[str, ...]
    text: str
    choices: list[str]
    answer: int | None
    task: str = ""
    category: str = ""
    sub_category: str = ""
    difficulty: str = ""


class SourceError(DataError):
    """A row cannot be converted; `kind` is the fault without its particulars, to count by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_rows(path: str | Path) -> Iterator[tuple[str, dict | SourceError]]:
    """Each row of a JSON array ("file.json[17]", from 0) or of JSON lines ("file.jsonl:17", from 1).

    Gives a SourceError in place of a row that is not a JSON object; raises DataError where the file cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); expected JSON or JSON lines") from error
    yield from _array(path) if start.startswith(b"[") else _lines(path)


def _array(path: Path) -> Iterator[tuple[str, dict | SourceError]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); expected an array of objects in UTF-8") from None
    for index, row in enumerate(rows):
        wrong = SourceError("not a JSON object", f"is a JSON {type(row).__name__}; expected an object")
        yield f"{path.name}[{index}]", row if isinstance(row, dict) else wrong


def _lines(path: Path) -> Iterator[tuple[str, dict | SourceError]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield f"{path.name}:{number}", decode_line(raw)
            except DataError as error:
                yield f"{path.name}:{number}", SourceError("not a JSON object", str(error))


def value(row: dict, *keys: str) -> object:
    """The value of the first of these keys that the row has; SourceError if it has none."""
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    names = " or ".join(f'"{key}"' for key in keys)
    raise SourceError(f'no "{keys[0]}"', f"{names} is missing; the row has {', '.join(row)}")


def text(row: dict, *keys: str) -> str:
    """The same as text; numbers, which some sources leave bare, are written out."""
    return _as_text(value(row, *keys), keys[0])


def label(row: dict, *keys: str) -> str:
    """A text that a row may do without; the texts of a list are joined by commas."""
    found = next((row[key] for key in keys if row.get(key) is not None), "")
    return ", ".join(_as_text(part, keys[0]) for part in found) if isinstance(found, list) else _as_text(found, keys[0])


def texts(row: dict, *keys: str) -> list[str]:
    """A list of texts."""
    found = value(row, *keys)
    if not isinstance(found, list):
        raise SourceError(f'wrong "{keys[0]}"', f'"{keys[0]}" is {found!r}; expected a list of texts')
    return [_as_text(part, keys[0]) for part in found]


def _as_text(found: object, key: str) -> str:
    if isinstance(found, bool) or not isinstance(found, (str, int, float)):
        raise SourceError(f'wrong "{key}"', f'"{key}" is {found!r}; expected text')
    if any("\ud800" <= character <= "\udfff" for character in str(found)):
        raise SourceError(f'wrong "{key}"', f'"{key}" is {found!r}, which holds half a character; it cannot be written')
    return str(found)
