"""Reads and writes JSON and JSON-lines files; every error is a DataError of one line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hark.data.errors import DataError


def read_rows(path: str | Path) -> Iterator[tuple[str, dict | DataError]]:
    """(where, row) for each row of a JSON array ("file.json[17]", from 0) or of JSON lines ("file.jsonl:17", from 1).

    A file whose first character is [ is an array. Blank lines are skipped but counted. For a row that is not a JSON
    object, `row` is a DataError whose message does not say where. Raises DataError if the file cannot be read, or
    if an array is not valid JSON.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise DataError(f"{path}: {_problem(path, error)}; expected a file of JSON or JSON lines") from error
    yield from _array_rows(path) if start.startswith(b"[") else _line_rows(path)


def _problem(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no such file (working directory {os.getcwd()})"
    if path.is_dir():
        inside = ", ".join(sorted(file.name for file in path.glob("*.json*"))[:5])
        return f"is a directory{f' that holds {inside}' if inside else ''}"
    return f"cannot be read ({error.strerror or error})"


def _array_rows(path: Path) -> Iterator[tuple[str, dict | DataError]]:
    try:
        rows = _decoded(path.read_bytes())
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    for index, row in enumerate(rows):
        yield f"{path.name}[{index}]", row if isinstance(row, dict) else _not_an_object(row)


def _line_rows(path: Path) -> Iterator[tuple[str, dict | DataError]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = _decoded(raw)
            except DataError as error:
                row = error
            yield f"{path.name}:{number}", row if isinstance(row, (dict, DataError)) else _not_an_object(row)


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    # ValueError: no JSON, no UTF-8, or an integer of more than 4,300 digits. RecursionError: nested too deeply.
    except (ValueError, RecursionError) as error:
        expected = "expected a JSON array of objects, or one JSON object per line, in UTF-8"
        raise DataError(f"not valid JSON ({error}); {expected}") from None


def _not_an_object(row: object) -> DataError:
    return DataError(f"is a JSON {type(row).__name__}; expected an object")


def as_text(value: object) -> str | None:
    """The text of a text or of a number, since some data sets have choices such as 3; None for other types."""
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None


def write_json(path: str | Path, value: dict) -> None:
    """Write a JSON file, and create its directory; DataError if that fails."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error
