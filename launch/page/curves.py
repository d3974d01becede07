"""What a run's metrics.jsonl holds, by column: the curves of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hark.data.benchmarks.report import Share
from hark.grpo.instruments.diagnosis import diagnose
from hark.launch.page.numbers import rounded

DIGITS = 6  # significant ones of a curve


def curves(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The steps of a run and a list of values for each metric (None where a step lacks it); its evaluations."""
    steps = [line for line in lines if "event" not in line]
    found = dict.fromkeys(name for line in steps for name, value in line.items() if _is_number(value))
    names = [name for name in found if name != "step"]
    return {
        "steps": [line["step"] for line in steps],
        "metrics": rounded({name: [line.get(name) for line in steps] for name in names}, digits=DIGITS),
        "evaluations": [_evaluation(line) for line in lines if line.get("event") == "evaluation"],
    }


def warnings(lines: Sequence[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """What the diagnosis finds in a run that computed in `dtype`, by step."""
    return [{"step": step, "name": name, "text": text} for step, name, text in diagnose(lines, dtype)]


def _evaluation(line: dict[str, Any]) -> dict[str, Any]:
    """An evaluation during the run: its numbers, and Wilson's interval of each accuracy over all its questions."""
    numbers = {name: value for name, value in line.items() if _is_number(value)}
    for name in ("accuracy", "silent_accuracy"):
        total = int(line.get("questions") or 0)
        share = numbers.get(name)
        if share is not None and 0 <= share <= 1 and total > 0:
            numbers[f"{name}_interval"] = Share(round(share * total), total).interval
    return rounded(numbers, digits=DIGITS)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float) and not isinstance(value, bool)
