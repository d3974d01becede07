"""The latest figures of a run, over which the rules of symptoms.py look."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any

Line = dict[str, Any]

WINDOW = 20  # steps of a mean; it halves the error of 5 steps, and 20 steps are a small part of a run
LONG = 50  # steps of a mean in which a slow trend must show


class Lines:
    """The lines of a run until now that rules need. dtype: that of the computation.

    steps: their number. evaluations: the latest two, without one before the first step.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.steps = 0
        self.evaluations: deque[Line] = deque(maxlen=2)
        self._first: list[Line] = []
        self._latest: deque[Line] = deque(maxlen=2 * LONG)

    def add(self, line: Line) -> None:
        """Add a step or an evaluation."""
        if "event" not in line:
            self.steps += 1
            self._first += [line] if self.steps <= LONG else []
            self._latest.append(line)
        elif line["step"] > 0:
            self.evaluations.append(line)

    def last(self, name: str, count: int = WINDOW, *, before: int = 0) -> list[float]:
        """The values of the last `count` steps but `before`, as `_values` gives them."""
        end = len(self._latest) - before
        return _values(list(self._latest)[max(end - count, 0) : max(end, 0)], name, count)

    def first(self, name: str, count: int = WINDOW) -> list[float]:
        """The values of the first `count` steps, as `_values` gives them; [] unless as many later steps followed."""
        return _values(self._first[:count], name, count) if self.steps >= 2 * count else []

    def names(self, prefix: str) -> list[str]:
        """What follows a prefix in the names of the latest step's values."""
        latest = self._latest[-1] if self._latest else {}
        return [name.removeprefix(prefix) for name in latest if name.startswith(prefix)]


def _values(steps: Sequence[Line], name: str, count: int) -> list[float]:
    """The values of steps that have one; [] if there are fewer than `count` steps, or half of them have none."""
    values = [step[name] for step in steps if step.get(name) is not None]
    return values if len(steps) == count < 2 * len(values) else []


def rise(before: Sequence[float], after: Sequence[float]) -> float:
    """By how many standard errors the mean has risen; nan without values, 0 if nothing differs."""
    if not before or not after:
        return math.nan
    difference, error = fmean(after) - fmean(before), math.hypot(_error(before), _error(after))
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    mean, count = fmean(values), len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
