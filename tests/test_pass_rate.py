"""Pass rates: what is written, in which order, after an interruption and on several ranks; right answers to learn."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from hark.data.clip import Clip
from hark.data.described import row_in
from hark.data.examples import Example, load_examples
from hark.data.prompts import target
from hark.grpo.config import ConfigError
from hark.launch import pass_rate, sft
from hark.launch.common.config_file import config_of
from hark.launch.common.graded_samples import Drawn, kept, measured
from hark.launch.pass_rate import report
from tests.clips import write_questions
from tests.ranks import as_torchrun
from tests.runs import read_metrics

DRAWN = Drawn("q", [True, False, True, True, True], ["b", "x", "a", "b", "c"], [True] * 4 + [False], [1, 9, 2, 1, 8])


def test_the_best_rewarded_different_right_answers_with_an_end_are_kept():
    row = {"id": "q", "answer": 1}
    assert [one["target"] for one in kept(row, DRAWN, 4)] == ["a", "b"], "x is wrong, c has no end, b stands twice"
    assert kept(row, DRAWN, 1) == [{"id": "q#1", "answer": 1, "answer_to": "q", "target": "a"}]
    assert measured(row, DRAWN) == {"id": "q", "answer": 1, "pass_rate": 0.8, "pass_samples": 5}


def test_the_report_counts_how_many_answers_are_right_and_what_a_band_keeps():
    config = config_of(["model.path=m", "run.directory=r", "rollout.group_size=4"])
    lines = report([0.0, 0.0, 0.25, 0.5, 1.0, 0.75, 0.5, 0.5], config).splitlines()
    assert [line.split() for line in lines[:6]] == [
        ["right", "of", "4", "questions"], ["0", "2", "#" * 27], ["1", "1", "#" * 13], ["2", "3", "#" * 40],
        ["3", "1", "#" * 13], ["4", "1", "#" * 13],
    ]  # fmt: skip
    assert lines[6].startswith("mean pass rate 0.438; 5 of 8 questions have right and wrong answers")
    assert lines[7] == "data.order_by=pass_rate data.band=[0.375, 0.75] keeps 4 of 8"
    own = config_of(["model.path=m", "run.directory=r", "data.order_by=pass_rate", "data.band=[0, 0.25]"])
    assert report([0.0, 0.5, 0.25], own).endswith("data.band=[0, 0.25] keeps 2 of 3")


@pytest.mark.parametrize(
    "clips",
    [
        (),
        (Clip(Path("in/a.wav")),),
        (Clip(Path("in/a.wav"), 1.0, 2.5),),
        (Clip(Path("in/a.wav"), 1.0), Clip(Path("/far/b.wav"))),
    ],
)
def test_a_written_row_is_read_as_the_same_example(tmp_path, monkeypatch, clips):
    monkeypatch.chdir(tmp_path)
    first = Example(
        "q", clips, "Which?", ("a", "b"), 1, dataset="d", task="t", difficulty="easy", pass_rate=0.5, target="a!",
        extra={"own": [1]},
    )  # fmt: skip
    opened = dataclasses.replace(first, choices=(), answer=None, accepted=("a", "b"))
    for example in (first, opened):
        Path("out").mkdir(exist_ok=True)
        Path("out/q.jsonl").write_text(json.dumps(row_in(example, Path("out"))) + "\n")
        (again,), _ = load_examples("out/q.jsonl", require_audio=False, allow_outside=True)
        places = [(clip.source.resolve(), clip.start, clip.end) for clip in again.clips]
        assert places == [(tmp_path / clip.source, clip.start, clip.end) for clip in clips]
        assert dataclasses.replace(again, clips=clips, line="") == example and again.extra == example.extra


@pytest.fixture
def words(tmp_path, qwen2_audio_dir):
    """A measurement by a reward of one's own, since a random model is never right."""
    (tmp_path / "mine.py").write_text(
        "def some(group):\n    return [float(len(text) % 3 == 0) for text in group.texts]\n"
    )
    data = write_questions(tmp_path / "data", 7)
    (tmp_path / "c.yaml").write_text(
        f"run: {{directory: {tmp_path}/run, threads: 1}}\nmodel: {{path: {qwen2_audio_dir}}}\n"
        f"data: {{train: {data}}}\nrollout: {{group_size: 4, max_new_tokens: 24}}\n"
        "optim: {prompts_per_step: 2}\ncheckpoint: {export: false}\nlog: {completions: 0}\n"
    )
    return [f"{tmp_path}/c.yaml", f"--reward={tmp_path}/mine.py:some"]


def outputs(directory, *more):
    return [f"--out={directory}/rates.jsonl", f"--keep={directory}/kept.jsonl", "--most=2", *more]


def read(directory):
    return [(directory / name).read_text() for name in ("rates.jsonl", "kept.jsonl")]


def test_a_measurement_goes_on_after_a_crash_and_is_the_same_on_two_ranks(tmp_path, words, capsys):
    (whole := tmp_path / "whole").mkdir()
    pass_rate.main([*words, *outputs(whole)])
    assert "right of 4  questions" in capsys.readouterr().out
    rates, answers = read(whole)
    rows = [json.loads(line) for line in rates.splitlines()]
    assert [row["id"] for row in rows] == [f"train-{n}" for n in range(7)], "in the order of the file"
    assert 0 < sum(row["pass_rate"] for row in rows) < 7
    # After a crash: two rows and a piece of the third; of the answers to keep, one more question's are written.
    for name, text, rest in (("broken", rates, '{"id": "tra'), ("joined", rates, "")):
        shutil.copytree(whole, tmp_path / name)
        (tmp_path / name / "rates.jsonl").write_text("".join(text.splitlines(keepends=True)[:2]) + rest)
    settings = tmp_path / "joined" / "rates.jsonl.settings.json"
    for name in ("broken", "joined"):
        path = tmp_path / name / settings.name
        path.write_text(path.read_text().replace(str(whole), str(tmp_path / name)))
    pass_rate.main([*words, *outputs(tmp_path / "broken")])
    as_torchrun(2, pass_rate.main, [*words, *outputs(tmp_path / "joined")])
    assert read(tmp_path / "broken") == read(tmp_path / "joined") == [rates, answers]


def test_what_is_kept_can_be_fine_tuned_on_and_what_is_measured_be_read(tmp_path, words):
    (tmp_path / "out").mkdir()
    pass_rate.main([*words, *outputs(tmp_path / "out", "--samples=3")])
    examples, _ = load_examples(tmp_path / "out" / "rates.jsonl", allow_outside=True)
    assert all(example.clips[0].source.exists() and example.pass_rate is not None for example in examples)
    learnt, _ = load_examples(tmp_path / "out" / "kept.jsonl", allow_outside=True)
    assert learnt and all(len(target(example, "answer")) % 3 == 0 for example in learnt)
    assert {row.extra["pass_samples"] for row in examples} == {3}
    sft.main([words[0], f"data.train={tmp_path}/out/kept.jsonl", "data.allow_outside=true", "optim.steps=1"])
    assert len(read_metrics(tmp_path / "run")) == 1


def test_a_file_of_something_else_is_not_written_to(tmp_path, words):
    (tmp_path / "rates.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match="rates.jsonl is there already, and is not of `hark pass-rate`"):
        pass_rate.main([*words, *outputs(tmp_path)])
    (tmp_path / "rates.jsonl").unlink()
    (tmp_path / "kept.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match="kept.jsonl is there already, and .*rates.jsonl is not; choose another"):
        pass_rate.main([*words, *outputs(tmp_path)])
    assert (tmp_path / "kept.jsonl").read_text() == "mine\n"
    pass_rate.row_file.begin(tmp_path / "rates.jsonl", {"model": "another"}, pass_rate.is_measured)
    with pytest.raises(ConfigError, match="was begun with model=another, not "):
        pass_rate.main([*words, *outputs(tmp_path)])
    assert (tmp_path / "rates.jsonl").read_text() == ""


@pytest.mark.parametrize("name", ["rates.jsonl", "kept.jsonl"])
def test_two_measurements_do_not_write_to_one_file(name, tmp_path, words, monkeypatch):
    monkeypatch.setattr(pass_rate, "locked_file", partial(pass_rate.locked_file, patience=0.1))
    with (tmp_path / f"{name}.lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=f"{name} is in use by another run; .* choose another file"):
            pass_rate.main([*words, *outputs(tmp_path)])
    assert not (tmp_path / "rates.jsonl").exists()


@pytest.mark.parametrize("wrong", [["--samples=0"], ["--most=0"], ["--keep=x.jsonl"]])
def test_wrong_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        pass_rate.parse(["c.yaml", "--out=x.jsonl", *wrong])
    assert "must be at least 1" in (said := capsys.readouterr().err) or "name the same file" in said
