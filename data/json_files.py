"""Reads and writes JSON and JSON-lines files; every error is a DataError of one line."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hark.data.errors import DataError

HALF_A_PAIR = re.compile("[\ud800-\udfff]")
DEPTH = 64  # levels of lists and objects in a row
DIGITS = 20  # of an integer of 64 bits, with its sign
LARGEST_ROW = 8 << 20  # bytes of a row; those of real data sets have some kilobytes
LARGEST_VALUE = 128 << 20  # bytes of a file that holds one object or array; in memory they can be thirty times as large


def read_rows(path: str | Path) -> Iterator[tuple[str, dict | DataError]]:
    """(where, row) for each row of a JSON array ("file.json[17]", from 0) or of JSON lines ("file.jsonl:17", from 1).

    A file whose first character is [ is an array. Blank lines are skipped but counted. For a row that is not a JSON
    object, `row` is a DataError whose message does not say where. Raises DataError if the file cannot be read, or
    if an array is not valid JSON.
    """
    path = Path(path)
    check_regular(path)
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise DataError(f"{path}: {_problem(path, error)}; expected a file of JSON or JSON lines") from error
    if start.startswith(b"[") and size > LARGEST_VALUE:
        raise DataError(f"{path}: an array of more than {LARGEST_VALUE >> 20} MB; write it as JSON lines")
    yield from _array_rows(path) if start.startswith(b"[") else _line_rows(path)


def check_regular(path: Path) -> None:
    """DataError for a pipe, a socket or a device, which could block a reader or never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"{path}: is a pipe, a socket or a device; expected a regular file")


def _problem(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no such file (working directory {os.getcwd()})"
    if path.is_dir():
        inside = ", ".join(sorted(file.name for file in path.glob("*.json*"))[:5])
        return f"is a directory{f' that holds {inside}' if inside else ''}"
    return f"cannot be read ({error.strerror or error})"


def _array_rows(path: Path) -> Iterator[tuple[str, dict | DataError]]:
    try:
        rows = _decoded(path.read_bytes(), LARGEST_VALUE)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    for index, row in enumerate(rows):
        yield f"{path.name}[{index}]", _row(row)


def _line_rows(path: Path) -> Iterator[tuple[str, dict | DataError]]:
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(LARGEST_VALUE + 1), b""), start=1):
            if len(raw) > LARGEST_VALUE:
                raise DataError(f"{path}:{number}: no end of the line in {LARGEST_VALUE >> 20} MB; expected JSON lines")
            if not raw.strip():
                continue
            try:
                row = _row(_decoded(raw))
            except DataError as error:
                row = error
            yield f"{path.name}:{number}", row


def _decoded(raw: bytes, most: int = LARGEST_ROW) -> Any:
    if len(raw) > most:
        raise DataError(f"has more than {most >> 20} MB; expected texts and numbers")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object, parse_int=_integer)
    # ValueError: no JSON, or no UTF-8. RecursionError: nested too deeply.
    except (ValueError, RecursionError) as error:
        expected = "expected a JSON array of objects, or one JSON object per line, in UTF-8"
        raise DataError(f"not valid JSON ({error}); {expected}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict | DataError:
    """The object, or an error in its place if a key is repeated, so that only its row is bad."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for repeated, _ in pairs:
        if repeated in seen:
            break
        seen.add(repeated)
    return DataError(f"repeats the key {repeated!r}; expected each key once; remove one of them")


def _integer(text: str) -> int | DataError:
    """The integer, or an error in its place if it has more than 64 bits, which neither floats nor tables can hold."""
    if len(text) <= DIGITS and abs(value := int(text)) < 2**63:
        return value
    return DataError(f"holds an integer of {len(text)} digits; expected at most 64 bits")


def _row(row: Any) -> dict | DataError:
    """The row, or the error of a row that is no object or that holds what cannot be used."""
    level, depth = [row], 0
    while level:
        for value in level:
            if isinstance(value, DataError):
                return value
        if any(_is_broken(value) for value in level):
            return DataError("holds half of a surrogate pair, which is no text; write the character in UTF-8")
        if (depth := depth + 1) > DEPTH:
            return DataError(f"is nested more than {DEPTH} deep; expected a flat object")
        level = [part for value in level for part in _parts(value)]
    return row if isinstance(row, dict) else DataError(f"is a JSON {type(row).__name__}; expected an object")


def _parts(value: Any) -> list:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _is_broken(value: Any) -> bool:
    return isinstance(value, str) and HALF_A_PAIR.search(value) is not None


def read_object(path: str | Path) -> dict:
    """The one object in a JSON file of a bounded size, such as an evaluation. Raises DataError for anything else."""
    path = Path(path)
    check_regular(path)
    try:
        if path.stat().st_size > LARGEST_VALUE:
            raise DataError(f"{path}: has more than {LARGEST_VALUE >> 20} MB; expected one JSON object")
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {_problem(path, error)}; expected a file with one JSON object") from None
    try:
        row = _row(_decoded(raw, LARGEST_VALUE))
    except DataError as error:
        row = error
    if isinstance(row, DataError):
        raise DataError(f"{path}: {row}; write the file again")
    return row


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
