"""Recorded steps that somebody made to do harm: errors of one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hark.grpo.instruments.record import RecordError, read_step, recorded_steps
from hark.grpo.runtime.manifest import signed
from hark.launch import step as step_command
from hark.launch.page.collect import Bounds, Collection, all_parts
from tests.written import replace_tensors, values_of, write_run

OTHERS = (None, "x", -1.5, float("nan"), [None], {"a": 1})
NOT_JSON = ("[" * 100_000, "[]", "1", "", '{"a": ' + "9" * 5000 + "}")
FREE = {"versions", "config", "row"}  # whatever they hold beside what is read of them


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run", recorded=(1,))


def part(run: Path) -> Path:
    return run / "record" / "step-000001" / "rank-0"


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where the parts of a value are, the first of each list alone."""
    keys = value if isinstance(value, dict) else range(min(len(value), 1)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        if key not in FREE:
            yield from places(value[key], (*path, key))


def changed(values: dict, path: tuple, value: Any) -> bytes:
    """The same JSON with another value at a place, and a right digest of it."""
    whole = parent = deepcopy(values)
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    try:
        return signed(whole)
    except ValueError:  # a value that JSON cannot hold, nor a digest of it be computed
        return json.dumps(whole).encode()


def refused(run: Path) -> bool:
    """Whether a step is refused by one line; one that is read can be shown and drawn."""
    try:
        read_step(run, 1)
    except RecordError as error:
        assert str(error).isprintable() and len(str(error)) < 800
        return True
    with contextlib.redirect_stdout(io.StringIO()) as text:
        for words in ([], ["--show", "loss"], ["--show", "likeliest"]):
            step_command.main([str(run), "1", *words])
    assert "\x1b" not in text.getvalue()
    all_parts(Collection([run], Bounds()), Bounds())
    return False


def test_values_that_no_recorder_writes_are_errors_of_one_line(run):
    assert not refused(run)
    path = part(run) / "step.json"
    good = values_of(part(run))
    found = {}
    for place in places(good):
        for value in OTHERS:
            path.write_bytes(changed(good, place, value))
            found[place, repr(value)] = refused(run)
    assert sum(found.values()) > 150 and not all(found.values())
    for name in ("group_size", "prompts", "completions", "tokens", "config"):
        assert all(found[(name,), repr(value)] for value in OTHERS), name
    for text in NOT_JSON:
        path.write_text(text)
        assert refused(run)


def test_tensors_of_other_sizes_and_kinds_are_errors_of_one_line(run):
    good = load_file(part(run) / "tensors.safetensors")
    for name, tensor in good.items():
        for other in (tensor[:-1], tensor[..., None], tensor.to(torch.int8), torch.zeros(())):
            replace_tensors(part(run), good | {name: other.contiguous()})
            assert refused(run), (name, other.shape, other.dtype)
    replace_tensors(part(run), good)
    assert not refused(run)
    replace_tensors(part(run), good | {"tokens": good["tokens"] + 1000})
    assert refused(run), "tokens without a text"


@pytest.mark.parametrize("name", ["step.json", "tensors.safetensors"])
def test_a_pipe_and_a_hole_of_gigabytes_are_refused_at_once(run, name):
    path = part(run) / name
    path.unlink()
    os.mkfifo(path)
    assert refused(run)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(8 << 30)
    assert refused(run)


def test_a_reason_cannot_steer_the_terminal(run):
    path = part(run) / "step.json"
    path.write_bytes(changed(values_of(part(run)), ("reason",), "\x1b[2J"))
    assert not refused(run)


def test_directories_that_are_no_steps_are_passed_over(run):
    (run / "record" / "step-x" / "rank-0").mkdir(parents=True)
    (run / "record" / "step-000001" / "rank-x").mkdir()
    assert recorded_steps(run) == [1] and read_step(run, 1).step == 1
