"""Calls a reward, here or in a process that runs rewards. It imports no torch by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from hark.data.rewards.group import Group
from hark.data.rewards.judge import taken
from hark.data.rewards.table import find_reward


class Reply(NamedTuple):
    """What a call gave: the values as `plain`, or the reason why there are none; and sums to log."""

    values: Any = None
    reason: str = ""
    figures: Mapping[str, float] = MappingProxyType({})


def run_reward(name: str, options: Mapping[str, Any] | None, group: Group) -> Reply:
    """Call a reward here; an exception becomes a reason, but for MemoryError."""
    try:
        values: Sequence[float | None] = find_reward(name, options)(group)
        return Reply(plain(values), "", taken())
    except MemoryError:
        raise
    except Exception as error:
        return Reply(None, f"{type(error).__name__}: {error}", taken())


def plain(values: Any) -> Any:
    """Values as a list of floats and None, if they are; else what they are, as text."""
    try:
        return [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        return repr(values)[:200]
