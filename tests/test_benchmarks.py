"""data/benchmarks/rules.py: the official rules, quirks included, and files that the official scripts can read."""

from __future__ import annotations

import itertools
import json
import random
import string

import pytest

from hark.data.benchmarks.rules import (
    BENCHMARKS,
    find_benchmark,
    judged,
    mmau,
    mmsu,
    place,
    prediction_of,
    strict,
    write_answers,
)
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


def test_an_answer_that_is_no_choice_is_an_error_where_its_place_is_needed():
    assert place("Rain.", ("wind", "rain")) == 1 and place("rain", ("rain", "rain")) == 0
    with pytest.raises(DataError, match="'hail' is none of the choices .*expected the text of the right one"):
        mmsu("B", ("wind", "rain"), "hail")
    with pytest.raises(DataError, match="did you mean 'mmau'"):
        find_benchmark("mmaau")


QUESTION = Example("q", None, "What?", ("wind", "rain", "Dogs", "a bell"), 1, "set", "sound", "Reasoning, Layer")


def test_what_is_judged_is_the_inside_of_the_only_answer_element():
    for name, benchmark in BENCHMARKS.items():
        assert judged(QUESTION, "<think>wind?</think> <answer>rain</answer>", benchmark) is True, name
        assert judged(QUESTION, "<answer>rain</answer><answer>rain</answer>", benchmark) is False, name
        assert judged(QUESTION, "", benchmark) is False, name
    assert judged(QUESTION, "It is rain", BENCHMARKS["mmau"]) is True


def test_a_choice_is_handed_to_mmsu_with_its_letter_and_nothing_else_is():
    benchmark = BENCHMARKS["mmsu"]
    assert prediction_of("<answer>Rain.</answer>", QUESTION.choices, benchmark) == "B. rain"
    assert judged(QUESTION, "dogs", benchmark) is False, "by its letter, C, though it begins with a D"
    assert prediction_of("It is rain", QUESTION.choices, benchmark) == "It is rain"
    assert prediction_of("B", QUESTION.choices, benchmark) == "B"


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
