"""Runs that are kept, and the study of the algorithms, from runs that are written by hand."""

from __future__ import annotations

import json

import pytest

from hark import UserError
from hark.launch.studies import algorithms, kept
from hark.launch.studies.kept import Run, do_all, percent

PROGRAM = """
import sys, pathlib
directory = pathlib.Path(sys.argv[1])
(directory / "count").open("a").write("x")
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "LAUNCH", tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    return lambda name, status=0: Run(tmp_path / name, "program.py", (str(tmp_path / name), str(status)))


def test_a_run_is_done_once_and_a_failed_one_again_from_its_beginning(program):
    good, bad = program("good"), program("bad", status=3)
    with pytest.raises(UserError, match="status 3; see .*output.txt"):
        list(do_all([good, bad]))
    assert good.is_finished and not bad.is_finished
    mended = Run(bad.directory, "program.py", (str(bad.directory), "0"))
    assert {one.directory for one in do_all([good, mended], jobs=2)} == {good.directory, bad.directory}
    for one in (good, mended):
        assert (one.directory / "count").read_text() == "x", "once, in an empty directory"
    assert not program("good", status=1).is_finished, "with other words it is another run"


def test_a_mean_and_its_spread_in_percent():
    assert percent([0.4, 0.5]) == "45.0 ± 7.1"  # .1 / sqrt(2)
    assert percent([0.4]) == "40.0 ± 0.0"


def written(root, name: str, seed: int, accuracy: float, drawn: int | None = None) -> Run:
    """A finished run that ends with this accuracy."""
    one = algorithms.training(root, name, seed)
    one.directory.mkdir(parents=True)
    lines = []
    for step in range(1, algorithms.STEPS + 1):
        figures = {"reward": 1.0, "equal_reward_share": 0.25, "grad_norm": 0.5, "entropy": 0.3, "completion_tokens": 4}
        lines.append({"step": step} | figures | ({"drawn_prompts": drawn} if drawn else {}))
        if step % algorithms.EVERY == 0:
            share = accuracy * step / algorithms.STEPS
            lines.append({"event": "evaluation", "step": step, "accuracy": share, "no_choice_share": 0.1})
    (one.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (one.directory / kept.FINISHED).write_text(json.dumps({"words": [one.program, *one.words], "seconds": 1}))
    return one


def test_the_study_of_algorithms_shows_what_is_finished_the_best_first(tmp_path):
    start = written(tmp_path, "grpo", 9, 0.3)
    runs = {("grpo", seed): written(tmp_path, "grpo", seed, 0.4 + seed / 10) for seed in range(2)}
    runs |= {("sapo", 0): written(tmp_path, "sapo", 0, 0.6), ("gspo", 0): algorithms.training(tmp_path, "gspo", 0)}
    runs |= {(algorithms.PLAIN, 0): written(tmp_path, algorithms.PLAIN, 0, 0.5)}
    runs |= {(algorithms.DYNAMIC, 0): written(tmp_path, algorithms.DYNAMIC, 0, 0.55, drawn=10)}
    result = algorithms.figures(start, runs)
    text = algorithms.tables(result)
    assert text.startswith("5 of 6 runs;") and "from a start of 30.0 %" in text
    names = [line.split("|")[1].strip() for line in text.split("\n") if line.startswith("| `")]
    assert names == ["`sapo`", "`grpo`"], "the best first; what is not finished is left out"
    assert "| `grpo` | 2 | 45.0 ± 7.1 | 45.0 ± 7.1 | 10.0 ± 0.0 | 0.30 | 0.50 |" in text
    # 25 steps of 8 and of 10 prompts with 12 completions each
    assert f"| {algorithms.PLAIN} | 25 | 2400 |" in text and f"| {algorithms.DYNAMIC} | 25 | 3000 |" in text
    algorithms.plot(result, tmp_path / "curves.svg")
    assert "test accuracy, %" in (tmp_path / "curves.svg").read_text()
