"""Runs that are kept, and the study of the algorithms, from runs that are written by hand."""

from __future__ import annotations

import itertools
import json

import pytest
from numpy.random import default_rng

from hark import UserError
from hark.launch.common.pages import Markers
from hark.launch.studies import algorithms, asr, kept, rl_or_sft
from hark.launch.studies.kept import Kept, Run, answered, do_all, percent

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
        list(do_all({"a": [good], "b": [bad]}))
    assert good.is_finished and not bad.is_finished
    mended = Run(bad.directory, "program.py", (str(bad.directory), "0"))
    assert set(do_all({"a": [good, mended], "b": [good]}, jobs=2)) == {"a", "b"}
    for one in (good, mended):
        assert (one.directory / "count").read_text() == "x", "once, in an empty directory"
    assert not program("good", status=1).is_finished, "with other words it is another run"


def test_a_mean_and_its_spread_in_percent():
    assert percent([0.4, 0.5]) == "45.0 ± 7.1"  # .1 / sqrt(2)
    assert percent([0.4]) == "40.0"


def written(root, name: str, seed: int, accuracy: float, drawn: int | None = None) -> Run:
    """A finished run that ends with this accuracy."""
    (one,) = algorithms.runs_of(root, name, seed)
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


def test_a_case_is_kept_with_its_settings(tmp_path):
    Kept(tmp_path / "figures.json").put("one", [1, "a"], {"accuracy": 0.5})
    again = Kept(tmp_path / "figures.json")
    assert again.has("one", [1, "a"]) and again.figures("one") == {"accuracy": 0.5}
    assert not again.has("one", [2, "a"]) and not again.has("other", [1, "a"])


def test_the_study_of_algorithms_shows_what_is_finished_the_best_first(tmp_path, capsys):
    page, figures = tmp_path / "page.md", Kept(tmp_path / "figures.json")
    page.write_text(f"before\n{algorithms.MARKERS.begin}\n{algorithms.MARKERS.end}\nafter\n")
    figures.put("start", [], {"accuracy": 0.3})
    ends = {("grpo", 0): 0.4, ("grpo", 1): 0.5, ("sapo", 0): 0.6, ("sapo", 1): 0.6}
    ends |= {(algorithms.PLAIN, seed): 0.5 for seed in (0, 1)} | {(algorithms.DYNAMIC, seed): 0.55 for seed in (0, 1)}
    for (name, seed), accuracy in ends.items():
        one = written(tmp_path, name, seed, accuracy, drawn=10 if name == algorithms.DYNAMIC else None)
        figures.put(algorithms.case_name(name, seed), algorithms.settings_of(name, seed), algorithms.figures_of([one]))
    words = [f"--{name}={tmp_path}/{file}" for name, file in (("json", "figures.json"), ("plot", "c.svg"))]
    algorithms.main(["--seeds=2", f"--page={page}", f"--root={tmp_path}", *words, "--only", *dict(ends_by_name(ends))])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("8 of 8 runs;") == 1
    names = [line.split("|")[1].strip() for line in text.split("\n") if "±" in line][:4]
    assert names == ["`sapo`", algorithms.DYNAMIC, algorithms.PLAIN, "`grpo`"], "the best first"
    assert "| `grpo` | 2 | 45.0 ± 7.1 | 45.0 ± 7.1 | 10.0 ± 0.0 | 0.30 | 0.50 |" in text
    # 20 steps of 8 and of 10 prompts with 12 completions each
    assert f"| {algorithms.PLAIN} | 20 | 1920 |" in text and f"| {algorithms.DYNAMIC} | 20 | 2400 |" in text
    assert "test accuracy, %" in (tmp_path / "c.svg").read_text()


def ends_by_name(ends) -> list[tuple[str, None]]:
    return [(name, None) for name, _ in ends]


def test_training_start_and_test_of_rl_or_sft_share_no_question(tmp_path):
    kinds = [*rl_or_sft.WORDS, *rl_or_sft.NEVER]
    for split, count in (("train", 2400), ("test", 480)):
        rows = [
            {"id": f"{split}-{n}", "audio_path": f"audio/{n}.wav", "question_text": f"Which {n}?", "answer": 0,
             "multi_choice": ["a", "b"], "category": kinds[n % len(kinds)]} for n in range(count)
        ]  # fmt: skip
        rl_or_sft.lines(tmp_path / f"{split}.jsonl", rows)
    rl_or_sft.divide(tmp_path, tmp_path / "divided")
    read = {path.stem: list(map(json.loads, path.open())) for path in (tmp_path / "divided").glob("*.jsonl")}
    ids = {name: {row["id"].removesuffix("-words") for row in rows} for name, rows in read.items()}
    assert not ids["start"] & ids["train-320"] and not (ids["start"] | ids["train-320"]) & ids["test"]
    assert ids["train-40"] < ids["train-320"] and len(read["train-320"]) == 320
    for name in ("start", "train-320"):
        assert not {row["category"] for row in read[name]} & {*rl_or_sft.NEVER}
    parts = {part: [row for row in read["test"] if row["dataset_name"] == part] for part in rl_or_sft.PARTS}
    assert all(len(rows) == rl_or_sft.QUESTIONS for rows in parts.values())
    assert {row["category"] for row in parts["other kinds"]} <= {*rl_or_sft.NEVER}
    assert all(row["id"].startswith("train-") for row in parts["same sources"])
    pairs = list(zip(parts["other sources"], parts["other words"], strict=True))
    assert all(a["audio_path"] == b["audio_path"] and a["question_text"] != b["question_text"] for a, b in pairs)


def test_the_study_of_rl_or_sft_has_a_table_for_each_cell(tmp_path):
    page, kept_figures, cell = tmp_path / "page.md", Kept(tmp_path / "figures.json"), rl_or_sft.CELLS[0]
    page.write_text(f"{rl_or_sft.MARKERS.begin}\n{rl_or_sft.MARKERS.end}\n")
    cases = {"start": (cell, "start", 0), "g0": (cell, "grpo", 0), "g1": (cell, "grpo", 1)}
    for number, (case, which) in enumerate(cases.items()):
        shares = dict.fromkeys(rl_or_sft.PARTS, 0.2 + number / 10)
        figures = {"accuracy": shares, "no_choice": dict.fromkeys(rl_or_sft.PARTS, 0.1), "silent": 0.25, "seconds": 60}
        kept_figures.put(case, rl_or_sft.settings_of(*which), figures)
    arguments = rl_or_sft.parse([f"--page={page}", f"--plot={tmp_path}/plot.svg"])
    text = rl_or_sft.write(arguments, kept_figures, cases | {"s0": (cell, "sft-lora", 0)})
    assert "\n\n3 of 4 cases.\n" in text and text in page.read_text()
    assert "| grpo | 2 | 35.0 ± 7.1 |" in text and "| start | 1 | 20.0 | 20.0 |" in text
    assert "other kinds" in (tmp_path / "plot.svg").read_text()


def test_the_word_error_rate_of_a_part_is_that_of_all_its_words():
    rows = [{"answer": "the red box", "prediction": "The red box."}, {"answer": "a b c d e", "prediction": "a x c d"}]
    assert asr.word_error_rate(rows) == 2 / 8  # b for x, and e is missing


def test_what_was_answered_is_joined_to_the_questions(tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text('{"id": "b", "dataset_name": "one", "answer": "x"}\n{"id": "a", "answer": "y"}\n')
    rows = [{"id": "a", "correct": True}, {"id": "b", "correct": False}]
    (tmp_path / "evaluation.json").write_text(json.dumps({"config": {"data": {"test": str(test)}}, "rows": rows}))
    assert answered(tmp_path) == [
        {"id": "a", "answer": "y", "correct": True},
        {"id": "b", "dataset_name": "one", "answer": "x", "correct": False},
    ]


def test_no_two_sentences_are_alike():
    said = list(itertools.islice(asr.sentences(default_rng(0)), 500))
    assert len(set(said)) == 500 and all(len(sentence.split()) == len(asr.WORDS) for sentence in said)


def test_a_table_is_written_between_the_markers_of_its_own_program():
    first, second = Markers.of("first.py"), Markers.of("second.py")
    page = f"a\n{first.begin}\n{first.end}\nb\n{second.begin}\n\nold\n\n{second.end}\nc\n"
    assert first.are_in(page) and second.are_in(page) and not Markers.of("third.py").are_in(page)
    assert second.filled(page, "new") == page.replace("old", "new")
    assert not second.are_in(page.rpartition(second.end)[0])
