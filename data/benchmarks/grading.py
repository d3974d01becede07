"""Grades the predictions in a file, of any model. Plain Python, no model and no framework is imported."""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hark.data.benchmarks.answer_files import Benchmark, find_benchmark
from hark.data.benchmarks.report import Share, figures, row_of, share, table
from hark.data.benchmarks.rules import LETTERS, Value, index_of
from hark.data.choices import is_accepted
from hark.data.errors import DataError
from hark.data.examples import Example
from hark.data.json_files import LARGEST_VALUE, as_text, read_rows, write_json
from hark.shown import say, say_text

PREDICTIONS = ("model_prediction", "model_output", "answer_prediction", "prediction", "response")  # the first counts
SHOWN = 5  # rows that the console names; the JSON file has all


@dataclass(frozen=True)
class AnswerRow:
    """One row of an answer file; values are as they are in the file, null is None."""

    where: str  # "answers.json[3]" or "answers.jsonl:3"
    id: str | int
    choices: tuple[Value, ...]  # always four if the keys are choice_a to choice_d, "" for a missing one
    accepted: tuple[Value, ...]  # the right answer, or the accepted ones of an open question; (None,) or ("",) where
    # the benchmark does not publish it
    prediction: Value  # None where the row has none
    official_prediction: Value  # the value that the official script reads, None where it finds none
    task: str
    category: str
    sub_category: str
    difficulty: str

    @property
    def answer(self) -> Value:
        return self.accepted[0]


def grade_file(path: str, *, benchmark: str, out: str | None) -> None:
    """Grade every row of a file by a benchmark's rule, print the table, and write all figures and rows to `out`."""
    found = find_benchmark(benchmark)
    answers = read_answers(path, found)
    rows = grade(answers, found)
    examples = [example for answer in answers if (example := as_example(answer)) is not None]
    others = {} if found.left_out is None else {"official": Share.of([row["official"] for row in rows])}
    missing = sum(answer.prediction is None for answer in answers)
    say(f"{path}: {len(rows)} rows by the rule of {benchmark}")
    if missing:
        keys = ", ".join(dict.fromkeys((*found.keys, *PREDICTIONS)))
        say(f"{missing} rows have no prediction and count as wrong; the keys that are read are {keys}")
    _name(answers, rows, lambda answer, row: row["correct"] is None, "have no right answer and are left out")
    _name(answers, rows, lambda answer, row: _is_no_choice(answer), "have an answer that is none of their choices")
    if others:
        _name(answers, rows, lambda answer, row: row["official"] is None, f"are left out by the script of {benchmark}")
    graded = table(rows, examples, others) if share(rows).total else "no row has a right answer: nothing can be graded"
    say_text(graded)
    if out is not None:
        result = {"file": path, "benchmark": benchmark} | figures(rows, examples, others)
        write_json(out, result | {"missing_predictions": missing, "rows": rows})


def _name(answers: list[AnswerRow], rows: list[dict], chosen: Callable[[AnswerRow, dict], bool], what: str) -> None:
    """Print how many rows are chosen, and the first of them."""
    places = [answer.where for answer, row in zip(answers, rows, strict=True) if chosen(answer, row)]
    if places:
        say(f"{len(places)} rows {what}: {', '.join(places[:SHOWN])}{', ...' if len(places) > SHOWN else ''}")


def grade(answers: Sequence[AnswerRow], benchmark: Benchmark) -> list[dict]:
    """One row per answer, in order.

    correct: None if the right answer is not known. official: whether the official script counts the row as right, None
    if it leaves the row out.
    """
    rows = []
    for answer in answers:
        prediction = as_text(answer.prediction) or ""
        row = row_of(answer, prediction=prediction, correct=_is_correct(answer, prediction, benchmark), stopped=None)
        official = benchmark.official(answer.official_prediction, answer.choices, answer.answer)
        rows.append(row | {"official": official if answer.choices else None})
    return rows


def _is_correct(answer: AnswerRow, prediction: str, benchmark: Benchmark) -> bool | None:
    if _is_unknown(answer):
        return None
    if answer.choices:
        return benchmark.rule(prediction, answer.choices, answer.answer)
    return is_accepted(prediction, [as_text(text) or "" for text in answer.accepted])


def as_example(answer: AnswerRow) -> Example | None:
    """The question for the baselines; None where its right answer is not known or none of the choices."""
    if _is_unknown(answer) or _is_no_choice(answer):
        return None
    given = [choice for choice in answer.choices if choice not in (None, "")]
    index, accepted = (index_of(answer.answer, given), ()) if given else (None, tuple(map(str, answer.accepted)))
    return Example(str(answer.id), (), "", tuple(map(str, given)), index, accepted=accepted)


def _is_unknown(answer: AnswerRow) -> bool:
    return answer.answer in (None, "")


def _is_no_choice(answer: AnswerRow) -> bool:
    return bool(answer.choices) and not _is_unknown(answer) and index_of(answer.answer, answer.choices) is None


# Reading ------------------------------------------------------------------------------------------------------------


def read_answers(path: str | Path, benchmark: Benchmark) -> list[AnswerRow]:
    """The rows of a JSON array or of JSON lines; DataError that says where, what and how to fix it."""
    records = []
    if Path(path).is_file() and Path(path).stat().st_size > LARGEST_VALUE:
        raise DataError(f"{path}: has more than {LARGEST_VALUE >> 20} MB; expected the answers to a benchmark")
    for where, record in read_rows(path):
        if isinstance(record, DataError):
            raise DataError(f"{where}: {record}")
        records.append((where, record))
    if not records:
        raise DataError(f"{path}: holds no rows; expected a JSON array of objects, or one JSON object per line")
    official = next((key for key in benchmark.keys if any(key in record for _, record in records)), benchmark.key)
    answers = []
    for number, (where, record) in enumerate(records, start=1):
        try:
            answers.append(_answer_row(record, where, number, benchmark, official))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    return answers


def _answer_row(record: dict, where: str, number: int, benchmark: Benchmark, official: str) -> AnswerRow:
    identity, choices = record.get("id"), _choices(record)
    key = next((key for key in (*benchmark.keys, *PREDICTIONS) if key in record), benchmark.key)
    return AnswerRow(
        where=where,
        id=identity if isinstance(identity, (str, int)) else number,
        choices=choices,
        accepted=_accepted(record, is_open=not choices),
        prediction=_value(record, key, None),
        official_prediction=_value(record, official, benchmark.default),
        task=_label(record, "task", "modality", "task_name"),
        category=_label(record, "category"),
        sub_category=_label(record, "sub-category", "sub_category", "subcategory"),
        difficulty=_label(record, "difficulty"),
    )


def _choices(record: dict) -> tuple[Value, ...]:
    """The list `choices`, or MMSU's choice_a to choice_d, where a missing or null choice keeps its letter.

    The list is empty for an open question.
    """
    lettered = [f"choice_{letter.lower()}" for letter in LETTERS]
    if "choices" not in record and any(key in record for key in lettered):
        return tuple(_value(record, key, "") for key in lettered)
    value = record.get("choices")
    if value is None:
        raise DataError('"choices" is missing; the rule needs the texts of all choices: copy them from the benchmark')
    if not isinstance(value, list) or any(as_text(choice) is None for choice in value):
        raise DataError(f'"choices" is {reprlib.repr(value)}; expected a list of texts')
    return tuple(value)


def _accepted(record: dict, *, is_open: bool) -> tuple[Value, ...]:
    """The `answer`, or MMSU's answer_gt; of an open question it may be a list of accepted answers."""
    key = "answer" if "answer" in record else "answer_gt"
    if key not in record:
        raise DataError('"answer" is missing; expected the text of the right choice, or null where it is not known')
    if is_open and isinstance(record[key], list) and record[key]:
        return tuple(_value({key: one}, key, None) for one in record[key])
    return (_value(record, key, None),)


def _value(record: dict, key: str, default: Value) -> Value:
    """The text, number or null at a key; `default` where the row does not have it."""
    value = record.get(key, default)
    if value is not None and as_text(value) is None:
        raise DataError(f'"{key}" is a JSON {type(value).__name__}; expected text, a number or null')
    return value


def _label(record: dict, *keys: str) -> str:
    """The text at the first of the keys that the row has, "" without any; the texts of a list are joined by commas."""
    key = next((key for key in keys if record.get(key) is not None), None)
    parts: list[Any] = [] if key is None else record[key] if isinstance(record[key], list) else [record[key]]
    if any(as_text(part) is None for part in parts):
        raise DataError(f'"{key}" is {reprlib.repr(record[key])}; expected text or a list of texts')
    return ", ".join(map(str, parts))
