"""Answering a test: every question of the benchmark has one row, in order, and controls change what they say."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hark.data.benchmarks.answer_files import BENCHMARKS, graded
from hark.data.benchmarks.rules import mmau
from hark.data.clip import Clip
from hark.data.examples import Example, load_examples, load_questions
from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import World, exchange_rows
from hark.launch import grade
from hark.launch.common.answering import answer_benchmark, answers, below_chance, subject_of, with_shuffled_audio
from hark.launch.common.config_file import load_config
from hark.launch.common.policies import make_policy
from hark.launch.common.questions import checked_questions, rank_batches, waveform_of
from tests.clips import write_questions
from tests.ranks import on_ranks


def ask(words: list[str], *, silent: bool = False, audio: bool = False, choices: bool = False) -> None:
    answer_benchmark(subject_of(words, step=None, best=False), silent=silent, audio=audio, choices=choices)


@pytest.fixture
def config(tmp_path, qwen2_audio_dir) -> Path:
    """A configuration of an evaluation whose file has five good questions and three that cannot be asked."""
    soundfile.write(tmp_path / "long.wav", np.full(32_000, 0.1), 16_000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16_000)
    bad = {"line2": {"audio_path": "silent.wav"}, "line4": {"audio_path": "long.wav"}, "line5": {"id": "test-0"}}
    test = write_questions(tmp_path, 8, name="test", **bad)
    path = tmp_path / "small.yaml"
    path.write_text(
        f"run: {{directory: {tmp_path}/run, threads: 1}}\n"
        f"model: {{path: {qwen2_audio_dir}}}\n"
        f"data: {{test: {test}, max_seconds: 1, skip_bad: true}}\n"
        "rollout: {max_new_tokens: 4}\n"
        "evaluation: {batch: 2, benchmark: mmau}\n"
    )
    return path


def result(tmp_path) -> dict:
    return json.loads((tmp_path / "run" / "evaluation.json").read_text())


IDS = ["test-0", "test-1", "test-2", "test-3", "test-0", "test-5", "test-6", "test-7"]
ASKED = [True, False, True, False, False, True, True, True]  # a silent clip, one too long, and an id used twice


def test_a_question_that_cannot_be_asked_is_wrong_and_stays_in_its_place(config, tmp_path, capsys):
    ask([str(config)])
    found = result(tmp_path)
    assert [row["id"] for row in found["rows"]] == IDS and found["total"] == 8
    assert [row["stopped"] is not None for row in found["rows"]] == ASKED
    assert all(row["correct"] is False and row["prediction"] == "" for row in found["rows"] if row["stopped"] is None)
    # The twice used id stands in a line that is no question; the rows of the answer file are questions.
    handed_in = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert [row["id"] for row in handed_in] == IDS[:4] + IDS[5:] and handed_in[1]["model_prediction"] == ""
    judged = [mmau(row["model_prediction"], row["choices"], row["answer"]) for row in handed_in]
    assert judged == [row["correct"] for n, row in enumerate(found["rows"]) if n != 4], "the file is what was judged"
    listed = (tmp_path / "run" / "bad.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["file"]).name for line in sorted(listed)] == [
        "test.jsonl:2",
        "test.jsonl:4",
        "test.jsonl:5",
    ]
    said = capsys.readouterr().out
    assert "3 could not be asked" in said and "by the rule of mmau" in said and "by the strict rule" in said


def test_a_test_in_one_json_array_is_answered_in_its_order(config, tmp_path):
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    (tmp_path / "test.json").write_text(f"[{', '.join(lines)}]")
    ask([str(config), f"data.test={tmp_path}/test.json"])
    assert [row["id"] for row in result(tmp_path)["rows"]] == IDS


def test_a_limit_counts_questions_of_the_file_and_not_those_that_can_be_asked(config, tmp_path):
    ask([str(config), "evaluation.limit=3"])
    assert [row["id"] for row in result(tmp_path)["rows"]] == IDS[:3]


def test_a_hidden_answer_is_handed_in_and_left_out_of_the_figures(config, tmp_path, capsys, monkeypatch):
    def hidden(*args, **kwargs):
        questions = load_questions(*args, **kwargs)
        return [replace(one, answer=None) if isinstance(one, Example) else one for one in questions]

    monkeypatch.setattr("hark.launch.common.questions.load_questions", hidden)
    ask([str(config)], silent=True, audio=True, choices=True)
    assert [row["correct"] for row in result(tmp_path)["rows"]] == [None] * 4 + [False] + [None] * 3
    handed_in = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert [row["answer"] for row in handed_in] == [""] * 7
    assert "7 of 8 questions have no known answer" in capsys.readouterr().out


def everyone(world: World, config_path: str, out: str) -> None:
    config = load_config([config_path])
    policy = make_policy(config, world)
    questions, usable = checked_questions(config, world, policy)
    load = waveform_of(config, policy)
    batches = rank_batches(config, world, policy, usable, waveform=load, on_bad=lambda bad: None)
    asked = exchange_rows([example.id for batch in batches for example, _ in batch], world)
    assert len(asked) == len(set(asked)) == 5, "no question is asked twice"
    rows = answers(config, world, policy, questions, usable, load, "questions")
    if world.is_main:
        Path(out).write_text(json.dumps(rows))


def test_two_ranks_answer_every_question_once_in_the_order_of_the_file_as_one_does(config, tmp_path):
    found = []
    for size in (1, 2):
        on_ranks(size, everyone, str(config), str(tmp_path / "rows.json"))
        found.append(json.loads((tmp_path / "rows.json").read_text()))
    assert found[0] == found[1]
    assert [row["id"] for row in found[1]] == IDS and sum(row["stopped"] is not None for row in found[1]) == 5


def test_controls_change_what_they_say_and_ask_only_what_could_be_asked(config, tmp_path, monkeypatch):
    asked: list[list[tuple[Example, np.ndarray]]] = []

    def remember(config, world, policy, examples, *, waveform, on_bad):
        asked.append([])

        owners = {example.clips: example for example in examples}

        def heard(clip):
            sound = waveform(clip)
            asked[-1].append((owners[clip,], sound))
            return sound

        return rank_batches(config, world, policy, examples, waveform=heard, on_bad=on_bad)

    monkeypatch.setattr("hark.launch.common.answering.rank_batches", remember)
    ask([str(config)], silent=True, audio=True, choices=True)
    main, silent, audio, choices = asked
    ids = [identity for identity, could in zip(IDS, ASKED, strict=True) if could]
    assert all([example.id for example, _ in control] == ids for control in asked)
    for (a, x), (b, y), (c, z), (d, w) in zip(main, silent, audio, choices, strict=True):
        assert a == b and len(x) == len(y) and x.any() and not y.any()
        assert c == replace(a, clips=c.clips) and c.clips != a.clips and z.any()
        assert d.answer_text == a.answer_text and d.clips == a.clips and np.array_equal(w, x)
    assert any(a.choices != d.choices for (a, _), (d, _) in zip(main, choices, strict=True))


def questions(*clips: str) -> list[Example]:
    return [Example(f"q{n}", (Clip(Path(clip)),), "?", ("a", "b"), 0) for n, clip in enumerate(clips)]


@pytest.mark.parametrize("clips", ["ab", "abcdefgh", "aabb", "aaabbcd", "aaabbb", "abacadbe", "aabbccdd" * 5])
def test_no_question_keeps_its_clip_and_every_clip_is_heard_as_often_as_before(clips):
    for seed in range(30):
        before = questions(*clips)
        after = with_shuffled_audio(before, seed=seed)
        assert all(a.clips != b.clips for a, b in zip(before, after, strict=True))
        assert Counter(a.clips for a in before) == Counter(b.clips for b in after)
        assert before == [replace(b, clips=a.clips) for a, b in zip(before, after, strict=True)]


def test_as_few_questions_as_can_be_keep_a_clip_that_most_of_them_share():
    for seed in range(30):
        before = questions(*"aaaaabc")
        kept = [a for a, b in zip(before, with_shuffled_audio(before, seed=seed), strict=True) if a == b]
        assert len(kept) == 3, "of five a only two can go to b and c"


def test_whose_clip_a_question_gets_follows_from_the_seed_and_the_ids_alone():
    before = questions(*"abcdefghij")
    clips = {example.id: example.clips for example in with_shuffled_audio(before, seed=1)}
    assert clips == {example.id: example.clips for example in with_shuffled_audio(before[::-1], seed=1)}
    assert clips != {example.id: example.clips for example in with_shuffled_audio(before, seed=2)}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_answer_file_graded_by_its_own_rule_gives_the_same_figures(name, config, tmp_path):
    ask([str(config), f"evaluation.benchmark={name}", "evaluation.limit=4"])
    (path,) = (tmp_path / "run").glob("answers.json*")
    grade.main([str(path), "--benchmark", name, "--json", str(tmp_path / "grades.json")])
    graded = json.loads((tmp_path / "grades.json").read_text())
    assert [(row["id"], row["correct"]) for row in graded["rows"]] == [
        (row["id"], row["correct"]) for row in result(tmp_path)["rows"]
    ]
    official = {key: value for key, value in result(tmp_path).items() if key.startswith("official_")}
    assert official == {key: value for key, value in graded.items() if key.startswith("official_")}


def test_a_benchmark_with_hidden_answers_and_equal_choices_is_answered_as_it_is(config, tmp_path, capsys):
    path = write_questions(
        tmp_path / "hidden", 3, name="test", line1={"answer": None}, line2={"multi_choice": ["rain"] * 2}
    )
    ask([str(config), f"data.test={path}"])
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [row["correct"] is None for row in result["rows"]] == [True, False, False]
    assert result["total"] == 2
    assert "1 of 3 questions have no known answer" in capsys.readouterr().out


def test_an_answer_that_is_no_choice_is_judged_by_its_words_where_the_rule_does(config, tmp_path):
    path = write_questions(tmp_path / "odd", 2, name="test", line1={"answer": "a bell ringing"})
    example = load_examples(path, benchmark=True)[0][0]
    assert (example.answer, example.accepted) == (None, ("a bell ringing",))
    completion = "<answer>Ringing: a bell</answer>"
    right = {name: graded(example, completion, benchmark) for name, benchmark in BENCHMARKS.items()}
    assert right == {"strict": False, "mmau": True, "mmar": True, "mmsu": False}
    ask([str(config), f"data.test={path}", "evaluation.benchmark=mmau"])
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["total"] == 2
    assert json.loads((tmp_path / "run" / "answers.json").read_text())[0]["answer"] == "a bell ringing"


def test_an_evaluation_of_another_model_or_test_is_not_written_over(config, tmp_path):
    path = write_questions(tmp_path / "other", 2, name="test")
    ask([str(config)])
    before = (tmp_path / "run" / "evaluation.json").read_text()
    with pytest.raises(ConfigError, match=r"evaluation.json is the evaluation of data.test=.*; choose another run.dir"):
        ask([str(config), f"data.test={path}"])
    assert (tmp_path / "run" / "evaluation.json").read_text() == before
    ask([str(config)])


def test_the_answers_to_the_controls_stand_beside_those_to_the_test(config, tmp_path):
    ask([str(config)], silent=True, choices=True)
    found = result(tmp_path)
    assert found["model"] == found["config"]["model"]["path"] and found["step"] is None
    for control in ("silent", "shuffled_choices"):
        rows = [row[control] for row in found["rows"]]
        assert all(row.keys() == {"prediction", "correct", "stopped", "choice"} for row in rows)
        assert sum(row["correct"] for row in rows) == found[f"{control}_right"]
        assert [row["stopped"] is not None for row in rows] == ASKED
        given = [row["choice"] for row in rows if row["stopped"] is not None]
        assert found[f"{control}_no_choice_share"] == given.count(None) / len(given)


def test_a_control_below_chance_says_how_many_of_its_answers_are_no_choice():
    result = {"silent_accuracy": 0.1, "silent_no_choice_share": 0.4, "chance": 0.25}
    (line,) = below_chance(result, {"silent": []})
    assert line.startswith("sound removed: 40.0 % of these answers are none of the choices")
    assert not list(below_chance(result | {"silent_accuracy": 0.3}, {"silent": []}))
    assert not list(below_chance(result | {"silent_no_choice_share": 0.0}, {"silent": []}))


def test_a_long_evaluation_says_how_far_it_is_and_which_control_it_answers(config, monkeypatch, capsys):
    monkeypatch.setattr("hark.launch.common.progress.PATIENCE", 0.0)
    ask([str(config)], silent=True)
    said = capsys.readouterr().out
    assert "all 5 questions answered, in" in said and "all 5 questions without sound answered, in" in said
