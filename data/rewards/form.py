"""Rewards of the form of a completion: the elements of the template, or an ordered list of tags."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hark.data.rewards.group import Group


def format(group: Group) -> list[float]:
    """1 if the completion consists of the template's elements, each once, in order and not blank; else 0.

    For a template without tags: 1 if the completion is not blank and has no tag of the formats.
    """
    form = _form(group.template.tags, ("think", "answer", *group.template.tags))
    return [float(form.fullmatch(text.strip()) is not None) for text in group.texts]


def tags(group: Group, *, tags: list[str]) -> list[float]:
    """1 if the completion consists of the elements `tags`, each once, in this order and not blank; else 0.

    SARI (arXiv 2504.15900) and Audio-Reasoner (arXiv 2503.02318) have such sections, as PLANNING, CAPTION, REASONING
    and SUMMARY.
    """
    form = _form(tags, tags)
    return [float(form.fullmatch(text.strip()) is not None) for text in group.texts]


def _form(names: Sequence[str], known: Sequence[str]) -> re.Pattern[str]:
    """Matches elements in this order; the content of one is not blank, and has no tag among `known`.

    It matches a text without blanks at its ends: without tags, the content may begin and end with blanks, and a pattern
    for more of them would try each way to divide them, in a time in proportion to the square of their number.
    """
    either = "|".join(map(re.escape, dict.fromkeys(known)))
    inside = rf"(?=\s*[^\s<]|\s*<(?!/?(?:{either})>))(?:(?!</?(?:{either})>).)*"
    elements = [rf"<{re.escape(name)}>{inside}</{re.escape(name)}>" for name in names] or [inside]
    return re.compile(r"\s*".join(elements), re.DOTALL)
