"""Converts a file of a source to a file of questions in the R1-AQA format, and lists every row that is left out."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hark.data.errors import DataError
from hark.data.examples import BadExample, load_examples, parse_example
from hark.data.json_files import as_text
from hark.data.sources import Source
from hark.data.sources.rows import Question, SourceError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


@dataclass
class Conversion:
    """The result of converting a file."""

    read: int = 0
    records: list[dict] = field(default_factory=list)  # good questions, in file order
    bad: list[BadExample] = field(default_factory=list)  # rows that were left out, and why
    kinds: Counter[str] = field(default_factory=Counter)  # the number of bad rows by kind of fault
    missing: dict[str, None] = field(default_factory=dict)  # the clips that were not found, in file order
    visual: int = 0  # rows dropped because their question is about the picture
    renamed: int = 0  # repeated ids, which got a number: id#2


def convert(source: Source, path: str | Path, *, audio: Path, root: Path, drop_visual: bool = False) -> Conversion:
    """Convert the rows of a file. audio: directory of the clips; root: directory that clips' paths are relative to.

    A row that cannot be converted is listed with its reason. In a training set, an id that occurs again gets a number,
    "id#2", since some sets use the name of the clip as the id. A benchmark's ids are never changed: a row whose id
    occurred before is left out.
    """
    result, clips = Conversion(), _Clips(audio)
    used: Counter[str] = Counter()
    for where, row in source.rows(path):
        result.read += 1
        try:
            if isinstance(row, DataError):
                raise row
            if drop_visual and source.is_visual and source.is_visual(row):
                result.visual += 1
                continue
            record = _record(source, source.question(row), clips, root, where)
            identity = record["id"]
            if used[identity] and source.benchmark:
                raise SourceError("id used twice", f'"id" {identity!r} was used before; a benchmark\'s ids must differ')
        except DataError as error:
            given = "" if isinstance(row, DataError) else as_text(row.get("id")) or ""
            result.bad.append(BadExample(where, given, str(error)))
            kind = error.kind if isinstance(error, SourceError) else "not a usable question"
            result.kinds["not a row of this format" if error is row else kind] += 1
        else:
            used[identity] += 1
            if used[identity] > 1:
                record["id"] = f"{identity}#{used[identity]}"
                result.renamed += 1
            result.records.append(record)
    result.missing = clips.missing
    return result


def _record(source: Source, question: Question, clips: "_Clips", root: Path, where: str) -> dict:
    """The record of a question; DataError if `load_examples` would not accept it."""
    record = {
        "id": question.id,
        "audio_path": _relative(clips.find(question.clips, required=not source.benchmark), root),
        "question_text": question.text,
        "multi_choice": question.choices,
        "answer": question.answer,
        "dataset_name": source.dataset,
    }
    for key in ("task", "category", "sub_category", "difficulty", "system", "start", "end"):
        if getattr(question, key) not in ("", None):
            record[key] = getattr(question, key)
    parse_example(record, root=root, line=where, benchmark=source.benchmark)
    return record


class _Clips:
    """Finds clips in a directory, and collects the names of those that are missing."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise DataError(f"{directory}: not a directory; expected the clips there; name it with --audio")
        self.missing: dict[str, None] = {}
        self._directory = directory
        self._used: dict[str, str] = {}  # file -> the name that it was found for

    def find(self, names: Sequence[str], *, required: bool) -> str:
        """The path of the first of these names that exists: DIRECTORY/NAME, or DIRECTORY/the last part of NAME.

        Only files inside the directory are found: a name may not lead out of it by "..", or as an absolute path.
        If none exists: SourceError if `required`, else the path of the first name. A benchmark's question is kept
        without its clip, so that it is counted as wrong.
        """
        inside = os.path.abspath(self._directory)
        for name in names:
            for tail in dict.fromkeys((name, os.path.basename(name))):
                for suffix in ("",) if os.path.splitext(name)[1].lower() in SUFFIXES else SUFFIXES:
                    path = os.path.abspath(self._directory / (tail + suffix))
                    if Path(path).is_relative_to(inside) and os.path.isfile(path):
                        return self._unambiguous(path, names[0])
        self.missing[names[0]] = None
        if not required:
            path = os.path.abspath(self._directory / names[0])
            return path if Path(path).is_relative_to(inside) else os.path.join(inside, os.path.basename(names[0]))
        raise SourceError("missing clip", f"{' or '.join(names)}: no such clip in {self._directory}")

    def _unambiguous(self, path: str, name: str) -> str:
        """The path; SourceError if the file was found for another name before, which may be another clip."""
        name = os.path.normpath(name)
        other = self._used.setdefault(path, name)
        if other != name:
            raise SourceError("clip of another name", f"{path}: is {other!r} already; expected a file for {name!r}")
        return path


def _relative(path: str, root: Path) -> str:
    """The path relative to `root` if it is inside it, so that both can be moved together; else the absolute path."""
    root = Path(os.path.abspath(root))
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path


def write(result: Conversion, output: Path, *, benchmark: bool) -> None:
    """Write the records to a temporary file, load it as a check, and rename it to `output`; DataError if it fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
        # Clips may lie in another directory than the output; training asks whether they may.
        load_examples(partial, audio_root=output.parent, benchmark=benchmark, allow_outside=True)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def write_bad(result: Conversion, path: Path) -> None:
    """Write the list of rows that were left out, and overwrite an older one; without such rows there is no file."""
    path.unlink(missing_ok=True)
    if result.bad:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(bad.json_line() for bad in result.bad)
        # A bad row's id may hold half of a surrogate pair, which UTF-8 cannot encode.
        path.write_text(lines, encoding="utf-8", errors="backslashreplace")
