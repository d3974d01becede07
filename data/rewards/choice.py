"""Rewards of the right answer: the accuracy of this project, and MMAU's rule."""

from __future__ import annotations

from hark.data.benchmarks import rules
from hark.data.choices import extract_answer
from hark.data.errors import DataError
from hark.data.examples import is_right
from hark.data.rewards.group import Group


def accuracy(group: Group) -> list[float]:
    """1 if the completion's answer is the right choice, or equals an accepted text after `normalise`; else 0.

    DataError for an open question whose answer is null.
    """
    right = [is_right(group.example, text) for text in group.texts]
    if None in right:
        raise DataError('"answer" is null, and accuracy needs one; set reward.weights.accuracy to 0')
    return [float(bool(one)) for one in right]


def mmau(group: Group) -> list[float | None]:
    """1 if the answer has all words of the right one and no word that only wrong choices have (MMAU's official rule).

    The answer is the text in the answer tag, or the whole completion if it has none; 0 where tags are repeated or open.
    None without a right answer.
    """
    example = group.example
    if not example.has_answer:
        return [None] * len(group.texts)
    answers = [extract_answer(text) for text in group.texts]
    return [float(rules.mmau(answer or "", example.choices, example.answer_text)) for answer in answers]
