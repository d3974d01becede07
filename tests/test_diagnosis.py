"""Warnings of runs that cannot learn: after enough steps in a row, once, and again if the symptom comes back."""

from __future__ import annotations

import pytest

from hark.grpo.instruments.diagnosis import PATIENCE, Diagnosis

HEALTHY = {"equal_reward_share": 0.9, "stopped_share": 0.5}
EQUAL = {"equal_reward_share": 3 * 0.3333333, "stopped_share": 0.5}  # over three ranks, with their rounding
CUT_OFF = {"equal_reward_share": 0.9, "stopped_share": 0.02}


def warned(steps: list[dict[str, float]]) -> list[tuple[int, str]]:
    """The steps, counted from 1, after which there was a warning, and its text."""
    diagnosis = Diagnosis()
    return [(number, text) for number, values in enumerate(steps, 1) for text in diagnosis.step(values)]


@pytest.mark.parametrize(("symptom", "words"), [(EQUAL, "rewards of every group"), (CUT_OFF, "rollout.max_new_tokens")])
def test_a_symptom_is_reported_once_until_it_is_over(symptom, words):
    found = warned([symptom] * (2 * PATIENCE) + [HEALTHY] + [symptom] * (2 * PATIENCE))
    assert [step for step, _ in found] == [PATIENCE, 3 * PATIENCE + 1]
    assert all(words in text and "`hark sft`" in text for _, text in found)


@pytest.mark.parametrize("symptom", [EQUAL, CUT_OFF])
def test_steps_that_are_not_in_a_row_are_not_reported(symptom):
    assert warned(([symptom] * (PATIENCE - 1) + [HEALTHY]) * 3) == []


def test_both_symptoms_are_reported_together():
    assert len(warned([EQUAL | {"stopped_share": 0.0}] * PATIENCE)) == 2


def test_supervised_training_has_neither_metric_and_no_warning():
    assert warned([{"loss": 1.0}] * (2 * PATIENCE)) == []
