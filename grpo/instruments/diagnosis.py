"""Symptoms of a run that cannot learn as it stands, found in the metrics of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

PATIENCE = 10  # steps in a row until a symptom is reported
ALL, FEW = 1 - 1e-5, 0.05  # shares; all, to rounding


class Symptom(NamedTuple):
    """What the metrics of a step show, and what to try; a metric that the step lacks shows nothing."""

    shows: Callable[[dict[str, float]], bool]
    advice: str


SYMPTOMS = (
    Symptom(
        lambda values: values.get("equal_reward_share", 0) > ALL,
        "all rewards of every group have been equal, which leaves nothing to learn; if they are low, fine-tune "
        "on right answers first (`hark sft`), raise rollout.group_size or rollout.temperature, or add a reward that is "
        "easier to get; if they are high, the questions are too easy",
    ),
    Symptom(
        lambda values: values.get("stopped_share", 1) <= FEW,
        "nearly all completions have been cut off at rollout.max_new_tokens; raise it, or fine-tune on right answers "
        "first (`hark sft`), so that the model ends its answers",
    ),
)


class Diagnosis:
    """Counts for how many steps in a row each symptom has been there."""

    def __init__(self) -> None:
        self._lasted = [0] * len(SYMPTOMS)

    def step(self, values: dict[str, float]) -> list[str]:
        """The warnings to print after a step: one for each symptom, once until it has been absent."""
        self._lasted = [
            lasted + 1 if symptom.shows(values) else 0 for lasted, symptom in zip(self._lasted, SYMPTOMS, strict=True)
        ]
        return [
            f"for {PATIENCE} steps, {symptom.advice}"
            for lasted, symptom in zip(self._lasted, SYMPTOMS, strict=True)
            if lasted == PATIENCE
        ]
