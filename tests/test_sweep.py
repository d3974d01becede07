"""`hark sweep`: every combination is one run, runs are resumed and not repeated, and the interval is Student's."""

from __future__ import annotations

import csv
import json
from statistics import fmean

import pytest

from hark.grpo.config import ConfigError
from hark.launch import sweep
from hark.launch.common.intervals import mean_interval, t_quantile

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # 97.5 % quantiles of published tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (120, 1.980)],
)
def test_the_quantile_is_that_of_the_published_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_the_interval_worked_by_hand():
    # Standard deviation 0.1, so 4.303 * 0.1 / sqrt(3) on each side.
    mean, (low, high) = mean_interval([0.4, 0.5, 0.6])
    assert (mean, low, high) == (pytest.approx(0.5), pytest.approx(0.2516, abs=1e-4), pytest.approx(0.7484, abs=1e-4))
    assert mean_interval([0.4]) == (0.4, None)


@pytest.mark.parametrize(
    ("text", "values"),
    [("0,1,2", ["0", "1", "2"]), ("[a,b],[c]", ["[a,b]", "[c]"]), ("{a: 1, b: 2}", ["{a: 1, b: 2}"]),
     ("'x,y',z", ["'x,y'", "z"]), ("5", ["5"])],
)  # fmt: skip
def test_commas_inside_brackets_and_quotes_separate_nothing(text, values):
    assert sweep.alternatives(text) == values


@pytest.fixture
def words(settings, questions) -> list[str]:
    return [
        *settings, "optim.steps=2", "rollout.max_new_tokens=12", f"data.validation={questions}", "evaluation.every=1",
        "evaluation.limit=4", "checkpoint.every=1", "checkpoint.export=false", "log.completions=0",
    ]  # fmt: skip


def test_every_combination_is_trained_once_and_shown_with_its_seeds(words, tmp_path, capsys):
    out = tmp_path / "sweep"
    again = [*words, "run.seed=0,1", "--sft", "--at-once", "2", "--out", str(out)]
    sweep.main(again)
    said = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["seed=0", "seed=1"]
    lines = [json.loads(line) for line in (out / "seed=1" / "metrics.jsonl").read_text().splitlines()]
    last = [line["accuracy"] for line in lines if line.get("event") == "evaluation"][-1]
    rows = {row["accuracy"]: row for row in json.loads((out / "sweep.json").read_text())["settings"]}
    seeds = rows["validation, last"]["seeds"]
    assert seeds.keys() == {"0", "1"} and seeds["1"] == last
    assert rows["validation, last"]["mean"] == fmean(seeds.values()) and rows["validation, last"]["interval"]
    with (out / "sweep.csv").open() as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["2", "2"]
    assert "seed=0: sft" in said and "validation, best" in said
    sweep.main(again)
    assert "seed=0: sft" not in capsys.readouterr().out, "finished runs are skipped"


def test_an_interrupted_run_is_resumed_and_another_configuration_refused(words, tmp_path):
    out, fixed = tmp_path / "sweep", ["run.seed=0", "--sft", "--out", str(tmp_path / "sweep")]
    sweep.main([*words, *fixed])
    metrics = out / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    (out / "run" / "checkpoints" / "step-000002" / "hark.json").unlink()  # stopped while it was written
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] < 2))
    sweep.main([*words, *fixed])
    assert "run.resume=true" in (out / "run.log").read_text()
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == 2
    with pytest.raises(ConfigError, match="was run with optim.lr=0.001, not 0.5; choose another directory"):
        sweep.main([*words, "optim.lr=0.5", *fixed])


def test_a_run_that_fails_is_named_and_the_others_go_on(words, tmp_path, capsys):
    missing = f"data.train={tmp_path}/none.jsonl,{words[2].partition('=')[2]}"
    with pytest.raises(SystemExit, match="error: 1 of 2 runs failed: train=.*none.jsonl"):
        sweep.main(
            [*(word for word in words if "data.train" not in word), missing, "--sft", "--out", str(tmp_path / "s")]
        )
    said = capsys.readouterr().out
    assert "failed: error: " in said and "none.jsonl: no such file" in said
    assert "validation, last" in said


@pytest.mark.parametrize(
    ("word", "message"),
    [("optim.lr=1,", "a value is empty or given twice"), ("optim.lr=1,1", "given twice"),
     ("run.directory=a,b", "--out"), ("optim.lr=1,x", "optim.lr must be")],
)  # fmt: skip
def test_a_mistake_is_said_before_anything_runs(words, word, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sweep.main([*words, word, "--out", str(tmp_path / "sweep")])
    assert not (tmp_path / "sweep").exists()
