"""Evaluations, logs, choices, pass rates and answer files that somebody made to do harm: errors of one line."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest

from hark import UserError
from hark.data.benchmarks import grading
from hark.data.benchmarks.answer_files import BENCHMARKS
from hark.data.benchmarks.grading import grade_file
from hark.data.errors import DataError
from hark.grpo.instruments.log_file import LogError
from hark.grpo.instruments.metrics import read_metrics
from hark.grpo.learner import MicroBatch
from hark.launch import compare
from hark.launch.common import row_file
from hark.launch.common.evaluation_file import read_evaluation
from hark.launch.common.trained import best_step
from hark.launch.page.collect import Bounds, Collection, all_parts
from hark.launch.pass_rate import is_measured
from tests.written import write_run

NOT_JSON = (
    b"", b"[", b"[" * 200_000, b"1", b"[]", b"nul", b"\xff\xfe{}", b'{"a": ' + b"9" * 6000 + b"}", b'{"a": "\\ud800"}',
    b'{"rows": 1, "rows": []}', b'{"a":' * 999 + b"1" + b"}" * 999,
)  # fmt: skip
OTHERS = (None, True, -1, 1e308, 10**30, "x\x1b[2J", [], [None], [[]], {"a": []})  # in place of a value
ROW = {"id": "a", "task": "sound", "category": "", "prediction": "rain", "correct": True, "stopped": True, "choice": 0}
EVALUATION = {"benchmark": "strict", "model": "m", "step": 1, "accuracy": 1.0, "config": {"data": {}}, "rows": [ROW]}


def one_line(error: BaseException) -> bool:
    return str(error).isprintable() and len(str(error)) < 1000


def only_sentences(use, path: Path, contents) -> int:
    """Use a file with each content; an error must be one sentence. Returns how many contents were refused."""
    refused = 0
    for content in contents:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        try:
            use()
        except UserError as error:
            assert one_line(error), content
            refused += 1
    return refused


def evaluations() -> list:
    """Evaluations with one value of another kind."""
    found = [EVALUATION | {key: value} for key in EVALUATION for value in OTHERS]
    found += [EVALUATION | {"rows": [ROW, ROW | {key: value}]} for key in ROW for value in OTHERS]
    found += [EVALUATION | {"rows": [ROW | {"silent": value}]} for value in OTHERS]
    found += [EVALUATION | {"config": {"data": {"test": value}}} for value in OTHERS]
    return found + [EVALUATION | {"config": {"data": value}} for value in OTHERS]


def test_an_evaluation_with_values_that_are_not_written_is_one_line(tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(EVALUATION))

    def use() -> None:
        compare.main([str(first), str(second)])

    assert only_sentences(use, second, NOT_JSON) == len(NOT_JSON)
    assert only_sentences(use, second, evaluations()) > 100
    assert only_sentences(use, second, [EVALUATION]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("read", [read_evaluation, lambda path: grade_file(str(path), benchmark="mmau", out=None)])
def test_a_pipe_a_directory_and_a_file_without_end_are_refused_at_once(read, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2 << 30)
    started = time.monotonic()
    for path in (tmp_path / "pipe", tmp_path / "directory", tmp_path / "huge", Path("/dev/zero"), tmp_path / "none"):
        with pytest.raises(DataError) as error:
            read(path)
        assert one_line(error.value)
    assert time.monotonic() - started < 5


def test_a_page_about_a_run_with_a_hostile_evaluation_or_log_is_written_or_one_line(tmp_path):
    run = write_run(tmp_path / "run", recorded=())

    def use() -> None:
        all_parts(Collection([run], Bounds()), Bounds())

    only_sentences(use, run / "evaluation.json", [*NOT_JSON[:4], *evaluations()[::7]])
    good = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    lines = [
        json.dumps(good | {key: value}).encode() + b"\n" for key in ("step", "kl", "event", "x") for value in OTHERS
    ]
    evaluation = {"event": "evaluation", "step": 1, "accuracy": 0.5, "questions": 4}
    lines += [json.dumps(evaluation | {key: value}).encode() + b"\n" for key in evaluation for value in OTHERS]
    assert only_sentences(use, run / "metrics.jsonl", [*(text + b"\n" for text in NOT_JSON[1:]), *lines]) > 30


def test_a_log_that_is_no_file_of_a_sensible_size_is_one_line_and_its_incomplete_last_line_is_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": null}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}]
    with log.open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(LogError, match="not a file of at most 1024 MB"):
        read_metrics(tmp_path)
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(LogError, match="not a file of at most 1024 MB"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("note", "size"),
    [
        (b"2 instead of 8\n", 2),
        (b"\xff\xfe", 8),
        (b"2 instead of 8", 8),
        (b"0 instead of 8\n", 8),
        (b"2 instead of 4\n", 8),
    ],
)
def test_a_note_of_the_micro_batch_that_no_run_writes_is_ignored(tmp_path, note, size):
    (tmp_path / "micro_batch.txt").write_bytes(note)
    assert MicroBatch(tmp_path / "micro_batch.txt", 8).size == size


def test_a_choice_that_names_no_step_is_one_line(tmp_path):
    path = tmp_path / "choice.json"
    contents = [*NOT_JSON, *({"step": value} for value in OTHERS if value != -1)]
    assert only_sentences(lambda: best_step(tmp_path), path, contents) == len(contents)
    path.write_text('{"step": 7}')
    assert best_step(tmp_path) == 7


def test_rows_of_a_measurement_that_are_none_are_one_line_and_a_separator_within_a_text_ends_no_row(tmp_path):
    path = tmp_path / "rates.jsonl"
    assert row_file.begin(path, {"seed": 1}, is_measured) == []
    rows = [{"id": f"a{sign}b", "pass_rate": 0.5} for sign in "\u2028\x85\x0b\r"]
    row_file.append(path, rows)
    with path.open("ab") as file:
        file.write(b'{"id": "cut')
    assert row_file.begin(path, {"seed": 1}, is_measured) == rows
    assert path.read_bytes().endswith(b"}\n")

    def use() -> None:
        row_file.begin(path, {"seed": 1}, is_measured)

    contents = [text + b"\n" for text in NOT_JSON[1:]]
    contents += [json.dumps({"id": "a", "pass_rate": value}).encode() + b"\n" for value in (*OTHERS, float("nan"))]
    contents += [json.dumps({"id": value, "pass_rate": 0.5}).encode() + b"\n" for value in OTHERS if value != OTHERS[5]]
    assert only_sentences(use, path, contents) >= len(contents) - 1
    path.write_bytes(b"")
    settings = path.with_name("rates.jsonl.settings.json")
    assert only_sentences(use, settings, [*NOT_JSON, *({"seed": value} for value in OTHERS)]) > 15


def test_answer_files_of_other_kinds_are_one_line_and_never_steer_the_terminal(tmp_path, capsys):
    path = tmp_path / "answers.json"
    good = {"id": "a", "choices": ["rain", "wind"], "answer": "rain", "model_output": "rain", "task": "sound"}
    rows = [[good, good | {key: value}] for key in good for value in OTHERS]
    rows += [[{other: good[other] for other in good if other != key}] for key in good]
    for benchmark in BENCHMARKS:
        use = partial(grade_file, str(path), benchmark=benchmark, out=str(tmp_path / "out.json"))
        assert only_sentences(use, path, [*NOT_JSON, *rows]) > 30
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\\x1b[2J" in said


def test_an_answer_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "LARGEST_VALUE", 10)
    (tmp_path / "answers.json").write_text("[" + " " * 20 + "]")
    with pytest.raises(DataError, match="has more than"):
        grade_file(str(tmp_path / "answers.json"), benchmark="mmau", out=None)
