"""Score predictions that stand in a file, whoever made them; plain Python, no model and no framework is loaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hark.data.benchmarks.report import figures, share, table
from hark.data.benchmarks.rules import LETTERS, Rule, find_benchmark, place
from hark.data.errors import DataError
from hark.data.examples import Example

PREDICTIONS = ("model_prediction", "model_output", "answer_prediction", "prediction", "response")  # the first is taken


@dataclass(frozen=True)
class Prediction:
    """One row of an answer file; `answer` is None where the benchmark keeps it to itself."""

    where: str  # "answers.json, row 3", or "answers.jsonl:3"
    id: Any
    choices: tuple[str, ...]
    answer: str | None
    prediction: str | None  # None where the row has none, which is wrong
    task: str
    category: str
    sub_category: str
    difficulty: str


def score_file(path: str, *, benchmark: str, out: str | None) -> None:
    """Judge every row of a file by a benchmark's rule, print the table, and write the figures to `out`."""
    found = find_benchmark(benchmark)
    predictions = read_predictions(path, keys=(found.key, *found.also))
    rows = score(predictions, found.rule)
    examples = [example for prediction in predictions if (example := as_example(prediction)) is not None]
    missing = sum(prediction.prediction is None for prediction in predictions)
    print(f"{path}: {len(rows)} rows by the rule of {benchmark}")
    if missing:
        print(f"{missing} rows have no prediction and count as wrong; it is looked for in {', '.join(PREDICTIONS)}")
    hidden = len(rows) - share(rows).total
    if hidden:
        print(f"{hidden} rows have no right answer and are left out of the figures")
    print(table(rows, examples, {}) if hidden < len(rows) else "no row has a right answer: nothing can be scored")
    if out is not None:
        result = {"file": path, "benchmark": benchmark} | figures(rows, examples, {})
        write_json(out, result | {"missing_predictions": missing, "rows": rows})


def score(predictions: Sequence[Prediction], rule: Rule) -> list[dict]:
    """One row per prediction, in order; `correct` is None where the right answer is not known."""
    return [
        {
            "id": prediction.id,
            "correct": _judged(prediction, rule),
            "prediction": prediction.prediction or "",
            "task": prediction.task,
            "category": prediction.category,
            "sub_category": prediction.sub_category,
            "difficulty": prediction.difficulty,
        }
        for prediction in predictions
    ]


def _judged(prediction: Prediction, rule: Rule) -> bool | None:
    if prediction.answer is None:
        return None
    try:
        return rule(prediction.prediction or "", prediction.choices, prediction.answer)
    except DataError as error:
        raise DataError(f"{prediction.where}: {error}") from None


def as_example(prediction: Prediction) -> Example | None:
    """The question for the baselines, or None where its answer is not known or none of the choices."""
    try:
        answer = None if prediction.answer is None else place(prediction.answer, prediction.choices)
    except DataError:
        return None
    return Example(str(prediction.id), None, "", prediction.choices, answer)


def write_json(path: str | Path, value: dict) -> None:
    """Write a JSON file, with its directory; DataError if that cannot be done."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error


# Reading ------------------------------------------------------------------------------------------------------------


def read_predictions(path: str | Path, *, keys: Sequence[str] = ()) -> list[Prediction]:
    """The rows of a JSON list or of JSON lines; DataError that says where, what and how to fix it.

    keys: of the prediction, those to look for before all others.
    """
    records = _records(Path(path))
    if not records:
        raise DataError(f"{path}: holds no rows; expected a JSON list of objects, or one JSON object per line")
    predictions = []
    for number, (where, record) in enumerate(records, start=1):
        try:
            predictions.append(_prediction(record, where, number, keys))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    return predictions


def _records(path: Path) -> list[tuple[str, Any]]:
    """Every row with where it stands; a file that begins with [ is one list, any other is lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); expected a file of predictions"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}); expected a JSON list, or JSON lines") from None
    if text.lstrip().startswith("["):
        return [(f"{path.name}, row {n}", row) for n, row in enumerate(_json(text, str(path)), start=1)]
    lines = [(f"{path.name}:{n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [(where, _json(line, where)) for where, line in lines]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON ({error}); expected a JSON list of objects, or one JSON object per line"
        ) from None


def _prediction(record: Any, where: str, number: int, keys: Sequence[str]) -> Prediction:
    if not isinstance(record, dict):
        raise DataError(
            f"is a JSON {type(record).__name__}; each row is an object with choices, answer and a prediction"
        )
    identity = record.get("id")
    return Prediction(
        where=where,
        id=identity if isinstance(identity, (str, int)) else number,
        choices=_choices(record),
        answer=_answer(record),
        prediction=next((_text(record[key]) for key in (*keys, *PREDICTIONS) if key in record), None),
        task=_label(record, "task", "modality", "task_name"),
        category=_label(record, "category"),
        sub_category=_label(record, "sub-category", "sub_category", "subcategory"),
        difficulty=_label(record, "difficulty"),
    )


def _choices(record: dict) -> tuple[str, ...]:
    """The `choices`, or MMSU's choice_a to choice_d."""
    lettered = [record.get(f"choice_{letter.lower()}") for letter in LETTERS]
    value = record.get("choices", [choice for choice in lettered if choice is not None] or None)
    if value is None:
        raise DataError(
            '"choices" is missing; the rule needs the texts of all choices: add the benchmark\'s own fields'
        )
    if not isinstance(value, list) or not value or not all(map(_is_text, value)):
        raise DataError(f'"choices" is {value!r}; expected a list of texts')
    return tuple(map(str, value))


def _answer(record: dict) -> str | None:
    """The `answer`, or MMSU's answer_gt; null or empty where the benchmark keeps it to itself."""
    key = "answer" if "answer" in record else "answer_gt"
    if key not in record:
        raise DataError('"answer" is missing; expected the text of the right choice, or null where it is not known')
    if record[key] is not None and not _is_text(record[key]):
        raise DataError(f'"{key}" is {record[key]!r}; expected the text of the right choice, or null')
    return None if record[key] in (None, "") else str(record[key])


def _is_text(value: Any) -> bool:
    """A text, or a number: MMSU has choices such as 3."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _label(record: dict, *keys: str) -> str:
    """The first of the keys that the row has; a list of labels is one label, joined by commas."""
    value = next((record[key] for key in keys if record.get(key) is not None), "")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
