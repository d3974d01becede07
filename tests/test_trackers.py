"""Trackers, by the real packages without a network: what a run logs is read back from their files."""

from __future__ import annotations

import html
import io
import json
import sqlite3
import struct
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hark.grpo.config import ConfigError
from hark.grpo.instruments import trackers
from hark.grpo.instruments.console import Completion
from hark.grpo.instruments.metrics import Metrics
from hark.grpo.instruments.trackers import PROJECT, check_trackers, open_trackers
from hark.grpo.runtime.collectives import World
from hark.launch.common.config_file import load_config
from hark.launch.common.questions import listening, rewards_of
from tests.ranks import on_ranks
from tests.runs import build

RATE = 16_000
WAVE = (0.5 * np.sin(np.arange(800) / 10)).astype(np.float32)
HOSTILE = "<script>alert(1)</script> | **a** [b](c) `d`\n| x |"
CONFIG = {"run": {"directory": "runs/a"}, "optim": {"lr": 1e-6}}
# The steps of a run of 2, of which the second is done again after a resume.
FIRST, AGAIN = (1, 2), (2, 3)


def completion(step: int) -> Completion:
    values = {"accuracy": 1.0, "format": 0.5}
    return Completion(f"train-{step}", "Which?", HOSTILE, values, reward=1.5, advantage=-0.25)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """The directory of a run, with a relative name."""
    monkeypatch.chdir(tmp_path)
    return Path("runs/a")


def logged(directory: Path, name: str) -> None:
    """Log two steps, then resume after the first and log two more; each with completions, a clip and an evaluation."""
    for steps in (FIRST, AGAIN):
        metrics = Metrics(
            directory, rank=0, total_steps=3, trackers=partial(open_trackers, [name], directory, CONFIG)
        )  # fmt: skip
        metrics.truncate(steps[0] if steps is AGAIN else 0)
        for step in steps:
            again = 0.5 if steps is AGAIN else 0.0
            metrics.log(step, {"reward": step + again, "reward/accuracy": 0.25})
            metrics.show_completions(step, [completion(step)], lambda: {"clips/1": (WAVE, RATE)})
            metrics.log_event("evaluation", {"accuracy": 0.75, "note": "x"})
        metrics.close()


COLUMNS = ["id", "question", "text", "reward", "advantage", "reward/accuracy", "reward/format"]


def row(step: int) -> list:
    return [f"train-{step}", "Which?", HOSTILE, 1.5, -0.25, 1.0, 0.5]


def test_tensorboard_shows_each_step_once_texts_as_they_are_and_clips(run):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html
    from tensorboard.util.tensor_util import make_ndarray

    logged(run, "tensorboard")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    curves = {
        tag: [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)]
        for tag in events.PluginTagToContent("scalars")
    }
    assert curves["reward"] == [(1, 1.0), (2, 2.5), (3, 3.5)]
    assert curves["evaluation/accuracy"] == [(1, 0.75), (2, 0.75), (3, 0.75)]
    assert set(curves) == {"reward", "reward/accuracy", "evaluation/accuracy"}

    tables = events.Tensors("completions/text_summary")
    assert [event.step for event in tables] == [1, 2, 3]
    page = markdown_to_safe_html(tables[0].tensor_proto.string_val[0])
    assert page.count("<tr>") == 2 and page.count("<td>") == len(COLUMNS), "one row, whatever the text holds"
    assert f"<td>{HOSTILE}</td>" in html.unescape(page) and "<script" not in page and "<a" not in page

    clip = events.Tensors("clips/1")[-1]
    waveform, rate = soundfile.read(io.BytesIO(clip.tensor_proto.string_val[0]))
    assert clip.step == 3 and rate == RATE and np.abs(waveform - WAVE).max() < 1e-4
    assert json.dumps(CONFIG["optim"]["lr"]) in str(events.Tensors("config/text_summary")[0].tensor_proto)


def test_trackio_continues_a_resumed_run_and_keeps_every_table(run, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the variable when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    logged(run, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / f"{PROJECT}.db") as base:
        found = base.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        ((config,),) = base.execute("select config from configs").fetchall()
    assert len({run_id for run_id, *_ in found}) == 1 and {name for _, name, *_ in found} == {"runs-a"}
    values = [(step, json.loads(text)) for _, _, step, text in found]
    assert [(step, line["reward"]) for step, line in values if "reward" in line] == [(1, 1), (2, 2), (2, 2.5), (3, 3.5)]
    assert [step for step, line in values if "evaluation/accuracy" in line] == [1, 2, 2, 3]
    tables = [(step, line["completions"]["_value"]) for step, line in values if "completions" in line]
    assert [step for step, _ in tables] == [1, 2, 2, 3] and tables[-1][1] == [dict(zip(COLUMNS, row(3), strict=True))]
    clip = [line["clips/1"]["file_path"] for _, line in values if "clips/1" in line][-1]
    waveform, rate = soundfile.read(tmp_path / "trackio" / "media" / clip)
    assert rate == RATE and np.abs(waveform - WAVE).max() < 1e-4
    assert json.loads(config)["optim"] == CONFIG["optim"]


def wandb_records(path: Path) -> list:
    """The records of a run's file: a log of LevelDB's format, in blocks of 32 KiB, that begins with 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no header fits in what is left of the block
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def _line(history) -> dict:
    """What one call of `log` gave; the parts of a table or a clip in a dictionary."""
    line: dict = {}
    for item in history.item:
        name, *part = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        line |= {name: line.get(name, {}) | {part[0]: value}} if part else {name: value}
    return line


def test_wandb_resumes_its_run_and_has_a_table_for_each_step(run, monkeypatch):
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("_DISABLE_STATS", "true"), ("_DISABLE_META", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    logged(run, "wandb")
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len(files) == 2 and len({one.run_id for one in runs}) == 1 and runs[0].project == PROJECT
    assert {item.key: json.loads(item.value_json) for item in runs[0].config.update}["optim"] == CONFIG["optim"]
    lines = [_line(record.history) for record in records if record.WhichOneof("record_type") == "history"]
    assert [(line["step"], line["reward"]) for line in lines if "reward" in line] == [
        (1, 1),
        (2, 2),
        (2, 2.5),
        (3, 3.5),
    ]
    assert [line["step"] for line in lines if "evaluation/accuracy" in line] == [1, 2, 2, 3]
    tables = {name: (file.parent, line[name]) for file in files for line in lines for name in line if "step-" in name}
    assert list(tables) == [f"completions/step-{step:06}" for step in (1, 2, 3)]
    folder, table = tables["completions/step-000003"]
    stored = json.loads((folder / "files" / table["path"]).read_text())
    assert stored["columns"] == COLUMNS and stored["data"] == [row(3)]
    clip = [line["clips/1"] for line in lines if "clips/1" in line][-1]
    waveform, rate = soundfile.read(folder / "files" / clip["path"])
    assert rate == RATE and np.abs(waveform - WAVE).max() < 1e-4
    (axis,) = {record.metric.step_metric for record in records if record.metric.glob_name == "*"}
    assert axis == "step"


def test_a_tracker_without_its_package_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_trackers([])
    with pytest.raises(ConfigError, match="log.trackers names wandb, which is not installed; run: pip install wandb"):
        check_trackers(["wandb"])


class Recorder:
    """A tracker that keeps what it is given."""

    def __init__(self, directory: Path, config: dict, start: int):
        self.calls: list[tuple] = [("config", config, start)]

    def __getattr__(self, name: str):
        return lambda *values: self.calls.append((name, *values))


def test_a_run_gives_its_trackers_its_metrics_and_the_clips_of_the_completions_shown(settings, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda *values: opened.append(Recorder(*values)) or opened[-1])
    words = [f"run.directory={tmp_path}/run", "log.trackers=[wandb]", "log.completions=2", "checkpoint.export=false"]
    config = load_config([*settings, *words, "checkpoint.every=0"])
    decoded = []

    def run(world: World) -> None:
        from hark.grpo import loop

        learner = build(world, config, rewards=rewards_of(config))
        listen = listening(config, learner.policy)
        learner.listen = lambda example: decoded.append(example.id) or listen(example)
        loop.train(learner)

    on_ranks(1, run)
    (tracker,) = opened
    calls = {kind: [values for name, *values in tracker.calls if name == kind] for kind in ("scalars", "clips")}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in calls["scalars"]] == lines
    assert [step for step, _ in calls["clips"]] == [2, 3]
    tables = [values for kind, *values in tracker.calls if kind == "completions"]
    for (_, columns, rows), (_, clips) in zip(tables, calls["clips"], strict=True):
        assert columns == COLUMNS
        questions = list(dict.fromkeys(row[0] for row in rows))
        assert list(clips) == [f"clips/{n}" for n in range(1, len(questions) + 1)]
        for question, (waveform, rate) in zip(questions, clips.values(), strict=True):
            stored, _ = soundfile.read(Path(config.data.train).parent / f"{question}.wav")
            assert rate == RATE and np.abs(waveform - stored).max() < 1e-4
    assert len(decoded) == sum(len(clips) for _, clips in calls["clips"]), "no other clip is decoded"
    assert tracker.calls[-1] == ("close",)
