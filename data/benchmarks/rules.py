"""How the benchmarks judge a prediction, and the answer files that their own scripts read.

Each has its quirks, kept because figures are only comparable under the same rule. Plain Python: scoring a file waits
for no framework to load.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hark.data.choices import extract_answer, is_correct, normalise
from hark.data.errors import DataError, named
from hark.data.examples import Example

Rule = Callable[[str, Sequence[str], str], bool]  # (prediction, choices, the right choice's text) -> is it right?
Record = Callable[[Example], dict]
LETTERS = ("A", "B", "C", "D")


def place(answer: str, choices: Sequence[str]) -> int:
    """The index of the answer among the choices, the first of equals; DataError if it is none of them."""
    if answer in choices:
        return list(choices).index(answer)
    for index, choice in enumerate(choices):
        if normalise(choice) == normalise(answer):
            return index
    raise DataError(f'"answer" {answer!r} is none of the choices {list(choices)}; expected the text of the right one')


def strict(prediction: str, choices: Sequence[str], answer: str) -> bool:
    """The rule of the accuracy reward: equal to the right choice and to no other, never by containment."""
    return is_correct(prediction, choices, place(answer, choices))


def words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


def mmau(prediction: str, choices: Sequence[str], answer: str) -> bool:
    """All words of the answer, and none that only wrong choices have; their order and number do not matter.

    Sakshi et al. 2024, arXiv:2410.19168, evaluation.py; MMAR (Ma et al. 2025, arXiv:2505.13032) took it over.
    """
    given, right = words(prediction), words(answer)
    wrong = set().union(*(words(choice) - right for choice in choices))
    return bool(given) and right <= given and given.isdisjoint(wrong)


def mmsu(prediction: str, choices: Sequence[str], answer: str) -> bool:
    """The letter that a prediction begins with, as in "B. rain", or else its second-last character, as in "It is B."

    Wang et al. 2025, arXiv:2506.04779. Only capital letters count, and "Dogs" begins with one.
    """
    text, right = prediction.strip(), place(answer, choices)
    letter = text[0] if text.startswith(LETTERS) else text[-2:-1]
    return letter in LETTERS and LETTERS.index(letter) == right


# Answer files -------------------------------------------------------------------------------------------------------


def mmau_record(example: Example) -> dict:
    return {
        "id": example.id,
        "audio_id": str(example.audio_path or ""),
        "question": example.question,
        "choices": list(example.choices),
        "answer": answer_text(example),
        "dataset": example.dataset,
        "task": example.task,
        "category": example.category,
        "sub-category": example.sub_category,
        "difficulty": example.difficulty,
    }


def mmar_record(example: Example) -> dict:
    return {
        "id": example.id,
        "audio_path": str(example.audio_path or ""),
        "question": example.question,
        "choices": list(example.choices),
        "answer": answer_text(example),
        "modality": example.task,
        "category": example.category,
        "sub-category": example.sub_category,
    }


def mmsu_record(example: Example) -> dict:
    choices = {f"choice_{letter.lower()}": choice for letter, choice in zip(LETTERS, example.choices, strict=False)}
    return {
        "id": example.id,
        "audio_path": str(example.audio_path or ""),
        "question": example.question,
        **choices,
        "answer_gt": answer_text(example),
        "task_name": example.task,
        "category": example.category,
        "sub-category": example.sub_category,
    }


def answer_text(example: Example) -> str | None:
    """The right choice, or None where the benchmark keeps it to itself."""
    return example.truth or (None if example.answer is None else example.choices[example.answer])


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's rule, and how its script wants the answers: a JSON list, or lines, of `record` and prediction."""

    rule: Rule
    key: str  # of the prediction in a row of its answer file
    also: tuple[str, ...] = ()  # keys that other versions of its script read instead
    record: Record = mmau_record
    lettered: bool = False  # the script looks for a letter, so a choice is written "B. rain"
    lines: bool = False  # the answer file is JSON lines


BENCHMARKS: dict[str, Benchmark] = {
    "strict": Benchmark(strict, "model_prediction"),
    "mmau": Benchmark(mmau, "model_prediction", also=("model_output",)),
    "mmar": Benchmark(mmau, "answer_prediction", also=("model_prediction",), record=mmar_record),
    "mmsu": Benchmark(mmsu, "response", record=mmsu_record, lettered=True, lines=True),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; an unknown name is a DataError that offers the nearest."""
    return named(BENCHMARKS, name, kind="benchmark")


def prediction_of(completion: str, choices: Sequence[str], benchmark: Benchmark) -> str:
    """What a completion answers, as it is judged and handed in; empty where its tags leave that open."""
    text = extract_answer(completion) or ""
    if benchmark.lettered:
        for index, letter in enumerate(LETTERS[: len(choices)]):
            if is_correct(text, choices, index):
                return f"{letter}. {choices[index]}"
    return text


def judged(example: Example, completion: str, benchmark: Benchmark) -> bool | None:
    """Whether a completion is right by the benchmark's rule; None where the right answer is not known."""
    answer = answer_text(example)
    if answer is None:
        return None
    if example.truth and benchmark.rule is not mmau:
        return False  # the other rules compare with a choice, and none is right
    return benchmark.rule(prediction_of(completion, example.choices, benchmark), example.choices, answer)


def write_answers(stem: Path, answers: Iterable[tuple[Example, str]], benchmark: Benchmark) -> Path:
    """Write (example, completion) pairs to STEM.json, or STEM.jsonl, as the benchmark's script reads them."""
    rows = []
    for example, completion in answers:
        prediction = prediction_of(completion, example.choices, benchmark)
        rows.append(benchmark.record(example) | dict.fromkeys((benchmark.key, *benchmark.also), prediction))
    path = stem.with_suffix(".jsonl" if benchmark.lines else ".json")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines if benchmark.lines else json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path
