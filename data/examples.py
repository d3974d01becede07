"""Questions about audio clips, with choices or open, read from files in an extension of the R1-AQA format."""

import difflib
import itertools
import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hark.data.chat import AUDIO, Turn
from hark.data.choices import is_accepted, is_correct, normalise
from hark.data.clip import Cell, Clip
from hark.data.errors import DataError, named
from hark.data.json_files import as_text, read_rows
from hark.data.tables import is_table, read_table

KEYS = ("id", "audio_path", "question_text", "answer")  # that each row needs
LATEST = 1e8  # seconds, three years; a window that begins or ends later is a mistake
OPTIONAL = (
    "audio_paths", "start", "end", "multi_choice", "system", "messages",
    "dataset_name", "task", "category", "sub_category", "difficulty", "pass_rate", "target",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One question with its clips, and its right answer if that is known.

    A question with choices has the index of the right one as its `answer`; an open question has the accepted texts. In
    a benchmark, a question with choices may have neither, or an accepted text that is none of the choices.
    """

    id: str
    clips: tuple[Clip, ...]
    question: str
    choices: tuple[str, ...] = ()  # none: an open question
    answer: int | None = None  # the index of the right choice
    dataset: str = ""
    task: str = ""
    category: str = ""
    line: str = ""  # where it was read: "data/train.jsonl:17"
    sub_category: str = ""
    difficulty: str = ""
    accepted: tuple[str, ...] = ()  # right answers as texts, where there is no right choice; SFT trains on the first
    system: str = ""
    messages: tuple[Turn, ...] = ()  # earlier turns of the user and the assistant
    pass_rate: float | None = None  # measured share of right answers, 0 to 1
    target: str = ""  # the completion that SFT trains on, where it is not the answer in the form of the template
    part: int = 0  # which of several files it is from
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), compare=False)  # all other keys
    seconds: float | None = field(default=None, compare=False)  # of all clips; None until they were decoded
    digests: tuple[str, ...] = field(default=(), compare=False)  # of the clips' files; empty until they were decoded
    fault: str = field(default="", compare=False)  # why a clip that was good at the beginning of the run is no more

    @property
    def has_answer(self) -> bool:
        return self.answer is not None or bool(self.accepted)

    @property
    def answer_text(self) -> str:
        """The right choice, or the first accepted text; DataError where the answer is not known."""
        if not self.has_answer:
            raise DataError(f"{self.line or self.id}: has no answer; expected one to train on or to compare with")
        return self.accepted[0] if self.answer is None else self.choices[self.answer]


def is_right(example: Example, completion: str) -> bool | None:
    """Whether the completion has the right choice or an accepted text; None where the answer is not known."""
    if not example.has_answer:
        return None
    if example.choices:
        return is_correct(completion, example.choices, example.answer)
    return is_accepted(completion, example.accepted)


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
    columns: Mapping[str, str] = MappingProxyType({}),
    require_audio: bool = True,
    skip_bad: bool = False,
    benchmark: bool = False,
    allow_outside: bool = False,
) -> tuple[list[Example], list[BadExample]]:
    """The good questions of a file, and the bad ones; see `load_questions`."""
    questions = load_questions(
        path,
        audio_root=audio_root,
        columns=columns,
        require_audio=require_audio,
        skip_bad=skip_bad,
        benchmark=benchmark,
        allow_outside=allow_outside,
    )
    good = [question for question in questions if isinstance(question, Example)]
    return good, [question for question in questions if isinstance(question, BadExample)]


def load_questions(
    path: str | Path,
    *,
    audio_root: str | Path | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
    require_audio: bool = True,
    skip_bad: bool = False,
    benchmark: bool = False,
    allow_outside: bool = False,
) -> list[Example | BadExample]:
    """Read a file of questions, in its order: JSON, JSON lines, parquet, or a data set `hf:NAME:SPLIT`.

    Each row needs KEYS. The paths of clips are relative to `audio_root`, or else to the directory of the file; without
    `require_audio` there may be no clip. The first bad row raises DataError; with `skip_bad`, bad rows are returned
    instead. A file without a good example always raises DataError.

    columns: the names of the keys that have another name in the file. benchmark: accept what is an error in training
    data: two choices that are equal when normalised, and an `answer` to a question with choices that is null, absent,
    or a text. allow_outside: accept clips that lie outside of `audio_root`, or of the directory of the file.
    """
    _check_columns(columns)
    root = None if audio_root is None else Path(audio_root)
    audio = [columns[key] for key in ("audio_path", "audio_paths") if key in columns]
    rows = read_table(str(path), root, audio) if is_table(path) else _file_rows(Path(path), root)
    keys = {name: key for key, name in columns.items()}
    questions: list[Example | BadExample] = []
    seen: dict[str, str] = {}
    for line, folder, row in rows:
        record = _renamed(row, keys) if isinstance(row, dict) else {}
        try:
            if isinstance(row, DataError):
                raise row
            example = parse_example(record, root=folder, line=line, require_audio=require_audio, benchmark=benchmark)
            if not allow_outside:
                _check_inside(example, folder)
            if example.id in seen:
                raise DataError(f'"id" {example.id!r} was used at {seen[example.id]}; each example needs its own id')
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{line}: {error}") from None
            questions.append(BadExample(line, as_text(record.get("id")) or "", str(error)))
        else:
            seen[example.id] = line
            questions.append(example)
    if not seen:
        first = next((question for question in questions if isinstance(question, BadExample)), None)
        reason = f"all {len(questions)} are bad, first {first.line}: {first.reason}" if first else "the file is empty"
        raise DataError(f"{path}: no examples: {reason}; expected JSON objects with {', '.join(KEYS)}")
    return questions


def _check_inside(example: Example, folder: Path) -> None:
    """DataError for a clip whose path leaves the folder, by "..", as an absolute path, or by a link."""
    root = os.path.realpath(folder)
    for source in (clip.source for clip in example.clips if isinstance(clip.source, Path)):
        if os.path.commonpath([root, os.path.realpath(source)]) != root:
            raise DataError(
                f"the clip {source} is outside of {folder}; expected it inside; set data.audio_root to a directory "
                "that holds all clips, or data.allow_outside=true (a command: --allow-outside)"
            )


def _file_rows(path: Path, root: Path | None) -> Iterator[tuple[str, Path, dict | DataError]]:
    for name, row in read_rows(path):
        yield str(path.parent / name), root or path.parent, row


def _renamed(row: dict, keys: Mapping[str, str]) -> dict:
    """The row with other names of its keys; `keys` maps the old to the new."""
    if not keys:
        return row
    kept = {name: value for name, value in row.items() if name not in keys}
    return kept | {key: row[name] for name, key in keys.items() if name in row}


def _check_columns(columns: Mapping[str, str]) -> None:
    known = dict.fromkeys((*KEYS, *OPTIONAL), "")
    for key in columns:
        named(known, key, kind="key in columns")


def joined(parts: Sequence[Sequence[Example]]) -> list[Example]:
    """The examples of several files, with their `part`. An id that an earlier file uses gets a number: id#2."""
    if len(parts) == 1:
        return list(parts[0])
    result, used = [], set()
    for part, examples in enumerate(parts):
        for example in examples:
            numbered = (f"{example.id}#{number}" for number in itertools.count(2))
            name = next(name for name in itertools.chain([example.id], numbered) if name not in used)
            used.add(name)
            result.append(replace(example, id=name, part=part))
    return result


# One row ------------------------------------------------------------------------------------------------------------


def parse_example(
    record: dict, *, root: Path, line: str, require_audio: bool = True, benchmark: bool = False
) -> Example:
    """The example of a record, its clips relative to `root`; DataError, without the line, if it cannot be used."""
    _check_keys(record, require_audio=require_audio, benchmark=benchmark)
    identity = record["id"]
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise DataError(f'"id" is {reprlib.repr(identity)}; expected text or an integer')
    choices = _choices(record["multi_choice"], distinct=not benchmark) if record.get("multi_choice") else ()
    question = _text(record, "question_text")
    if not question.strip():
        raise DataError('"question_text" is empty; expected the question')
    answer, accepted = _answer(record, choices, benchmark=benchmark)
    example = Example(
        id=str(identity),
        clips=_clips(record, root),
        question=question,
        choices=choices,
        answer=answer,
        accepted=accepted,
        system=_text(record, "system"),
        messages=_turns(record.get("messages") or []),
        dataset=_text(record, "dataset_name"),
        task=_label(record, "task"),
        category=_label(record, "category"),
        sub_category=_label(record, "sub_category"),
        difficulty=as_text(record.get("difficulty")) or _label(record, "difficulty"),
        pass_rate=_share(record, "pass_rate"),
        target=_text(record, "target"),
        line=line,
        extra=MappingProxyType({key: value for key, value in record.items() if key not in (*KEYS, *OPTIONAL)}),
    )
    _check_marks(example)
    return example


def _check_keys(record: dict, *, require_audio: bool, benchmark: bool) -> None:
    """DataError if a key is missing; it suggests the key of the record that may be meant."""
    open_null = "answer" in record and not record.get("multi_choice")  # a reward of one's own may need no answer
    optional = {
        "audio_path": not require_audio or bool(record.get("audio_paths")),
        "answer": benchmark or open_null,
    }
    needed = [key for key in KEYS if not optional.get(key)]
    for key in needed:
        if record.get(key) is None:
            hint = _meant(key, record)
            raise DataError(f'"{key}" is missing{hint}; each line needs {", ".join(needed)}')


def _meant(key: str, record: dict) -> str:
    """A question about the unknown key of the record that is nearest to `key`; "" if none is near."""
    unknown = [str(name) for name in record if name not in (*KEYS, *OPTIONAL)]
    near = difflib.get_close_matches(key, unknown, n=1)
    return f' (is it "{near[0]}"?)' if near else ""


def _clips(record: dict, root: Path) -> tuple[Clip, ...]:
    """The clips with their windows. A source is a path, or the cell of a table that holds the clip."""
    several = record.get("audio_paths")
    single = record.get("audio_path")
    if several is None:
        sources = [] if single is None else [single]
    elif single is not None:
        raise DataError('"audio_path" and "audio_paths" are both given; expected one of them')
    elif not isinstance(several, list):
        raise DataError(f'"audio_paths" is {reprlib.repr(several)}; expected a list of paths')
    else:
        sources = several
    name = "audio_path" if several is None else "audio_paths"
    starts, ends = (_times(record, key, len(sources), alone=several is None) for key in ("start", "end"))
    return tuple(
        _clip(source, root, start or 0.0, end, name) for source, start, end in zip(sources, starts, ends, strict=True)
    )


def _clip(source: object, root: Path, start: float, end: float | None, name: str) -> Clip:
    if isinstance(source, str):
        if not source:
            raise DataError(f'"{name}" is empty; expected the path of the clip')
        if "\0" in source:
            raise DataError(f'"{name}" is {reprlib.repr(source)}, which holds a character of code 0; expected a path')
        source = root / source
    elif source is None or isinstance(source, (bool, int, float, list, dict, bytes)):
        raise DataError(f'"{name}" is {reprlib.repr(source)}; expected text')
    if max(start, end or 0.0) > LATEST:
        raise DataError(f'"start" or "end" is over {LATEST:.0e} seconds; expected a time within the clip')
    if end is not None and end <= start:
        raise DataError(f'"end" is {end:.15g} and "start" is {start:.15g}; expected an end after the start')
    place: Path | Cell = source  # type: ignore[assignment]
    return Clip(place, start, end)


def _times(record: dict, key: str, clips: int, *, alone: bool) -> list[float | None]:
    """The seconds of `start` or `end` for each clip: a number for `audio_path`, a list for `audio_paths`."""
    value = record.get(key)
    if value is None:
        return [None] * clips
    if alone and not clips:
        raise DataError(f'"{key}" is {reprlib.repr(value)}, and there is no clip; expected "audio_path" beside it')
    values = [value] if alone else value
    if not isinstance(values, list) or len(values) != clips:
        raise DataError(f'"{key}" is {reprlib.repr(value)}; expected a list of {clips}, one for each of "audio_paths"')
    for one in values:
        is_number = isinstance(one, (int, float)) and not isinstance(one, bool)
        if one is not None and not (is_number and math.isfinite(one) and one >= 0):
            raise DataError(f'"{key}" is {reprlib.repr(one)}; expected seconds, 0 or more')
    return [None if one is None else float(one) for one in values]


def _turns(value: object) -> tuple[Turn, ...]:
    """The earlier turns of a conversation: the question follows, so the last of them is the assistant's."""
    if not isinstance(value, list):
        raise DataError(f'"messages" is {reprlib.repr(value)}; expected a list of {{"role": ..., "content": ...}}')
    turns = []
    for turn in value:
        role, content = (turn.get(key) if isinstance(turn, dict) else None for key in ("role", "content"))
        if role not in ("user", "assistant") or not isinstance(content, str):
            raise DataError(
                f'"messages" holds {reprlib.repr(turn)}; expected {{"role": "user" or "assistant", "content": text}}; '
                'a system prompt is written as "system"'
            )
        turns.append(Turn(role, content))
    if turns and turns[-1].role != "assistant":
        raise DataError('"messages" ends with a turn of the user; expected earlier turns; the last is "question_text"')
    return tuple(turns)


def _check_marks(example: Example) -> None:
    """DataError unless there is a mark for each clip, or none. Choices have none, since their order may change."""
    if any(AUDIO in choice for choice in example.choices):
        raise DataError(f'"multi_choice" holds {AUDIO}; expected it in "question_text" or an earlier text')
    texts = [example.system, *(turn.text for turn in example.messages), example.question]
    marks = sum(text.count(AUDIO) for text in texts)
    if marks not in (0, len(example.clips)):
        raise DataError(f"{marks} marks {AUDIO} for {len(example.clips)} clips; expected one for each clip, or none")


def _text(record: dict, key: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f'"{key}" is {reprlib.repr(value)}; expected text')
    return value or ""


def _share(record: dict, key: str) -> float | None:
    value = record.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value <= 1):
        raise DataError(f'"{key}" is {reprlib.repr(value)}; expected a number from 0 to 1')
    return None if value is None else float(value)


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


def _answer(record: dict, choices: tuple[str, ...], *, benchmark: bool) -> tuple[int | None, tuple[str, ...]]:
    """The index of the right choice, or None and the accepted texts."""
    value = record.get("answer")
    if value is None:
        return None, ()
    if not choices:
        return None, _accepted(value, record)
    if benchmark and isinstance(value, str):
        return None, (value,) if value else ()
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(
            f'"answer" is {reprlib.repr(value)}; expected the index of the right choice, 0 to {len(choices) - 1}'
        )
    if not 0 <= value < len(choices):
        raise DataError(f'"answer" is {value}, out of range; expected 0 to {len(choices) - 1} for these choices')
    return value, ()


def _accepted(value: object, record: dict) -> tuple[str, ...]:
    """The accepted texts of an open question: a text, a number, or a list of them."""
    if meant := _meant("multi_choice", record):
        raise DataError(f'"multi_choice" is missing{meant}; an open question has no such key')
    texts = [as_text(one) for one in (value if isinstance(value, list) else [value])]
    if not texts or any(text is None or not normalise(text) for text in texts):
        raise DataError(
            f'"answer" is {reprlib.repr(value)}, and there is no "multi_choice"; '
            "expected a text, a list of accepted texts, or null"
        )
    return tuple(text for text in texts if text is not None)
