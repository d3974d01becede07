"""The mean of a few runs and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """The mean, and its 95 % interval by Student's t; None for a single value."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, None
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution, by bisection."""
    low, high = 0.0, 20.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _central_share(middle, freedom) < 0.95 else (low, middle)
    return high


def _central_share(t: float, freedom: int) -> float:
    """P(-t < T < t), by the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for n in range(2 + odd, freedom - 1, 2):
        term *= (n - 1) / n * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
