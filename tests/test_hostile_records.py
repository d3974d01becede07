"""Recorded steps that somebody made to do harm: errors of one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hark.grpo.instruments.record import RecordError, read_step, recorded_steps

GOOD = {
    "format": 2, "step": 1, "parts": [0], "ranks": 1, "prompts": [{}], "completions": [{}], "tokens": {},
    "updates": [{}],
}  # fmt: skip
CHANGED = [
    *(json.dumps(GOOD | {key: value}) for key in GOOD for value in (None, "x", 1.5, [None], ["x"], [[]])),
    *(json.dumps({other: GOOD[other] for other in GOOD if other != key}) for key in GOOD),
    json.dumps(GOOD | {"updates": [{"loss": "x"}]}),
    json.dumps(GOOD | {"format": "x\x1b" * 9999}),
    "[" * 100_000, "[]", "1", "", '{"a": ' + "9" * 5000 + "}",
]  # fmt: skip


def write(run, text):
    part = run / "record" / "step-000001" / "rank-0"
    part.mkdir(parents=True, exist_ok=True)
    (part / "step.json").write_text(text)
    save_file({"tokens": torch.zeros(1, 2)}, part / "tensors.safetensors")


def test_values_that_no_recorder_writes_are_errors_of_one_line(tmp_path):
    write(tmp_path, json.dumps(GOOD))
    assert read_step(tmp_path, 1).is_whole
    for text in CHANGED:
        write(tmp_path, text)
        with pytest.raises(RecordError) as error:
            read_step(tmp_path, 1)
        assert str(error.value).isprintable() and len(str(error.value)) < 800


def test_directories_that_are_no_steps_are_passed_over(tmp_path):
    write(tmp_path, json.dumps(GOOD))
    (tmp_path / "record" / "step-x" / "rank-0").mkdir(parents=True)
    (tmp_path / "record" / "step-000001" / "rank-x").mkdir()
    assert recorded_steps(tmp_path) == [1] and read_step(tmp_path, 1).step == 1
