"""data/benchmarks/baselines.py: what is right without listening."""

import pytest

from hark.data.benchmarks.baselines import always_first, chance, longest_choice
from hark.data.errors import DataError
from hark.data.examples import Example


def example(choices, answer):
    return Example("1", (), "Which?", tuple(choices), answer, line="a.jsonl:1")


def test_the_first_choice_is_right_where_the_answer_is_the_first():
    assert always_first(example("ab", 0)) and not always_first(example("ab", 1))


def test_the_first_of_the_longest_choices_counts():
    choices = ("rain", "thunder", "a siren", "dog")
    assert [longest_choice(example(choices, answer)) for answer in range(4)] == [False, True, False, False]


def test_chance_is_one_in_the_number_of_choices_even_without_an_answer():
    assert chance(example("abcd", 0)) == 0.25 and chance(example("abc", None)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("baseline", [always_first, longest_choice])
def test_a_baseline_of_an_unknown_answer_is_refused_not_counted_as_wrong(baseline):
    with pytest.raises(DataError, match="a.jsonl:1: has no answer"):
        baseline(example("ab", None))
