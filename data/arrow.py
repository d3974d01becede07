"""Reads rows and clips by pyarrow. What a row holds is measured before it becomes values of Python.

`rows` and `clip` are called in a process whose memory is bounded, since a parquet file of kilobytes may hold gigabytes.
Their errors do not name the file.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from hark.data.errors import DataError
from hark.data.json_files import LARGEST_ROW

# Of the library, beside its own errors. ValueError: a text that is no UTF-8. OverflowError: a time that Python has not.
# The last three: a damaged schema. IndexError: a file that was exchanged.
DAMAGE = (OSError, ValueError, OverflowError, IndexError, NotImplementedError, KeyError, MemoryError)
BATCH = 64  # rows of a parquet file that are read at a time
FEW = 8  # rows that are read at a time where the clips are read with them
GROUPS = 2  # row groups that are kept in memory, since neighbours are often read together
STREAMS = 4  # files that are read at the same time
REPLY = 1 << 20  # bytes of rows that are sent at a time
BLOCK = 1 << 20  # bytes of a column that are read at a time
LARGEST_CLIP = 256 << 20  # bytes of an encoded clip in a cell

# A row group, the place of a row in it, the name of the column of clips, and the row or its error, pickled.
Placed = tuple[int, int, "str | None", bytes]

_streams: dict[tuple[str, tuple[str, ...], int], Iterator[Placed]] = {}  # by file, names of columns, and next row


# Parquet --------------------------------------------------------------------------------------------------------------


def rows(file: str, names: tuple[str, ...], start: int) -> list[Placed]:
    """Some rows of a parquet file from number `start` on, as `converted` has them; none at its end.

    names: of the column of clips, the first that the file has. DataError if the file is damaged.
    """
    stream = _streams.pop((file, names, start), None) or islice(_stream(file, names), start, None)
    found: list[Placed] = []
    size = 0
    for placed in stream:
        found.append(placed)
        size += len(placed[-1])
        if size > REPLY:
            break
    _streams[file, names, start + len(found)] = stream
    while len(_streams) > STREAMS:
        del _streams[next(iter(_streams))]
    return found


def clip(file: str, group: int, place: int, column: str, item: int | None) -> tuple[bytes | None, str | None]:
    """The bytes and the path in a cell of a parquet file, each None if it is not there."""
    with _damage_named():
        status = os.stat(file)
        return content(row_group(file, (status.st_mtime_ns, status.st_size), group, column), place, item)


@functools.lru_cache(maxsize=GROUPS)
def row_group(file: str, written: tuple[int, int], group: int, column: str) -> pyarrow.ChunkedArray:
    """A column of a row group; the latest GROUPS of them are kept. written: the time and size of the file."""
    with _parquet(file) as table:
        return table.read_row_group(group, columns=[column]).column(0)


@contextmanager
def _damage_named() -> Iterator[None]:
    """What the library raises where a file is damaged becomes a DataError."""
    try:
        yield
    except (*DAMAGE, pyarrow.ArrowException) as error:
        if isinstance(error, (DataError, MemoryError)):
            raise
        raise DataError(f"is damaged ({_reason(error)}); expected a parquet file; copy it again") from None


@contextmanager
def _parquet(file: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    try:
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK)
    except (*DAMAGE, pyarrow.ArrowException) as error:
        reason = _reason(error) if Path(file).exists() else "no such file"
        raise DataError(f"cannot be read ({reason}); expected a parquet file") from None
    with table:
        yield table


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _stream(file: str, names: tuple[str, ...]) -> Iterator[Placed]:
    with _damage_named(), _parquet(file) as table:
        audio = audio_column(table.schema_arrow.names, names)
        for group in range(table.num_row_groups):
            leaves, there, size = _leaves(table, group, audio)
            place = 0
            for batch in table.iter_batches(size, row_groups=[group], columns=leaves, use_threads=False):
                for row in converted(pyarrow.Table.from_batches([batch]), audio):
                    if audio is not None and isinstance(row, dict):
                        row[audio] = _marked(row.get(audio, b""), there)
                    yield group, place, audio, _packed(row)
                    place += 1


def _leaves(table: pyarrow.parquet.ParquetFile, group: int, audio: str | None) -> tuple[list[str], bytes | None, int]:
    """How the rows of a row group are read: which columns, what stands for bytes that are not, and how many at a time.

    All columns are read but bytes, of which only two kinds are: lists of clips, to count them; and bytes beside a path,
    where some are not there.
    """
    leaves, there, size = [], None, BATCH
    for index in range(len(table.schema.names)):
        leaf, chunk = table.schema.column(index), table.metadata.row_group(group).column(index)
        parts = leaf.path.split(".")
        is_bytes = leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE"
        if is_bytes and (parts[0] != audio or len(parts) == 1):
            continue
        known = chunk.statistics if is_bytes and parts[-1] == "bytes" else None
        if known is not None and known.has_null_count and known.null_count == 0:
            there = b""
            continue
        leaves.append(leaf.path)
        size = FEW if is_bytes else size
    return leaves, there, size


def _marked(clips: Any, there: bytes | None) -> Any:
    """A clip, or a list of them, each with an entry for its bytes."""
    if isinstance(clips, list):
        return [_marked(one, there) for one in clips]
    return {"bytes": there} | clips if isinstance(clips, dict) else clips


def _packed(row: dict | DataError) -> bytes:
    """The row pickled, or an error if it is too large: what repeats in a column, Arrow may hold only once."""
    packed = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
    return packed if len(packed) <= LARGEST_ROW else pickle.dumps(_too_large())


# Tables ---------------------------------------------------------------------------------------------------------------


def audio_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column of clips: the first of the names that the table has."""
    return next((name for name in names if name in columns), None)


def converted(table: pyarrow.Table, audio: str | None) -> Sequence[dict | DataError]:
    """The rows of a part of a table, with an error in place of each that cannot be converted or is too large.

    In the column of clips b"" stands for bytes; other columns of bytes are left out.
    """
    kept = [n for n, field in enumerate(table.schema) if field.name == audio or not _is_bytes(field.type)]
    table = table.select(kept)
    try:
        return _plain(table, audio)
    except DataError:  # it may be the fault of a single row, or all are too large together
        return [_row(table.slice(number, 1), audio) for number in range(table.num_rows)]


def _row(row: pyarrow.Table, audio: str | None) -> dict | DataError:
    try:
        return _plain(row, audio)[0]
    except DataError as error:
        return error


def _plain(table: pyarrow.Table, audio: str | None) -> list[dict]:
    columns, size = {}, 0
    for field, column in zip(table.schema, table.columns, strict=True):
        try:
            column.validate(full=True)  # of a file that is mapped into memory, nothing was checked
            size += sum(map(_size, column.chunks))
            if size > LARGEST_ROW:
                raise _too_large()
            values = [value for chunk in column.chunks for value in _values(chunk, clips=field.name == audio)]
        except DataError:
            raise
        except (*DAMAGE, pyarrow.ArrowException) as error:
            expected = "expected texts in UTF-8, numbers and times; write it again"
            raise DataError(f"its {field.name!r} cannot be read ({_reason(error)}); {expected}") from None
        columns[field.name] = values
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _too_large() -> DataError:
    return DataError(f"has more than {LARGEST_ROW >> 20} MB beside its clips; expected texts and numbers")


def _values(array: pyarrow.Array, *, clips: bool) -> list:
    """The values of an array, with b"" in place of bytes. clips: whether bytes within structs are kept."""
    kind = array.type
    if _is_binary(kind):
        return [b"" if there else None for there in array.is_valid().to_pylist()]
    if not _holds_bytes(kind):
        return array.to_pylist()
    valid = array.is_valid().to_pylist()
    if pyarrow.types.is_struct(kind):
        kept = [n for n, field in enumerate(kind) if clips or not _is_bytes(field.type)]
        names, parts = [kind.field(n).name for n in kept], array.flatten()
        fields = [_values(parts[n], clips=clips) for n in kept]
        values = iter([dict(zip(names, row, strict=True)) for row in zip(*fields, strict=True)] or [{}] * len(array))
        return [value if there else None for value, there in zip(values, valid, strict=True)]
    items = iter(_values(array.flatten(), clips=clips))
    lengths = pyarrow.compute.list_value_length(array).to_pylist()
    return [list(islice(items, length)) if there else None for length, there in zip(lengths, valid, strict=True)]


def _size(array: pyarrow.Array) -> int:
    """The bytes of an array without those of clips. Each value counts 8 at least, as Python takes that much."""
    kind, own = array.type, 8 * len(array)
    if _is_binary(kind):
        return own
    if pyarrow.types.is_struct(kind):
        return own + sum(map(_size, array.flatten()))
    return own + (_size(array.flatten()) if _is_list(kind) else array.nbytes)


def content(column: pyarrow.ChunkedArray, place: int, item: int | None) -> tuple[bytes | None, str | None]:
    """The bytes and the path in a cell of a column, each None if it is not there. item: of a list of clips."""
    with _damage_named():
        cell, path = column[place], None
        if item is not None:
            cell = cell[item]
        if isinstance(cell, pyarrow.StructScalar):
            path = cell["path"].as_py() if "path" in cell else None
            cell = cell["bytes"] if "bytes" in cell else None
        if cell is None or not _is_binary(cell.type) or not cell.is_valid:
            return None, path
        if len(held := cell.as_buffer()) > LARGEST_CLIP:
            raise DataError(f"holds more than {LARGEST_CLIP >> 20} MB; expected a clip; keep longer ones as files")
        return held.to_pybytes(), path


def repeats(kind: pyarrow.DataType) -> bool:
    """Whether several values of a type may be the same bytes, so that their size says little of that in Python."""
    if pyarrow.types.is_dictionary(kind) or str(kind) in ("string_view", "binary_view"):
        return True
    return any(repeats(kind.field(n).type) for n in range(kind.num_fields))


def _is_binary(kind: pyarrow.DataType) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _is_list(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_bytes(kind: pyarrow.DataType) -> bool:
    return _is_binary(kind) or _is_list(kind) and _is_bytes(kind.value_type)


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    """Whether there are bytes in structs and lists, at any depth."""
    if _is_list(kind):
        return _holds_bytes(kind.value_type)
    return _is_binary(kind) or pyarrow.types.is_struct(kind) and any(_holds_bytes(field.type) for field in kind)
