"""Mathematical answers, compared as numbers and expressions by the library math-verify."""

from __future__ import annotations

import re

from hark.data.choices import extract_answer
from hark.data.errors import DataError
from hark.data.rewards.group import Group


def math(group: Group, *, unparseable: float | None = None) -> list[float | None]:
    r"""1 if the completion's answer equals the right one as mathematics ("0.5" is 1/2); else 0.

    The answer is the text in the answer tag, and 0 where tags are repeated or open. Without tags it is what math-verify
    finds in the completion, \boxed{} first.
    unparseable: what completions earn if the right answer cannot be read; None by default, 1 in Open-RS.
    """
    verify = _library()
    if not group.example.has_answer:
        return [None] * len(group.texts)
    gold = _read(group.example.answer_text)
    if all(isinstance(one, str) for one in gold):  # no number and no expression
        return [unparseable] * len(group.texts)
    return [float(verify.verify(gold, _given(text), timeout_seconds=None)) for text in group.texts]


def _given(completion: str) -> list:
    if not re.search("</?answer>", completion):
        return _library().parse(completion, parsing_timeout=None)
    return _read(extract_answer(completion) or "")


def _read(answer: str) -> list:
    r"""A bare answer as math-verify has it. It is LaTeX, or 2\pi would be the number 2; unless it has words."""
    marked = re.search(r"\$|\\\(|\\\[|\\boxed", answer)
    worded = "\\" not in answer and re.search(r"\b[A-Za-z]{2,}\b(?!\()", answer)
    forms = [answer] if marked or worded else [f"${answer}$", answer]
    return next(filter(None, (_library().parse(form, parsing_timeout=None) for form in forms)), [])


def _library():
    try:
        import math_verify
    except ImportError:
        raise DataError("the reward math needs the package math-verify; install it: pip install 'hark[math]'") from None
    return math_verify
