"""Rows of parquet files and of Hugging Face data sets, whose clips stay in the table until they are decoded.

The column of clips is `audio`, `audio_path` or `audio_paths`. It holds encoded bytes, a path, or {"bytes": ..., "path":
...}, or a list of these. Bytes are not copied to a file, and are not kept: each decoding reads them again.
"""

import functools
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hark.data.errors import AudioError, DataError
from hark.data.json_files import check_regular
from hark.data.worker import Worker, WorkerError

AUDIO = ("audio", "audio_path", "audio_paths")  # names of the column of clips; the first that a table has counts
PREFIX = "hf:"
OLDEST_DATASETS = 4  # the first release of `datasets` that runs no script beside the data
BATCH = 256  # rows of a data set that are converted at a time
MEMORY = 4 << 30  # bytes that the process may take which reads parquet files
MOST_SECONDS = 300.0  # to read some rows, or a row group, also from a slow disk
# Bytes that the rows of a file may have for each byte of the file, and in any file.
RATIO, SMALL = 1000, 64 << 20

_reading = threading.Lock()  # so that threads that need the same row group or data set read it once


class UnreadableError(DataError):
    """The process that read a table crashed, did not end, or needed too much memory."""


def is_table(path: str | Path) -> bool:
    """Whether the name is that of a parquet file, a directory of parquet files, or a data set `hf:...`."""
    text = str(path)
    return text.startswith(PREFIX) or text.endswith(".parquet") or bool(_parquet_files(Path(text)))


def read_table(path: str, root: Path | None, audio: Sequence[str] = ()) -> Iterator[tuple[str, Path, dict | DataError]]:
    """(where, directory of relative paths, row) of each row, "train.parquet[17]" counted from 0.

    Without a column `id`, it is the number of the row. A row that cannot be read is a DataError whose message does not
    say where. root: replaces the directory of the file. audio: other names of the column of clips.
    """
    names = (*audio, *AUDIO)
    if path.startswith(PREFIX):
        return _hub_rows(path, root, names)
    files = _parquet_files(Path(path)) or [Path(path)]
    return (row for file in files for row in _parquet_rows(file, root, names, numbered=len(files) > 1))


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
        from hark.data import arrow

        place = (self.group, self.place, self.column, self.item)
        return _content(self, lambda: _asked(self.file, arrow.clip, *place))


@functools.cache
def _reader() -> Worker:
    """The process that reads parquet files for this one."""
    from hark.data import arrow

    return Worker(arrow.__name__, memory=MEMORY)


def _asked(file: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of arrow.py returns about a file, or its DataError, from the process that reads parquet files."""
    try:
        with _reading:
            return _reader().call(function, os.path.abspath(file), *arguments, timeout=MOST_SECONDS)
    except MemoryError:
        reason = f"needed more than {MEMORY >> 30} GiB"
    except WorkerError as error:
        reason = str(error)
    raise UnreadableError(
        f"{file}: cannot be read: its process {reason}; write it again, with row groups of 100 rows if it holds clips"
    )


def _parquet_rows(
    file: Path, root: Path | None, names: Sequence[str], *, numbered: bool
) -> Iterator[tuple[str, Path, dict | DataError]]:
    need("pyarrow", "parquet", file)
    check_regular(file)
    from hark.data import arrow

    folder, number, size = root or file.parent, 0, 0
    while True:
        try:
            found = _asked(file, arrow.rows, tuple(names), number)
        except UnreadableError:
            raise
        except DataError as error:
            raise DataError(f"{file}: {error}") from None
        if not found:
            return
        for group, place, audio, packed in found:
            record = pickle.loads(packed)
            if isinstance(record, dict):
                if audio is not None:
                    cell = functools.partial(ParquetCell, file, number, group, place, audio)
                    record |= _clips_of(record.pop(audio), cell, folder)
                record.setdefault("id", f"{file.stem}[{number}]" if numbered else str(number))
            yield f"{file}[{number}]", folder, record
            number, size = number + 1, size + len(packed)
        if size > max(SMALL, RATIO * file.stat().st_size):
            raise DataError(f"{file}: its rows are over {RATIO} times as large as the file; write them as JSON lines")


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
        from hark.data import arrow

        return _content(self, lambda: arrow.content(table[self.row : self.row + 1].column(self.column), 0, self.item))


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


def _hub_rows(name: str, root: Path | None, names: Sequence[str]) -> Iterator[tuple[str, Path, dict | DataError]]:
    table = _dataset(name)
    from hark.data import arrow

    for column, kind in zip(table.column_names, table.data.schema.types, strict=True):
        if arrow.repeats(kind):
            raise DataError(f"{name}: its column {column!r} is of the type {kind}; expected string; cast it")
    place = Path(name.removeprefix(PREFIX).rpartition(":")[0])
    folder = root or (place if place.is_dir() else Path())
    audio = arrow.audio_column(table.column_names, names)
    row = 0
    for batch in table.iter(BATCH):
        for record in arrow.converted(batch, audio):
            if isinstance(record, dict):
                if audio is not None:
                    record |= _clips_of(record.pop(audio), functools.partial(HubCell, name, row, audio), folder)
                record.setdefault("id", str(row))
            yield f"{name}[{row}]", folder, record
            row += 1


# Both -----------------------------------------------------------------------------------------------------------------


def _clips_of(content: Any, cell: Any, folder: Path) -> dict:
    """The value of a clip, or of a list of clips, under the key that an example has for it."""
    if isinstance(content, list):
        return {
            "audio_paths": [_clip_of(one, functools.partial(cell, item=n), folder) for n, one in enumerate(content)]
        }
    return {"audio_path": _clip_of(content, cell, folder)}


def _clip_of(content: Any, cell: Any, folder: Path) -> Any:
    """The cell, which holds the clip's bytes; where it has none, the path if it names a file."""
    if isinstance(content, dict):
        path = content.get("path")
        return path if content.get("bytes") is None and _is_file(folder, path) else cell()
    return cell() if isinstance(content, bytes) else content


def _is_file(folder: Path, path: object) -> bool:
    """Whether a path names a file; one that is too long, or of another kind, does not."""
    try:
        return isinstance(path, str) and bool(path) and (folder / path).is_file()
    except (OSError, ValueError):
        return False


def _content(cell: Any, read: Callable[[], tuple[bytes | None, str | None]]) -> bytes:
    """The bytes in a cell of a table, from which `read` takes them and the path; AudioError if there are none."""
    try:
        content, path = read()
    except UnreadableError:
        raise
    except DataError as error:
        raise AudioError(f"{cell}: {error}") from None
    if not content:
        where = f", and its path {path!r} names no file; set data.audio_root" if path and content is None else ""
        raise AudioError(f"{cell}: holds no bytes{where}; expected an encoded clip")
    return content
