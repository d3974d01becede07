"""data/benchmarks: the official rules, quirks included, and files that the official scripts can read."""

from __future__ import annotations

import itertools
import json
import random
import re
import string
from collections import Counter

import pytest

from hark.data.benchmarks.answer_files import (
    BENCHMARKS,
    find_benchmark,
    graded,
    official_share,
    prediction_of,
    write_answers,
)
from hark.data.benchmarks.grading import grade, read_answers
from hark.data.benchmarks.report import Share
from hark.data.benchmarks.rules import index_of, mmau, mmsu, strict
from hark.data.errors import DataError
from hark.data.examples import Example

CARS = ("Car", "Bicycle", "Car door", "A red car")


@pytest.mark.parametrize(
    ("prediction", "choices", "answer", "right"),
    [
        ("Car", CARS, "Car", True),
        ("car door", CARS, "Car", False),  # door is another choice's
        ("car", CARS, "Car door", False),  # a word of the answer is missing
        ("Door. Car!", CARS, "Car door", True),  # the order does not matter
        ("the CAR, I think", CARS, "Car", True),  # words of no choice do not matter
        ("a car", CARS, "Car", False),  # a is a word of "A red car"
        ("car car car", CARS, "Car", True),
        ("Car or Bicycle", CARS, "Car", False),
        ("at most 3", ("At least 3", "At most 3"), "At least 3", False),
        ("at least 3", ("At least 3", "At most 3"), "At least 3", True),
        ("3", ("3", "30", "13"), "3", True),
        ("30", ("3", "30", "13"), "3", False),
        ("3.", ("3", "30"), "3", True),
        ("3.5", ("3", "30"), "3", True),  # 5 is of no choice: a quirk of the rule
        ("three", ("3", "4"), "3", False),
        ("2 3 1", ("1 2 3", "3 2 1"), "1 2 3", True),  # equal sets of words cannot be told apart
        ("", CARS, "Car", False),
        ("  \n", CARS, "Car", False),
        ("...", CARS, "Car", False),
        ("...", ("!", "?"), "!", False),  # no words at all is never right
        ("men s room", ("Men's room", "Women's room"), "men's ROOM", True),  # an apostrophe parts words
        ("don't", ("dont", "do"), "dont", False),
        ("C_major", ("C_major", "C major"), "C_major", True),  # an underscore does not
        ("C-major", ("C_major", "C major"), "C_major", False),
        ("É", ("é", "e"), "é", True),
        ("<answer>Car</answer>", CARS, "Car", True),
        ("car", ("car", "Car."), "car", True),  # a choice with the answer's words forbids nothing
    ],
)
def test_the_rule_of_mmau_worked_by_hand(prediction, choices, answer, right):
    assert mmau(prediction, choices, answer) is right


def spelt(text: str) -> list[str]:
    """Words without a regular expression: runs of letters, digits and underscores."""
    return "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()


def by_counting(prediction: str, choices, answer: str) -> bool:
    """The same rule word by word: each given word must be allowed, each word of the answer must be given."""
    given, right = spelt(prediction), spelt(answer)
    others = [spelt(choice) for choice in choices]
    forbidden = [w for other in others if sorted(set(other)) != sorted(set(right)) for w in other if w not in right]
    return len(given) > 0 and all(w in given for w in right) and not any(w in forbidden for w in given)


def test_the_rule_of_mmau_agrees_with_a_reference_on_random_adversarial_texts():
    draw = random.Random(0)
    words = ["a", "A", "car", "Car", "3", "30", "at", "least", "most", "it's", "C_major", "é", "...", "", "<answer>"]
    seen = set()
    for _ in range(5000):
        choices = [
            draw.choice(" ,-.\n").join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(draw.randint(2, 4))
        ]
        answer = draw.choice(choices)
        said = draw.choice([answer, draw.choice(choices), " ".join(draw.choices(words, k=draw.randint(0, 4)))])
        assert mmau(said, choices, answer) == by_counting(said, choices, answer), (said, choices, answer)
        seen.add(mmau(said, choices, answer))
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("B", True),
        ("B. rain", True),
        ("\n B\n", True),
        ("  B. rain", True),
        ("It is B.", True),
        ("It is B.\n", True),
        ("(B)", True),
        ("A", False),
        ("b", False),
        ("It is B", False),  # the second-last character is a space
        ("Answer: B.", False),  # it begins with an A: the rule's quirk
        ("rain", False),
        ("", False),
        ("x", False),
        ("E", False),
    ],
)
def test_the_rule_of_mmsu_is_the_first_letter_or_the_second_last(prediction, right):
    assert mmsu(prediction, ("wind", "rain", "a bell", "a dog"), "rain") is right


def test_a_letter_beyond_the_choices_is_wrong_by_the_rule_of_mmsu():
    assert not any(mmsu(letter, ("wind", "rain"), "wind") for letter in "BCD") and mmsu("A", ("wind", "rain"), "wind")


def test_strict_refuses_what_mmau_lets_pass():
    assert mmau("the car", ("car", "bell"), "car") and not strict("the car", ("car", "bell"), "car")
    assert strict("<answer>Car.</answer>", ("car", "bell"), "car")


def test_an_answer_that_is_no_choice_is_wrong_by_the_rules_that_compare_with_a_choice():
    assert index_of("Rain.", ("wind", "rain")) == 1 and index_of("rain", ("rain", "rain")) == 0
    assert index_of("hail", ("wind", "rain")) is None
    assert not mmsu("B", ("wind", "rain"), "hail") and not strict("hail", ("wind", "rain"), "hail")
    with pytest.raises(DataError, match="did you mean 'mmau'"):
        find_benchmark("mmaau")


@pytest.mark.parametrize(
    ("prediction", "choices", "answer", "right"),
    [
        ("It is\nB.", ("wind", "rain"), "rain", True),
        ("B\n.", ("wind", "rain"), "rain", True),  # without the newline, the second-last character is the B
        ("A", ("rain", "rain"), "rain", True),
        ("B", ("rain", "rain"), "rain", True),
        ("B", (3, 30), 30, True),
        ("B", (3, 30), "30", False),  # compared as Python compares them
        ("B", (3, 30), 30.0, True),
        ("B", ("wind", "Rain"), "rain", False),
        ("D", ("wind", None, "", "rain"), "rain", True),  # a null choice keeps its letter
        ("C", ("wind", None, "", "rain"), "rain", False),
    ],
)
def test_the_rule_of_mmsu_compares_the_choice_at_the_letter_with_the_answer(prediction, choices, answer, right):
    assert mmsu(prediction, choices, answer) is right


QUESTION = Example("q", (), "What?", ("wind", "rain", "Dogs", "a bell"), 1, "set", "sound", "Reasoning, Layer")


def test_what_is_judged_is_the_inside_of_the_only_answer_element():
    for name, benchmark in BENCHMARKS.items():
        assert graded(QUESTION, "<think>wind?</think> <answer>rain</answer>", benchmark) is True, name
        assert graded(QUESTION, "<answer>rain</answer><answer>rain</answer>", benchmark) is False, name
        assert graded(QUESTION, "", benchmark) is False, name
    assert graded(QUESTION, "It is rain", BENCHMARKS["mmau"]) is True


def test_a_choice_is_handed_to_mmsu_with_its_letter_and_nothing_else_is():
    benchmark = BENCHMARKS["mmsu"]
    assert prediction_of("<answer>Rain.</answer>", QUESTION.choices, benchmark) == "B. rain"
    assert graded(QUESTION, "dogs", benchmark) is False, "by its letter, C, though it begins with a D"
    assert prediction_of("It is rain", QUESTION.choices, benchmark) == "It is rain"
    assert prediction_of("B", QUESTION.choices, benchmark) == "B"
    assert prediction_of("rain", ("wind", "rain", "rain"), benchmark) == "B. rain", "equal choices have equal answers"
    assert prediction_of("rain", ("wind", "rain", "Rain."), benchmark) == "rain", "which of the two is not known"


def written(tmp_path, name):
    pairs = [(QUESTION, "<answer>rain</answer>"), (QUESTION, "")]
    path = write_answers(tmp_path / "answers", pairs, BENCHMARKS[name])
    text = path.read_text(encoding="utf-8")
    return path.name, json.loads(text) if path.suffix == ".json" else [*map(json.loads, text.splitlines())]


def test_the_answer_file_of_mmau_has_all_that_its_script_reads(tmp_path):
    name, (first, second) = written(tmp_path, "mmau")
    assert name == "answers.json"
    assert first == {
        "id": "q",
        "audio_id": "",
        "question": "What?",
        "choices": ["wind", "rain", "Dogs", "a bell"],
        "answer": "rain",
        "dataset": "set",
        "task": "sound",
        "category": "Reasoning, Layer",
        "sub-category": "",
        "difficulty": "",
        "model_prediction": "rain",
        "model_output": "rain",
    }
    assert second["model_prediction"] == "", "a row without a prediction would be skipped by the script"


def test_the_answer_files_of_mmar_and_mmsu_have_their_own_keys(tmp_path):
    name, (first, _) = written(tmp_path, "mmar")
    assert (name, first["modality"], first["answer_prediction"]) == ("answers.json", "sound", "rain")
    name, (first, _) = written(tmp_path, "mmsu")
    assert (name, first["choice_b"], first["answer_gt"], first["response"]) == (
        "answers.jsonl",
        "rain",
        "rain",
        "B. rain",
    )


def test_every_letter_and_case_of_a_prediction_of_two_characters_follows_the_rule_of_mmsu():
    for pair in itertools.product(string.printable.strip(), repeat=2):
        text = "".join(pair)
        # Of two characters the first is also the second-last one.
        assert mmsu(text, ("w", "x", "y", "z"), "y") is (text[0] == "C")


def test_the_official_share_of_an_evaluation_leaves_out_what_the_script_leaves_out():
    answers = [(QUESTION, completion) for completion in ("rain", "wind", "no idea", "")]
    assert official_share(answers, BENCHMARKS["mmsu"]) == Share(1, 3)
    assert official_share(answers, BENCHMARKS["mmau"]) == Share(1, 4)
    hidden = Example("h", (), "What?", ("wind", "rain"), None)
    assert official_share([(hidden, "hail"), (hidden, "rain")], BENCHMARKS["mmau"]) == Share(1, 2)


# The official functions, transcribed as they are but for printing and counting: True and False are rows that the
# script counts as right and as wrong, None is a row that it leaves out of its total.


def script_of_mmau(sample: dict, output_key: str) -> bool | None:
    """string_match and the loop around it in evaluation.py of Sakshi113/MMAU; MMAR's differs by the key alone."""
    if output_key not in sample:
        return None

    def tokenize(text):
        return set(re.findall(r"\b\w+\b", text.lower()))

    prediction_tokens, answer_tokens = tokenize(sample[output_key]), tokenize(sample["answer"])
    if not prediction_tokens:
        return False
    incorrect_tokens = set()
    for choice in sample["choices"]:
        choice_tokens = tokenize(choice)
        if choice_tokens != answer_tokens:
            incorrect_tokens.update(choice_tokens - answer_tokens)
    return answer_tokens.issubset(prediction_tokens) and prediction_tokens.isdisjoint(incorrect_tokens)


def script_of_mmsu(record: dict, output_key: str) -> bool | None:
    """The loop of mmsu_evaluation.py of dingdongwang/MMSU."""
    model_predict = None
    try:
        predict = record.get(output_key, "").strip().replace("\n", "")
    except AttributeError:
        return None
    if predict != "None" and predict:
        if predict[0] in ("A", "B", "C", "D"):
            model_predict = predict[0]
        elif len(predict) > 1 and predict[-2] in ("A", "B", "C", "D"):
            model_predict = predict[-2]
        else:
            return None
    if not model_predict:
        return False
    return record.get(f"choice_{model_predict.lower()}", "") == record.get("answer_gt", "")


WORDS = ["a", "A", "car", "Car", "3", "30", "at", "least", "it's", "C_major", "é", "...", "<b>", "B.", "D", "Dog", ""]


def random_text(draw: random.Random, most: int = 3) -> str:
    return draw.choice([" ", ", ", "\n", ""]).join(draw.choices(WORDS, k=draw.randint(0, most)))


def random_mmau_row(draw: random.Random, key: str) -> dict:
    choices = [random_text(draw) for _ in range(draw.randint(1, 4))]
    row = {"choices": choices, "answer": draw.choice([*choices, *choices, "", random_text(draw)])}
    if draw.random() < 0.9:
        row[key] = draw.choice([row["answer"], draw.choice(choices), random_text(draw, 5), ""])
    return row


def random_mmsu_row(draw: random.Random, key: str) -> dict:
    values = ["wind", "rain", "Rain", "wind ", 3, 3.0, "3", 30, "", None, "A bell", "Dogs"]
    row = {f"choice_{letter}": draw.choice(values) for letter in "abcd" if letter in "ab" or draw.random() < 0.8}
    row["answer_gt"] = draw.choice([*row.values(), *row.values(), draw.choice(values)])
    letter, space = draw.choice("ABCDEb"), draw.choice(["", " ", "\n", "\n\n"])
    texts = [letter, f"{letter}. x", f"It is{space}{letter}{space}.{space}", f"({letter}){space}", f"{space}{letter}"]
    if draw.random() < 0.95:
        row[key] = draw.choice([*texts, *texts, "None", "none", "", "x", space, None, 3, random_text(draw, 4)])
    return row


SCRIPTS = {
    "mmau": (script_of_mmau, random_mmau_row),
    "mmar": (script_of_mmau, random_mmau_row),
    "mmsu": (script_of_mmsu, random_mmsu_row),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_official_figure_is_that_of_the_official_script_in_every_one_of_30000_random_rows(name, tmp_path):
    draw, benchmark, (script, random_row) = random.Random(0), BENCHMARKS[name], SCRIPTS[name]
    records = [random_row(draw, benchmark.key) for _ in range(30_000)]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    rows = grade(read_answers(path, benchmark), benchmark)
    expected = [script(record, benchmark.key) for record in records]
    differ = [
        record for record, row, right in zip(records, rows, expected, strict=True) if row["official"] is not right
    ]
    print(f"{name}: {len(differ)} of {len(records)} rows differ from the official script")
    assert differ == [] and Counter(expected).keys() == {True, False, None}
    # Our figure differs as the module says and in nothing else: what the script leaves out is wrong, and a row
    # without a right answer is left out.
    hidden = [record.get("answer", record.get("answer_gt")) in (None, "") for record in records]
    assert [row["correct"] for row in rows] == [
        None if unknown else bool(right) for unknown, right in zip(hidden, expected, strict=True)
    ]
