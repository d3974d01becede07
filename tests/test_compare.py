"""Two models on the same questions: published intervals, and a table of what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hark.data.benchmarks.paired import Paired, paired, pairs_of
from hark.data.errors import DataError
from hark.launch import compare


@pytest.mark.parametrize(
    ("counts", "difference", "interval"),
    [
        # Newcombe 1998, table II; Altman and others, Statistics with Confidence, 2000, table 6.2; the signs are those
        # of the second minus the first.
        (Paired(36, 2, 12, 0), 0.2, (0.0569, 0.3404)),
        (Paired(14, 0, 5, 22), 0.122, (0.011, 0.226)),
    ],
)
def test_the_interval_is_that_of_published_examples(counts, difference, interval):
    assert counts.difference == pytest.approx(difference, abs=5e-4)
    assert counts.interval == pytest.approx(interval, abs=6e-4)
    both, first, second, neither = counts
    low, high = Paired(both, second, first, neither).interval
    assert (-high, -low) == pytest.approx(counts.interval, abs=1e-12), "the models exchanged"


def test_the_exact_p_value_is_that_of_a_fair_coin():
    assert Paired(9, 0, 5, 9).p_value == 2 / 2**5
    assert Paired(3, 2, 12, 0).p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert Paired(4, 3, 3, 2).p_value == Paired(5, 0, 0, 5).p_value == 1.0


@pytest.mark.parametrize("counts", [Paired(7, 0, 0, 0), Paired(0, 0, 0, 7), Paired(4, 0, 0, 3), Paired(0, 5, 0, 0)])
def test_the_interval_holds_the_difference_in_extreme_tables(counts):
    low, high = counts.interval
    assert -1 <= low <= counts.difference <= high <= 1 and low < high


def row(identity: str, correct: bool | None, task: str = "sound") -> dict:
    return {"id": identity, "task": task, "category": "", "correct": correct}


def test_rows_are_matched_by_id_and_hidden_answers_left_out():
    first = [row("a", True), row("b", False), row("c", None), row("d", True)]
    second = [row("b", True), row("a", True), row("c", None), row("x", True)]
    assert paired(pairs_of(first, second)) == Paired(1, 0, 1, 0)


def write(directory: Path, rows: list[dict], **changes) -> Path:
    directory.mkdir()
    evaluation = {"model": f"model of {directory.name}", "benchmark": "strict", "rows": rows} | changes
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    return directory


def test_each_run_is_compared_with_the_first_over_all_and_by_task(tmp_path, capsys):
    ids = [f"q{n}" for n in range(50)]
    tasks = ["sound"] * 25 + ["music"] * 25
    right = {"one": range(38), "two": [*range(36), *range(38, 50)], "three": range(50)}
    runs = [
        write(tmp_path / name, [row(i, n in right[name], t) for n, (i, t) in enumerate(zip(ids, tasks, strict=True))])
        for name in right
    ]
    compare.main([*map(str, runs), "--json", str(tmp_path / "out.json")])
    said = capsys.readouterr().out
    assert "A: model of one" in said and "B: model of two" in said and "B: model of three" in said
    assert " ".join(said.splitlines()[3].split()) == "all 50 76.0 96.0 +20.0 +5.7 to +34.0 0.013"
    assert "right in both 36, only in A 2, only in B 12, in neither 0" in said
    assert max(map(len, said.splitlines())) <= 80 + len(str(tmp_path))
    two, three = json.loads((tmp_path / "out.json").read_text())["compared"]
    assert two["all"]["difference"] == pytest.approx(0.2) and three["music"]["second_only"] == 12
    assert two["sound"]["both"] == 25


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    runs = [write(tmp_path / "a", [row("a", True)]), write(tmp_path / "b", [row("b", True)])]
    runs.append(write(tmp_path / "c", [row("a", True)], benchmark="mmau"))
    unread = "no such file .*`hark evaluate RUN` writes it"
    rules = "graded by the rules of strict and mmau"
    for other, message in [(runs[1], "no graded question in common"), (runs[2], rules), (tmp_path, unread)]:
        with pytest.raises(DataError, match=message):
            compare.main([str(runs[0]), str(other)])
    with pytest.raises(SystemExit):
        compare.main([str(runs[0])])


def test_a_result_that_is_older_than_its_run_or_of_other_settings_is_said(tmp_path, capsys):
    settings = [
        {"rollout": {"max_new_tokens": n}, "data": {"template": "answer", "max_seconds": 30.0}} for n in (12, 5)
    ]
    runs = [
        write(tmp_path / name, [row("a", True)], step=4, config=config)
        for name, config in zip("ab", settings, strict=True)
    ]
    for step in (4, 6):
        checkpoint = tmp_path / "b" / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "hark.json").write_text("{}")
    compare.main(list(map(str, runs)))
    said = capsys.readouterr().out
    assert f"note: {tmp_path}/b/evaluation.json is that of step 4, and the run has step 6 by now" in said
    assert "note: they were asked with another rollout.max_new_tokens: 12 and 5" in said and said.count("note:") == 2
