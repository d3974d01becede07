"""Reads the evaluation.json of `hark evaluate`. It may come from anywhere, so the kinds of its values are checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hark.data.benchmarks.report import COLUMNS
from hark.data.errors import DataError
from hark.data.json_files import read_object

NAME = "evaluation.json"
CONTROLS = ("silent", "shuffled_audio", "shuffled_choices")
NONE = type(None)
# The kinds of values where they are given: of the file, of a row, and of a row's answer under a control.
KINDS = {
    "rows": (list,), "benchmark": (str,), "config": (dict, NONE), "model": (str, NONE), "step": (int, NONE),
    "accuracy": (int, float, NONE),
}  # fmt: skip
ANSWER = {"prediction": (str,), "correct": (bool, NONE), "stopped": (bool, NONE), "choice": (int, NONE)}
ROW = {"id": (str, int)} | dict.fromkeys(COLUMNS, (str, NONE)) | ANSWER | dict.fromkeys(CONTROLS, (dict,))
OF_DATA = {"test": (str, NONE), "audio_root": (str, NONE), "columns": (dict, NONE)}  # of the configuration


def read_evaluation(path: Path) -> dict[str, Any]:
    """The evaluation in a file. Raises DataError if there is none, or if values have other kinds than are written."""
    try:
        evaluation = read_object(path)
    except DataError as error:
        raise DataError(f"{error}; `hark evaluate RUN` writes it") from None
    if not {"rows", "benchmark"} <= evaluation.keys():
        raise DataError(f"{path}: not an evaluation; expected the {NAME} of `hark evaluate`")
    wrong = _wrong(evaluation)
    if wrong:
        raise DataError(f"{path}: {wrong} is not what `hark evaluate` writes; evaluate again")
    return evaluation


def _wrong(evaluation: dict[str, Any]) -> str | None:
    """Where a value has another kind than is written; None if all are right."""
    if bad := _other(evaluation, KINDS):
        return bad
    config = evaluation.get("config") or {}
    if any(not isinstance(options, dict) for options in config.values()):
        return "config"
    if bad := _other(config.get("data", {}), OF_DATA):
        return f"config.data.{bad}"
    for number, row in enumerate(evaluation["rows"]):
        if not isinstance(row, dict) or not {"id", "correct"} <= row.keys():
            return f"rows[{number}]"
        if bad := _other(row, ROW):
            return f"rows[{number}].{bad}"
        for control in (name for name in CONTROLS if name in row):
            answer = row[control]
            if not {"prediction", "correct"} <= answer.keys() or _other(answer, ANSWER):
                return f"rows[{number}].{control}"
    return None


def _other(values: dict[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> str | None:
    """The name of a value that has none of its kinds. A truth value is no number."""
    for name, allowed in kinds.items():
        if name in values and type(values[name]) not in allowed:
            return name
    return None
