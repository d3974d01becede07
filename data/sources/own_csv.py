"""One's own questions in a CSV file with a line of column names; the delimiter is a comma, semicolon or tab.

| column | holds |
|---|---|
| `audio`, `audio_path`, `file_name`, `file` or `path` | the clip's file, relative to the clips' directory |
| `question` or `question_text` | the question |
| `choices` | the choices, as `dog|car|rain`; where it is empty, or missing, the question is open |
| `choice_1`, `choice_2`, ... | instead of `choices`: one choice each; an empty one is left out |
| `answer` | the right choice: its text, its letter (A is the first) or its number (1 is the first) |
| | of an open question: the accepted texts, as `two|2`; empty for a reward that needs none |
| `start`, `end` | not needed: the part of the clip that is meant, in seconds |
| `id`, `task`, `category`, `difficulty`, `system` | not needed; without an id it is the name of the clip |
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path, PurePath

from hark.data.errors import DataError
from hark.data.sources.answers import find_answer
from hark.data.sources.rows import Question, SourceError, label, text

AUDIO = ("audio", "audio_path", "file_name", "file", "path")
QUESTION = ("question", "question_text")


def question(row: dict) -> Question:
    """The question of a row."""
    clip, choices = text(row, *AUDIO), choices_of(row)
    return Question(
        id=label(row, "id") or PurePath(clip).stem,
        clips=(clip,),
        text=text(row, *QUESTION),
        choices=choices,
        answer=answer_of(text(row, "answer"), choices) if choices else accepted_of(row),
        task=label(row, "task"),
        category=label(row, "category"),
        difficulty=label(row, "difficulty"),
        system=label(row, "system"),
        start=seconds_of(row, "start"),
        end=seconds_of(row, "end"),
    )


def choices_of(row: dict) -> list[str]:
    """The choices of the column `choices`, or of the columns choice_1, choice_2, ... in the order of their numbers."""
    numbered = sorted((key for key in row if re.fullmatch(r"choice_\d+", key)), key=lambda key: int(key[7:]))
    if numbered and row.get("choices") is not None:
        raise SourceError(
            "choices given twice", f"choices and {numbered[0]} are both filled in; use one of the two ways"
        )
    if numbered:
        return [row[key] for key in numbered if row[key] is not None]
    return [choice.strip() for choice in label(row, "choices").split("|")] if row.get("choices") else []


def accepted_of(row: dict) -> str | list[str] | None:
    """The accepted texts of an open question; None if the cell is empty."""
    texts = [part.strip() for part in label(row, "answer").split("|")]
    return texts if len(texts) > 1 else texts[0] or None


def seconds_of(row: dict, key: str) -> float | None:
    """The number in a cell; None if it is empty."""
    try:
        return float(row[key]) if row.get(key) is not None else None
    except ValueError:
        raise SourceError(f'wrong "{key}"', f'"{key}" is {row[key]!r}; expected seconds') from None


def answer_of(answer: str, choices: list[str]) -> int:
    """The index of the right choice: a text of a choice first, then its letter, then its number from 1."""
    try:
        return find_answer(answer.upper() if len(answer) == 1 and answer not in choices else answer, choices)
    except SourceError:
        if answer.isdecimal() and 1 <= int(answer) <= len(choices):
            return int(answer) - 1
        raise


def rows(path: str | Path) -> Iterator[tuple[str, dict | DataError]]:
    """(where, row) for each row, "file.csv:17" with its last line; an empty cell is None. Blank lines are skipped."""
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason}); expected a CSV file in UTF-8") from None
    heading = content.partition("\n")[0]
    delimiter = max(",;\t", key=heading.count)
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True)
    names = [name.strip().lower() for name in reader.fieldnames or []]
    check_columns(names, path)
    reader.fieldnames = names
    for row in reader:
        where = f"{path.name}:{reader.line_num}"
        if None in row or None in row.values():
            yield (
                where,
                DataError(f"has not {len(names)} cells as the first line; quote a cell that holds a {delimiter!r}"),
            )
        else:
            yield where, {key: cell.strip() or None for key, cell in row.items()}


def check_columns(names: list[str], path: Path) -> None:
    """DataError where the first line lacks a column, or has one twice."""
    needed = {"audio": {*AUDIO} & {*names}, "question": {*QUESTION} & {*names}, "answer": {"answer"} & {*names}}
    missing = [name for name, found in needed.items() if not found]
    if missing:
        raise DataError(
            f"{path}: no column {' or '.join(missing)}; the first line names {', '.join(names) or 'nothing'}"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{path}: the first line names a column twice: {', '.join(names)}")
