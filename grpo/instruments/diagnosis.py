"""Warnings about a run, from the lines of its metrics.jsonl: online while it trains, and afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hark.grpo.instruments.history import WINDOW, Line, Lines
from hark.grpo.instruments.symptoms import SYMPTOMS


class Diagnosis:
    """Reads the lines of a run one by one; a symptom is said when it is found, and again after an absence.

    It is absent once WINDOW steps in a row were without it, so that a figure near its bound is not said many times.
    """

    def __init__(self, dtype: str = "float32") -> None:
        self._lines = Lines(dtype)
        self._said: dict[str, int] = {}  # the number of steps when a symptom was last found

    def add(self, line: Line) -> list[tuple[str, str]]:
        """Add a line as it stands in metrics.jsonl; returns the name and the text of each warning to give after it."""
        if line.get("event", "evaluation") != "evaluation":
            return []
        self._lines.add(line)
        now = self._lines.steps
        found = {symptom: text for symptom in SYMPTOMS if (text := symptom.find(self._lines))}
        new = [
            (symptom.name, f"{text}; {symptom.advice}")
            for symptom, text in found.items()
            if now - self._said.get(symptom.name, -math.inf) > WINDOW
        ]
        self._said |= {symptom.name: now for symptom in found}
        return new


def diagnose(lines: Sequence[Line], dtype: str = "float32") -> list[tuple[int, str, str]]:
    """The warnings (step, name, text) of a run whose metrics.jsonl has these lines; `dtype` is its model.dtype."""
    diagnosis = Diagnosis(dtype)
    return [(line["step"], *warning) for line in lines for warning in diagnosis.add(line)]
