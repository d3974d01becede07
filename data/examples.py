"""Multiple-choice questions about audio clips, read from files in the R1-AQA format."""

import json
import reprlib
from dataclasses import dataclass, field
from pathlib import Path

from hark.data.choices import normalise
from hark.data.errors import DataError
from hark.data.json_files import as_text, read_rows

KEYS = ("id", "audio_path", "question_text", "multi_choice", "answer")


@dataclass(frozen=True)
class Example:
    """One question with its clip, its choices and the index of the right one.

    `answer` is None only in a benchmark, where the right answer is not published or is none of the choices (`truth`).
    """

    id: str
    audio_path: Path | None
    question: str
    choices: tuple[str, ...]
    answer: int | None
    dataset: str = ""
    task: str = ""
    category: str = ""
    line: str = ""  # where it was read: "data/train.jsonl:17"
    sub_category: str = ""
    difficulty: str = ""
    truth: str = ""  # a benchmark's answer given as text; `answer` is None then
    seconds: float | None = field(default=None, compare=False)  # length of the clip; None until it was decoded

    @property
    def answer_text(self) -> str:
        """The right choice; DataError where the answer is not known."""
        if self.answer is None:
            raise DataError(f"{self.line or self.id}: has no answer; expected one to train on or to compare with")
        return self.choices[self.answer]


@dataclass(frozen=True)
class BadExample:
    """An example that was left out, and why."""

    line: str
    id: str
    reason: str

    def record(self) -> dict[str, str]:
        """The three fields by the names that reports use: file ("data/train.jsonl:17"), id and reason."""
        return {"file": self.line, "id": self.id, "reason": self.reason}

    def json_line(self) -> str:
        """The record as a line of bad.jsonl, with its newline."""
        return json.dumps(self.record(), ensure_ascii=False) + "\n"


def load_examples(
    path: str | Path,
    *,
    audio_root: str | Path | None = None,
    require_audio: bool = True,
    skip_bad: bool = False,
    benchmark: bool = False,
) -> tuple[list[Example], list[BadExample]]:
    """Read a file of questions: (good examples, bad ones). Each row needs KEYS; unknown keys are ignored.

    `audio_path` is relative to `audio_root`, or else to the directory of the file; without `require_audio` it may be
    absent or null. The first bad row raises DataError; with `skip_bad`, bad rows are returned instead. A file without a
    good example always raises DataError.

    benchmark: accept what is an error in training data: two choices that are equal when normalised, and an `answer`
    that is null, absent, or a text.
    """
    path = Path(path)
    root = path.parent if audio_root is None else Path(audio_root)
    examples, bad = [], []
    seen: dict[str, str] = {}
    for name, row in read_rows(path):
        line = str(path.parent / name)
        record = row if isinstance(row, dict) else {}
        try:
            if isinstance(row, DataError):
                raise row
            example = parse_example(record, root=root, line=line, require_audio=require_audio, benchmark=benchmark)
            if example.id in seen:
                raise DataError(f'"id" {example.id!r} was used at {seen[example.id]}; each example needs its own id')
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{line}: {error}") from None
            bad.append(BadExample(line, as_text(record.get("id")) or "", str(error)))
        else:
            seen[example.id] = line
            examples.append(example)
    if not examples:
        first = f"all {len(bad)} are bad, first {bad[0].line}: {bad[0].reason}" if bad else "the file is empty"
        raise DataError(f"{path}: no examples: {first}; expected JSON objects with {', '.join(KEYS)}")
    return examples, bad


def parse_example(
    record: dict, *, root: Path, line: str, require_audio: bool = True, benchmark: bool = False
) -> Example:
    """The example of a record, its clip relative to `root`; DataError, without the line, if it cannot be used."""
    optional = {"audio_path": not require_audio, "answer": benchmark}
    needed = [key for key in KEYS if not optional.get(key)]
    for key in needed:
        if record.get(key) is None:
            raise DataError(f'"{key}" is missing; each line needs {", ".join(needed)}')
    identity = record["id"]
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise DataError(f'"id" is {reprlib.repr(identity)}; expected text or an integer')
    choices = _choices(record["multi_choice"], distinct=not benchmark)
    audio_path = _text(record, "audio_path")
    if not audio_path and (require_audio or "audio_path" in record and record["audio_path"] is not None):
        raise DataError('"audio_path" is empty; expected the path of the clip')
    truth = _text(record, "answer") if benchmark and isinstance(record.get("answer"), str) else ""
    question = _text(record, "question_text")
    if not question.strip():
        raise DataError('"question_text" is empty; expected the question')
    return Example(
        id=str(identity),
        audio_path=root / audio_path if audio_path else None,
        question=question,
        choices=choices,
        answer=None if record.get("answer") is None or truth else _answer(record["answer"], choices),
        truth=truth,
        dataset=_text(record, "dataset_name"),
        task=_label(record, "task"),
        category=_label(record, "category"),
        sub_category=_label(record, "sub_category"),
        difficulty=_label(record, "difficulty"),
        line=line,
    )


def _text(record: dict, key: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f'"{key}" is {reprlib.repr(value)}; expected text')
    return value or ""


def _label(record: dict, key: str) -> str:
    """A text, or the texts of a list joined by commas, since some benchmarks give a question several categories."""
    value = record.get(key)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    if value is not None and not isinstance(value, str):
        raise DataError(f'"{key}" is {reprlib.repr(value)}; expected text or a list of texts')
    return value or ""


def _choices(value: object, *, distinct: bool) -> tuple[str, ...]:
    """The choices. `distinct`: they must differ when normalised, since equal ones could never be answered right."""
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise DataError(f'"multi_choice" is {reprlib.repr(value)}; expected a list of texts')
    if len(value) < 2:
        raise DataError(f'"multi_choice" has {len(value)} choices; expected at least 2')
    if distinct:
        _check_distinct(value)
    return tuple(value)


def _check_distinct(choices: list[str]) -> None:
    seen: dict[str, str] = {}
    for choice in choices:
        key = normalise(choice)
        if not key:
            raise DataError(f'"multi_choice" holds {choice!r}, which is empty; expected text in every choice')
        if key in seen:
            raise DataError(
                f'"multi_choice" repeats {seen[key]!r} as {choice!r}; '
                "choices must differ in more than case, spaces, quotes and a trailing dot"
            )
        seen[key] = choice


def _answer(value: object, choices: tuple[str, ...]) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(
            f'"answer" is {reprlib.repr(value)}; expected the index of the right choice, 0 to {len(choices) - 1}'
        )
    if not 0 <= value < len(choices):
        raise DataError(f'"answer" is {value}, out of range; expected 0 to {len(choices) - 1} for these choices')
    return value
