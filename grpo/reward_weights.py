"""The weights of the rewards at a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise


def weights_at(weights: Mapping[str, float], schedule: Mapping[str, Mapping[int, float]], step: int) -> list[float]:
    """The weight of each reward at a step, counted from 0: the scheduled one, or else that of `weights`."""
    return [scheduled(sorted(schedule[name].items()), step) if name in schedule else weights[name] for name in weights]


def scheduled(points: Sequence[tuple[int, float]], step: int) -> float:
    """The value at a step of points (step, value) in order: linear between them, constant before and after."""
    if step <= points[0][0]:
        return points[0][1]
    for (start, first), (end, last) in pairwise(points):
        if step <= end:
            return first + (last - first) * (step - start) / (end - start)
    return points[-1][1]
