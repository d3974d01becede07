"""data/choices.py: what counts as the right answer, and choices in another order."""

from collections import Counter
from dataclasses import replace

import pytest

from hark.data.choices import extract_answer, is_correct
from hark.data.examples import Example
from hark.data.order import shuffle_choices

CHOICES = ("Car", "At least 3", "At most 3", "Dog bark")


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>Car</answer>", "car", "Car.", "<answer>\n car.\n</answer>", "It drives. <answer>Car</answer>",
        "<think>a dog?\nno</think>\n<answer>CAR</answer>", '"Car"', "'car.'", '"Car".', "<answer>“Car”</answer> bye",
    ],
)  # fmt: skip
def test_ways_of_writing_the_right_choice_are_correct(completion):
    assert is_correct(completion, CHOICES, 0)


@pytest.mark.parametrize(
    "completion",
    [
        "", " ", ".", '""', "<answer></answer>", "<answer> . </answer>", "Dog bark", "a car", "Car or dog bark",
        "<answer>Car</answer><answer>Car</answer>", "<answer>Car</answer> <answer>Dog bark</answer>", "<answer>Car",
        "Car</answer>", "</answer>Car<answer>", "<answer><answer>Car</answer></answer>", "It is <answer>a Car</answer>",
        "<answer>Car, At least 3, At most 3, Dog bark</answer>", "The answer is Car", "C",
    ],
)  # fmt: skip
def test_anything_else_is_wrong(completion):
    assert not is_correct(completion, CHOICES, 0)


def test_at_most_is_not_at_least():
    assert is_correct("<answer>at least 3</answer>", CHOICES, 1)
    assert not is_correct("<answer>at most 3</answer>", CHOICES, 1)
    assert not is_correct("<answer>3</answer>", CHOICES, 1)


def test_whitespace_within_an_answer_does_not_matter_and_letters_do():
    assert is_correct("dog\n  bark", CHOICES, 3)
    assert not is_correct("dogbark", CHOICES, 3)


def test_an_answer_that_two_choices_share_is_not_correct():
    assert not is_correct("car", ("Car", "car."), 0)


def test_an_empty_answer_is_wrong_even_where_a_choice_is_empty():
    assert not is_correct("", ("", "Car"), 0)


def test_single_quotes_within_units_are_not_stripped():
    assert not is_correct("5'", ('5"', "5'"), 0)


def test_the_extracted_answer_is_the_inside_of_the_only_tag():
    assert extract_answer("x <answer> Car\n</answer> y") == "Car"
    assert extract_answer("  Car ") == "Car"
    for unclear in ("<answer>Car", "</answer>Car<answer>", "<answer>Car</answer><answer>Car</answer>"):
        assert extract_answer(unclear) is None


def example(identity="7"):
    return Example(identity, (), "Which?", ("a", "b", "c", "d"), 2)


def test_shuffling_moves_the_answer_with_its_choice():
    for step in range(50):
        shuffled = shuffle_choices(example(), seed=1, step=step)
        assert sorted(shuffled.choices) == ["a", "b", "c", "d"]
        assert shuffled.answer_text == "c"


def test_the_order_is_fixed_for_all_time_by_seed_step_and_id():
    # Written down: a hash that changed with the process or the library would break exact resume.
    assert shuffle_choices(example(), seed=1, step=5).choices == ("c", "d", "a", "b")
    assert shuffle_choices(example(), seed=1, step=5) == shuffle_choices(example(), seed=1, step=5)
    orders = {
        shuffle_choices(example(identity), seed=seed, step=step).choices
        for identity, seed, step in [("7", 1, 5), ("7", 1, 6), ("7", 2, 5), ("8", 1, 5)]
    }
    assert len(orders) > 1


def test_the_right_answer_lands_on_each_place_equally_often():
    places = Counter(shuffle_choices(example(), seed=0, step=step).answer for step in range(4000))
    # 1000 expected at each place, standard deviation 27; 150 is more than five of them.
    assert all(abs(places[place] - 1000) < 150 for place in range(4))


def test_shuffling_leaves_an_unknown_answer_unknown():
    shuffled = shuffle_choices(replace(example(), answer=None), seed=1, step=5)
    assert shuffled.answer is None and shuffled.choices == ("c", "d", "a", "b")
