"""The benchmarks by name: the rule of each, and the answer file that its official script reads."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hark.data.benchmarks.report import Share
from hark.data.benchmarks.rules import (
    LETTERS,
    Rule,
    Value,
    mmau,
    mmsu,
    strict,
    without_letter,
    without_prediction,
)
from hark.data.choices import extract_answer, normalise
from hark.data.errors import named
from hark.data.examples import Example, is_right

Record = Callable[[Example], dict]


def mmau_record(example: Example) -> dict:
    return _asked(example, audio="audio_id") | {
        "choices": list(example.choices),
        "answer": _answer(example),
        "dataset": example.dataset,
        "task": example.task,
        **_labels(example),
        "difficulty": example.difficulty,
    }


def mmar_record(example: Example) -> dict:
    answer = {"choices": list(example.choices), "answer": _answer(example)}
    return _asked(example) | answer | {"modality": example.task, **_labels(example)}


def mmsu_record(example: Example) -> dict:
    choices = {f"choice_{letter.lower()}": choice for letter, choice in zip(LETTERS, example.choices, strict=False)}
    answer = {"answer_gt": _answer(example)}
    return _asked(example) | choices | answer | {"task_name": example.task, **_labels(example)}


def _asked(example: Example, audio: str = "audio_path") -> dict:
    clips = ", ".join(str(clip) for clip in example.clips)
    return {"id": example.id, audio: clips, "question": example.question}


def _labels(example: Example) -> dict:
    return {"category": example.category, "sub-category": example.sub_category}


def answer_text(example: Example) -> str | None:
    """The right answer; None where the benchmark does not publish it."""
    return example.answer_text if example.has_answer else None


def _answer(example: Example) -> str | list[str]:
    """The right answer in an answer file: "" where it is not known, a list where several are accepted."""
    return list(example.accepted) if len(example.accepted) > 1 else answer_text(example) or ""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's rule, and the answer file of its official script: one `record` with a prediction per question."""

    rule: Rule
    key: str  # of the prediction in a row of the answer file
    also: tuple[str, ...] = ()  # other keys, which other versions of the script read
    record: Record = mmau_record
    left_out: Callable[[object], bool] | None = None  # which predictions the script does not count; None: no script
    default: str | None = None  # what the script takes as the prediction of a row without one
    lettered: bool = False  # the script reads a letter, so a choice is written as "B. rain"
    lines: bool = False  # whether the answer file has JSON lines; else it is a JSON array

    @property
    def keys(self) -> tuple[str, ...]:
        return self.key, *self.also

    def official(self, prediction: object, choices: Sequence[Value], answer: Value) -> bool | None:
        """Whether the official script counts a row as right; None where it leaves the row out or there is no script.

        prediction: as it is in the file, `default` if the row has none.
        """
        if self.left_out is None or self.left_out(prediction):
            return None
        return self.rule(str(prediction), choices, answer)


BENCHMARKS: dict[str, Benchmark] = {
    "strict": Benchmark(strict, "model_prediction"),
    "mmau": Benchmark(mmau, "model_output", ("model_prediction",), left_out=without_prediction),
    "mmar": Benchmark(
        mmau, "answer_prediction", ("model_prediction",), record=mmar_record, left_out=without_prediction
    ),
    "mmsu": Benchmark(
        mmsu, "response", record=mmsu_record, left_out=without_letter, default="", lettered=True, lines=True
    ),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; an unknown name is a DataError that suggests the nearest."""
    return named(BENCHMARKS, name, kind="benchmark")


def prediction_of(completion: str, choices: Sequence[str], benchmark: Benchmark) -> str:
    """The answer in a completion, as it is graded and written; empty if its answer tags are not well-formed.

    For a benchmark with letters, an answer that equals a choice is written with the choice's letter.
    """
    text = extract_answer(completion) or ""
    if benchmark.lettered and text:
        equal = [index for index, choice in enumerate(choices[: len(LETTERS)]) if normalise(choice) == normalise(text)]
        if equal and len({choices[index] for index in equal}) == 1:
            return f"{LETTERS[equal[0]]}. {choices[equal[0]]}"
    return text


def graded(example: Example, completion: str, benchmark: Benchmark) -> bool | None:
    """Whether a completion is right by the benchmark's rule; None where the right answer is not known.

    An open question is graded as the accuracy reward does, whatever the benchmark is.
    """
    if not example.choices:
        return is_right(example, completion)
    answer = answer_text(example)
    if answer is None:
        return None
    return benchmark.rule(prediction_of(completion, example.choices, benchmark), example.choices, answer)


def official_share(answers: Iterable[tuple[Example, str]], benchmark: Benchmark) -> Share:
    """The share of right answers by the official script, of the (example, completion) pairs that it counts."""
    results = [
        benchmark.official(
            prediction_of(completion, example.choices, benchmark), example.choices, answer_text(example) or ""
        )
        for example, completion in answers
    ]
    return Share.of(results)


def write_answers(stem: Path, answers: Iterable[tuple[Example, str]], benchmark: Benchmark) -> Path:
    """Write (example, completion) pairs to STEM.json or STEM.jsonl, as the benchmark's script reads them."""
    rows = []
    for example, completion in answers:
        prediction = prediction_of(completion, example.choices, benchmark)
        rows.append(benchmark.record(example) | dict.fromkeys(benchmark.keys, prediction))
    path = stem.with_suffix(".jsonl" if benchmark.lines else ".json")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines if benchmark.lines else json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path
