"""Rows of parquet files and of Hugging Face data sets, whose clips stay in the table until they are decoded.

The column of clips is `audio`, `audio_path` or `audio_paths`. It holds encoded bytes, a path, or {"bytes": ..., "path":
...}, or a list of these. Bytes are not copied to a file, and are not kept: each decoding reads them again.
"""

import functools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hark.data.errors import AudioError, DataError
from hark.data.json_files import check_regular

AUDIO = ("audio", "audio_path", "audio_paths")  # names of the column of clips; the first that a table has counts
PREFIX = "hf:"
# Of the library, beside its own errors. ValueError: a text that is no UTF-8. The last three: a damaged schema.
DAMAGE = (OSError, ValueError, NotImplementedError, KeyError, MemoryError)
BATCH = 256  # rows that are converted at a time
OLDEST_DATASETS = 4  # the first release of `datasets` that runs no script beside the data
GROUPS = 2  # row groups of parquet files that are kept in memory, since neighbours are often read together

_reading = threading.Lock()  # so that threads that need the same row group read it once


def is_table(path: str | Path) -> bool:
    """Whether the name is that of a parquet file, a directory of parquet files, or a data set `hf:...`."""
    text = str(path)
    return text.startswith(PREFIX) or text.endswith(".parquet") or bool(_parquet_files(Path(text)))


def read_table(path: str, root: Path | None, audio: Sequence[str] = ()) -> Iterator[tuple[str, Path, dict]]:
    """(where, directory of relative paths, row) of each row, "train.parquet[17]" counted from 0.

    Without a column `id`, it is the number of the row. root: replaces the directory of the file. audio: other names of
    the column of clips.
    """
    names = (*audio, *AUDIO)
    if path.startswith(PREFIX):
        return _hub_rows(path, root, names)
    files = _parquet_files(Path(path)) or [Path(path)]
    return (row for file in files for row in _parquet_rows(file, root, names, numbered=len(files) > 1))


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """What the library raises where the content of a parquet file is damaged becomes a DataError."""
    import pyarrow

    try:
        yield
    except (*DAMAGE, pyarrow.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: is damaged ({reason}); expected a parquet file; copy it again") from None


def _parquet_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.parquet")) if directory.is_dir() else []


def need(package: str, extra: str, path: str | Path) -> None:
    """DataError with the command that installs a package, if it is not there."""
    if find_spec(package) is None:
        raise DataError(f'{path}: needs the package {package}; install it with pip install "hark[{extra}]"')


# Parquet --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetCell:
    """A clip in a parquet file: its row, counted from 0, and the row group with the place of the row in it."""

    file: Path
    row: int
    group: int
    place: int
    column: str
    item: int | None = None  # of a list of clips

    def __str__(self) -> str:
        return f"{self.file}[{self.row}].{self.column}{'' if self.item is None else f'[{self.item}]'}"

    @property
    def key(self) -> str:
        return f"{os.path.abspath(self.file.parent)}/{str(self)[len(str(self.file.parent)) :].lstrip('/')}"

    def read(self) -> bytes:
        with _reading:
            column = row_group(self.file, self.group, self.column)
        return _content(self, column[self.place].as_py())


@functools.lru_cache(maxsize=GROUPS)
def row_group(file: Path, group: int, column: str) -> Any:
    """A column of a row group of a parquet file, as pyarrow's; the latest GROUPS of them are kept."""
    with _parquet(file) as table, _damage_named(file):
        return table.read_row_group(group, columns=[column]).column(0)


def _parquet(file: Path) -> Any:
    need("pyarrow", "parquet", file)
    check_regular(file)
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (*DAMAGE, pyarrow.ArrowException) as error:
        reason = "no such file" if not file.exists() else " ".join(str(error).split())[:200]
        raise DataError(f"{file}: cannot be read ({reason}); expected a parquet file") from None


def _parquet_rows(
    file: Path, root: Path | None, names: Sequence[str], *, numbered: bool
) -> Iterator[tuple[str, Path, dict]]:
    folder = root or file.parent
    with _parquet(file) as table, _damage_named(file):
        audio = _audio_column(table.schema_arrow.names, names)
        holds_bytes = audio is not None and _is_binary(table.schema_arrow.field(audio).type)
        wanted = [leaf for leaf in map(table.schema.column, range(len(table.schema.names))) if _is_read(leaf, audio)]
        row = 0
        for group in range(table.num_row_groups):
            place = 0
            for batch in table.iter_batches(BATCH, row_groups=[group], columns=[leaf.path for leaf in wanted]):
                for record in batch.to_pylist():
                    if audio is not None:
                        content = record.pop(audio, b"" if holds_bytes else {})
                        cell = functools.partial(ParquetCell, file, row, group, place, audio)
                        record |= _clips_of(content, cell, folder)
                    record.setdefault("id", f"{file.stem}[{row}]" if numbered else str(row))
                    yield f"{file}[{row}]", folder, record
                    row, place = row + 1, place + 1


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _is_read(leaf: Any, audio: str | None) -> bool:
    """Whether a column is read with the rows: all but bytes, of which only lists of clips are, to count them."""
    is_bytes = leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE"
    parts = leaf.path.split(".")
    return not is_bytes or parts[0] == audio and len(parts) > 1 and parts[-1] != "bytes"


# Hugging Face data sets -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubCell:
    """A clip in a data set, which is opened by its name in each process."""

    name: str  # hf:NAME:SPLIT
    row: int
    column: str
    item: int | None = None  # of a list of clips

    def __str__(self) -> str:
        return f"{self.name}[{self.row}].{self.column}{'' if self.item is None else f'[{self.item}]'}"

    @property
    def key(self) -> str:
        """The name itself: where two directories have the same relative path, the content tells them apart."""
        return str(self)

    @property
    def file(self) -> None:
        return None

    def read(self) -> bytes:
        with _reading:
            table = _dataset(self.name)
        return _content(self, table[self.row : self.row + 1].column(self.column)[0].as_py())


@functools.lru_cache(maxsize=8)
def _dataset(name: str) -> Any:
    """The data set, as Arrow tables: the clips in it are not decoded."""
    need("datasets", "datasets", name)
    import datasets

    if int(datasets.__version__.partition(".")[0]) < OLDEST_DATASETS:
        raise DataError(
            f"{name}: needs datasets {OLDEST_DATASETS} or later, and {datasets.__version__} is installed, which runs "
            'scripts of a data set; install it with pip install --upgrade "hark[datasets]"'
        )
    place, _, split = name.removeprefix(PREFIX).rpartition(":")
    if not place or not split:
        raise DataError(f"{name}: names no split; expected hf:OWNER/NAME:SPLIT or hf:DIRECTORY:SPLIT")
    try:
        if not any((Path(place) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            found = datasets.load_dataset(place, split=split)
        else:
            found = datasets.load_from_disk(place)
    except Exception as error:  # the library raises errors of many kinds
        raise DataError(f"{name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{name}: has no split {split!r}; its splits are {', '.join(found)}")
        found = found[split]
    return found.with_format("arrow")


def _hub_rows(name: str, root: Path | None, names: Sequence[str]) -> Iterator[tuple[str, Path, dict]]:
    table = _dataset(name)
    place = Path(name.removeprefix(PREFIX).rpartition(":")[0])
    folder = root or (place if place.is_dir() else Path())
    audio = _audio_column(table.column_names, names)
    row = 0
    for batch in table.iter(BATCH):
        for record in _plain(batch, audio):
            if audio is not None:
                record |= _clips_of(record.pop(audio), functools.partial(HubCell, name, row, audio), folder)
            record.setdefault("id", str(row))
            yield f"{name}[{row}]", folder, record
            row += 1


def _plain(batch: Any, audio: str | None) -> list[dict]:
    """The rows of an Arrow table. Bytes of clips are left out, and so are other columns of bytes."""
    import pyarrow
    import pyarrow.compute

    columns: dict[str, list] = {}
    for name in batch.column_names:
        column = batch.column(name).combine_chunks()
        if _is_binary(column.type):
            if name == audio:
                columns[name] = [b"" if valid else None for valid in column.is_valid().to_pylist()]
        elif pyarrow.types.is_struct(column.type):
            kept = [field.name for field in column.type if not _is_binary(field.type)]
            fields = [pyarrow.compute.struct_field(column, part).to_pylist() for part in kept]
            values = [dict(zip(kept, row, strict=True)) for row in zip(*fields, strict=True)] or [{}] * len(column)
            valid = column.is_valid().to_pylist()
            columns[name] = [value if there else None for value, there in zip(values, valid, strict=True)]
        else:
            columns[name] = column.to_pylist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# Both -----------------------------------------------------------------------------------------------------------------


def _audio_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _clips_of(content: Any, cell: Any, folder: Path) -> dict:
    """The value of a clip, or of a list of clips, under the key that an example has for it."""
    if isinstance(content, list):
        return {
            "audio_paths": [_clip_of(one, functools.partial(cell, item=n), folder) for n, one in enumerate(content)]
        }
    return {"audio_path": _clip_of(content, cell, folder)}


def _clip_of(content: Any, cell: Any, folder: Path) -> Any:
    """The path of a file, where there is one; else the cell, which holds the clip's bytes."""
    if isinstance(content, dict):
        path = content.get("path")
        return path if path and (folder / path).is_file() else cell()
    return cell() if isinstance(content, bytes) else content


def _content(cell: Any, value: Any) -> bytes:
    """The bytes in a cell of a table."""
    value = value if cell.item is None else value[cell.item]
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if not content:
        where = f", and its path {path!r} names no file; set data.audio_root" if path else ""
        raise AudioError(f"{cell}: holds no bytes{where}; expected an encoded clip")
    return content
