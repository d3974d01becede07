"""`hark sweep`: every combination, once, and a table over seeds."""

from __future__ import annotations

import json

import pytest
from clips import write_questions

from hark.grpo.config import ConfigError
from hark.launch import sweep
from hark.launch.common.intervals import mean_interval, t_quantile
from hark.models.mini import SIZES, build_mini


# Published: NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, column 0.975.
@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045)])
def test_the_quantiles_are_the_published_ones(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-4)


def test_the_interval_is_that_worked_by_hand():
    mean, interval = mean_interval([0.4, 0.5, 0.6])  # deviation 0.1: 4.303 * 0.1 / sqrt(3) = 0.2484
    assert (mean, *interval) == pytest.approx((0.5, 0.2516, 0.7484), abs=1e-4)
    assert mean_interval([0.4]) == (0.4, None)


def test_commas_in_brackets_and_quotes_do_not_separate():
    assert sweep.alternatives("[q_proj,v_proj],[q_proj]") == ["[q_proj,v_proj]", "[q_proj]"]
    assert sweep.alternatives("{accuracy: 1, format: 0},{accuracy: 1}") == ["{accuracy: 1, format: 0}", "{accuracy: 1}"]
    assert sweep.alternatives("'a,b',c") == ["'a,b'", "c"]


def combinations(*words):
    return sweep.combinations(["mini", *words], sweep.Path("out"))


def test_every_combination_has_a_directory_named_from_its_values():
    names = [one.directory.name for one in combinations("run.seed=0,1", "optim.lr=1e-4,3e-4", "optim.steps=20")]
    assert names == ["seed=0,lr=1e-4", "seed=0,lr=3e-4", "seed=1,lr=1e-4", "seed=1,lr=3e-4"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.directory=x", "a sweep sets run.directory itself"),
        ("run.seed=0,,1", "is empty or given twice"),
        ("run.seed=0,0", "is empty or given twice"),
        ("optim.lrr=1,2", "the nearest key is optim.lr"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(word, message):
    with pytest.raises(ConfigError, match=message):
        combinations(word)


def test_a_failed_run_is_reported_the_others_finish_and_the_same_command_does_only_what_is_left(tmp_path, capsys):
    data = write_questions(tmp_path, 6)
    build_mini(tmp_path / "m", ["What?"], **SIZES["tiny"])
    words = [
        "mini", f"model.path={tmp_path}/m,{tmp_path}/none", f"data.train={data}", "data.validation=null",
        "data.held_out=2", "data.test=null", "optim.steps=1", "optim.warmup_steps=0", "optim.prompts_per_step=2",
        "rollout.group_size=2", "rollout.max_new_tokens=2", "evaluation.every=1", "checkpoint.every=0",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="1 of 2 runs failed: path=.*none"):
        sweep.main(words)
    (row, last) = json.loads((tmp_path / "out" / "sweep.json").read_text())["settings"]
    assert row["accuracy"] == "validation, last" and last["accuracy"] == "validation, best" and row["interval"] is None
    (one,) = [path for path in (tmp_path / "out").glob("*/metrics.jsonl")]
    before = one.stat().st_mtime_ns
    capsys.readouterr()
    with pytest.raises(SystemExit):
        sweep.main(words)
    assert one.stat().st_mtime_ns == before and "m: done" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="was run with optim.lr=0.0003, not 0.5; choose another directory"):
        sweep.main([*words, "optim.lr=0.5"])
