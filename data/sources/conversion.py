"""A file of a source becomes a file of questions in the R1-AQA format, and nothing is lost without being listed."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hark.data.errors import DataError
from hark.data.examples import BadExample, load_examples, parse_example
from hark.data.sources import Source
from hark.data.sources.rows import Question, SourceError, read_rows

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


@dataclass
class Conversion:
    """What became of the rows of a file."""

    read: int = 0
    records: list[dict] = field(default_factory=list)  # good questions, in file order
    bad: list[BadExample] = field(default_factory=list)  # rows that were left out, and why
    kinds: Counter[str] = field(default_factory=Counter)  # how many of them by kind of fault
    missing: dict[str, None] = field(default_factory=dict)  # the clips that were not found, in order
    visual: int = 0  # rows dropped because they have to be seen
    renamed: int = 0  # ids that were used before and now end in a number


def convert(source: Source, path: str | Path, *, audio: Path, root: Path, drop_visual: bool = False) -> Conversion:
    """The questions of a file whose clips lie in the directory `audio`, with clips beneath `root` named from there.

    A row that cannot be converted is listed with its reason. Ids that name a clip come again with its next question,
    which is then called "id#2"; a benchmark's are what its scores are computed by: there, the later row is left out.
    """
    result, clips = Conversion(), _Clips(audio)
    used: Counter[str] = Counter()
    for where, row in read_rows(path):
        result.read += 1
        try:
            if isinstance(row, SourceError):
                raise row
            if drop_visual and source.is_visual and source.is_visual(row):
                result.visual += 1
                continue
            record = _record(source, source.question(row), clips, root, where)
            identity = record["id"]
            if used[identity] and source.benchmark:
                raise SourceError("id used twice", f'"id" {identity!r} was used before; a benchmark\'s ids must differ')
        except DataError as error:
            given = "" if isinstance(row, SourceError) else str(row.get("id", ""))
            result.bad.append(BadExample(where, given, str(error)))
            result.kinds[error.kind if isinstance(error, SourceError) else "not a usable question"] += 1
        else:
            used[identity] += 1
            if used[identity] > 1:
                record["id"] = f"{identity}#{used[identity]}"
                result.renamed += 1
            result.records.append(record)
    result.missing = clips.missing
    return result


def _record(source: Source, question: Question, clips: "_Clips", root: Path, where: str) -> dict:
    """The record of a question, checked as it will be when it is loaded."""
    record = {
        "id": question.id,
        "audio_path": _name(clips.find(question.clips, required=not source.benchmark), root),
        "question_text": question.text,
        "multi_choice": question.choices,
        "answer": question.answer,
        "dataset_name": source.dataset,
    }
    for key in ("task", "category", "sub_category", "difficulty"):
        if getattr(question, key):
            record[key] = getattr(question, key)
    parse_example(record, root=root, line=where, benchmark=source.benchmark)
    return record


class _Clips:
    """Finds clips in a directory, and notes those that are not there."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise DataError(f"{directory}: not a directory; expected the clips there; name it with --audio")
        self.missing: dict[str, None] = {}
        self._directory = directory
        self._used: dict[str, str] = {}  # file -> name it was found by

    def find(self, names: Sequence[str], *, required: bool) -> str:
        """The file of the first of these names that there is: below the directory as it stands, or by its last part.

        Without one, where it would be, unless it is required: a benchmark's question stays, to be counted as wrong.
        """
        for name in names:
            for place in dict.fromkeys((name, os.path.basename(name))):
                for suffix in ("",) if os.path.splitext(name)[1].lower() in SUFFIXES else SUFFIXES:
                    path = os.path.abspath(self._directory / (place + suffix))
                    if os.path.isfile(path):
                        return self._of_one_name(path, names[0])
        self.missing[names[0]] = None
        if not required:
            return os.path.abspath(self._directory / names[0])
        raise SourceError("missing clip", f"{' or '.join(names)}: no such clip in {self._directory}")

    def _of_one_name(self, path: str, name: str) -> str:
        """A file found by its last part may be another clip's: the wrong sound would never be noticed."""
        name = os.path.normpath(name)
        other = self._used.setdefault(path, name)
        if other != name:
            raise SourceError("clip of another name", f"{path}: is {other!r} already; expected a file for {name!r}")
        return path


def _name(path: str, root: Path) -> str:
    """The path from `root` if it lies beneath it, so that both can be moved together; else as it is."""
    root = Path(os.path.abspath(root))
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path


def write(result: Conversion, output: Path, *, benchmark: bool) -> None:
    """Write the records to `output`, whole or not at all, after reading them back; DataError if they do not load."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
        load_examples(partial, audio_root=output.parent, benchmark=benchmark)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def write_bad(result: Conversion, path: Path) -> None:
    """List the rows that were left out, in place of an older list; without any, there is no list."""
    path.unlink(missing_ok=True)
    if result.bad:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(bad.json_line() for bad in result.bad)
        path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # a bad row's id may be no good text
