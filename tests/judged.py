"""Calls of rewards in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hark.data.examples import Example
from hark.data.prompts import TEMPLATES
from hark.data.rewards import Group
from hark.data.rewards.judging import Judge


def group_of(example: Example, *texts: str, template: str = "answer", limit: int = 100, **more: Any) -> Group:
    """A group of completions, of which each character is a token."""
    ids = tuple(tuple(map(ord, text)) for text in texts)
    found = {"ids": ids, "stopped": (True,) * len(texts), "max_new_tokens": limit, **more}
    return Group(example, texts, template=TEMPLATES[template], **found)


def columns_of(
    examples: Sequence[Example], texts: Sequence[str], names: Sequence[str], template: str, **settings: Any
) -> torch.Tensor:
    """The reward columns (B, K) of completions of examples."""
    with Judge(names, template, **settings) as judge:
        return judge(examples, texts, [[1]] * len(texts), [True] * len(texts), 0).columns
