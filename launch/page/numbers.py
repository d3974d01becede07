"""Numbers for JSON."""

from __future__ import annotations

import math
from typing import Any

DIGITS = 7  # significant ones, as many as float32 has


def rounded(value: Any, *, digits: int = DIGITS) -> Any:
    """A value with its floats, at any depth, rounded to significant digits; one that is not finite is None."""
    if isinstance(value, dict):
        return {key: rounded(item, digits=digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits=digits) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
