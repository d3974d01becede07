"""Mathematical answers, compared as numbers and expressions by the library math-verify."""

from __future__ import annotations

from hark.data.errors import DataError
from hark.data.rewards.group import Group


def math(group: Group, *, unparseable: float | None = None) -> list[float | None]:
    """1 if the completion's answer equals the right one as mathematics ("0.5" is 1/2); else 0.

    unparseable: what completions earn if the right answer cannot be read; None by default, 1 in Open-RS.
    """
    verify = _library()
    if not group.example.has_answer:
        return [None] * len(group.texts)
    answer = group.example.answer_text
    gold = verify.parse(answer, parsing_timeout=None) or verify.parse(f"${answer}$", parsing_timeout=None)
    if all(isinstance(one, str) for one in gold):  # no number and no expression
        return [unparseable] * len(group.texts)
    found = [verify.parse(text, parsing_timeout=None) for text in group.texts]
    return [float(verify.verify(gold, one, timeout_seconds=None)) for one in found]


def _library():
    try:
        import math_verify
    except ImportError:
        raise DataError("the reward math needs the package math-verify; install it: pip install 'hark[math]'") from None
    return math_verify
