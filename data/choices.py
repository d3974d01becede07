"""The one matcher of a completion with the choices, shared by reward and evaluation; and the order of the choices."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data.examples import Example

QUOTES = ('""', "''", "``", "“”", "‘’", "«»")


def extract_answer(completion: str) -> str | None:
    """The text inside the only `<answer>...</answer>`; without any tag, the whole completion.

    None where the tags are doubled, unclosed or out of order: which answer is meant cannot be known, and a policy that
    tags every choice must not be paid for it.
    """
    opened, closed = completion.count("<answer>"), completion.count("</answer>")
    if opened == closed == 0:
        return completion.strip()
    before, _, rest = completion.partition("<answer>")
    inside, _, _ = rest.partition("</answer>")
    return inside.strip() if opened == closed == 1 and "</answer>" not in before else None


def normalise(text: str) -> str:
    """Case, runs of whitespace, surrounding quotes and trailing dots do not distinguish two answers."""
    text = " ".join(text.casefold().split())
    while True:
        bare = text.rstrip(".").strip()
        if len(bare) >= 2 and bare[0] + bare[-1] in QUOTES:
            bare = bare[1:-1].strip()
        if bare == text:
            return text
        text = bare


def is_correct(completion: str, choices: Sequence[str], answer: int) -> bool:
    """Whether the completion's answer equals the right choice and no other, both normalised; never by containment."""
    extracted = extract_answer(completion)
    if extracted is None:
        return False
    given = normalise(extracted)
    matches = [index for index, choice in enumerate(choices) if normalise(choice) == given]
    return given != "" and matches == [answer]


def shuffle_choices(example: Example, *, seed: int, step: int) -> Example:
    """The example with its choices permuted and its answer index moved along: a pure function of (seed, step, id).

    An answer that is not known stays so.
    """

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{step}/{index}/{example.id}".encode()).digest()

    order = sorted(range(len(example.choices)), key=rank)
    choices = tuple(example.choices[index] for index in order)
    answer = None if example.answer is None else order.index(example.answer)
    return replace(example, choices=choices, answer=answer)
