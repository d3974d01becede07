"""Whether the thinking agrees with the answer."""

from __future__ import annotations

import re

from hark.data.choices import choice_of, normalise
from hark.data.rewards.group import Group


def consistency(group: Group) -> list[float | None]:
    """1 if the last choice that the think part names is the choice that is answered; else 0.

    Names are compared in lower case, as whole words; of two at one place the longer counts. None for a question without
    choices, and for a completion without a think part that names a choice, or without an answer that is a choice.
    """
    choices = group.example.choices
    return [_agrees(text, choices) for text in group.texts]


def _agrees(text: str, choices: tuple[str, ...]) -> float | None:
    thought, closed, _ = text.partition("<think>")[2].partition("</think>")
    given = choice_of(text, choices)
    named = last_choice(thought, choices) if closed else None
    return None if given is None or named is None else float(named == given)


def last_choice(text: str, choices: tuple[str, ...]) -> int | None:
    """The index of the choice that a text names last; None if it names none."""
    text = normalise(text)
    found = [
        (match.end(), match.end() - match.start(), index)
        for index, choice in enumerate(choices)
        if normalise(choice)
        for match in re.finditer(rf"(?<!\w){re.escape(normalise(choice))}(?!\w)", text)
    ]
    return max(found)[2] if found else None
