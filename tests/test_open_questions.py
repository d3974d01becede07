"""Questions without choices, earlier turns, several clips, other keys: how they are read, asked and graded."""

from __future__ import annotations

import json

import pytest

from hark.data.benchmarks.answer_files import BENCHMARKS, graded, write_answers
from hark.data.benchmarks.baselines import baseline_figures
from hark.data.benchmarks.grading import grade_file
from hark.data.benchmarks.report import answer_shares, blank_row, row_of
from hark.data.chat import Turn
from hark.data.errors import DataError
from hark.data.examples import load_examples
from hark.data.order import hold_out, shuffle_choices
from hark.data.prompts import Template, render, target, texts_of
from hark.data.rewards import RewardError
from hark.data.rewards.choice import accuracy
from hark.grpo.config import ConfigError
from hark.launch import evaluate, sft, train
from tests.clips import write_questions
from tests.judged import columns_of, group_of

ROW = {"id": 1, "audio_path": "a.wav", "question_text": "How many?", "answer": "two"}


def write(tmp_path, *changes):
    path = tmp_path / "train.jsonl"
    lines = [{key: value for key, value in {**ROW, "id": n, **change}.items() if value != "absent"}
             for n, change in enumerate(changes, start=1)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def one(tmp_path, **change):
    ((example,), _) = load_examples(write(tmp_path, change))
    return example


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [("two", ("two",)), (["two", "2"], ("two", "2")), (2, ("2",)), (1.5, ("1.5",)), (None, ())],
)
@pytest.mark.parametrize("choices", ["absent", None, []])
def test_the_answer_to_an_open_question_is_a_text_or_several_or_none(tmp_path, answer, accepted, choices):
    example = one(tmp_path, answer=answer, multi_choice=choices)
    assert (example.choices, example.answer, example.accepted) == ((), None, accepted)
    assert example.has_answer == bool(accepted)
    if accepted:
        assert example.answer_text == accepted[0]
    else:
        with pytest.raises(DataError, match="train.jsonl:1: has no answer"):
            example.answer_text  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "absent"}, '"answer" is missing; each line needs'),
        (
            {"answer": []},
            r'"answer" is \[\], and there is no "multi_choice"; expected a text, a list of accepted texts',
        ),
        ({"answer": " . "}, '"answer" is .*expected a text, a list of accepted texts, or null'),
        ({"answer": ["a", None]}, '"answer" is .*expected a text'),
        ({"answer": True}, '"answer" is True'),
        (
            {"answer": 1, "choices": ["a", "b"]},
            r'"multi_choice" is missing \(is it "choices"\?\); an open question has no such key',
        ),
        ({"multi_choice": ["a", "b"]}, "\"answer\" is 'two'; expected the index of the right choice, 0 to 1"),
        ({"multi_choice": ["a", "b"], "answer": None}, '"answer" is missing; each line needs'),
        (
            {"audio_path": "absent", "audio_pats": "a.wav"},
            r'"audio_path" is missing \(is it "audio_pats"\?\); each line',
        ),
        ({"question_text": "absent", "question": "?"}, r'"question_text" is missing \(is it "question"\?\)'),
        ({"audio_paths": ["a.wav"]}, '"audio_path" and "audio_paths" are both given'),
        ({"audio_path": "absent", "audio_paths": "a.wav"}, '"audio_paths" is .*expected a list of paths'),
        ({"audio_path": "absent", "audio_paths": ["a", ""]}, '"audio_paths" is empty'),
        ({"audio_path": "absent", "audio_paths": ["a", 3]}, '"audio_paths" is 3; expected text'),
        ({"question_text": "<audio> or <audio>?"}, "2 marks <audio> for 1 clips; expected one for each clip, or none"),
        ({"multi_choice": ["<audio>", "b"], "answer": 0}, '"multi_choice" holds <audio>'),
        ({"system": 3}, '"system" is 3; expected text'),
        ({"messages": "Hi"}, "\"messages\" is 'Hi'; expected a list of"),
        (
            {"messages": [{"role": "system", "content": "x"}]},
            '"messages" holds .*a system prompt is written as "system"',
        ),
        ({"messages": [{"role": "user"}]}, '"messages" holds '),
        ({"messages": [{"role": "user", "content": "x"}]}, '"messages" ends with a turn of the user'),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_row_and_what_was_expected(tmp_path, change, message):
    with pytest.raises(DataError, match=f"train.jsonl:2: {message}"):
        load_examples(write(tmp_path, {}, change))


def test_every_other_key_is_kept_for_rewards_and_changes_no_question(tmp_path):
    example = one(tmp_path, video_id=3, tags=["x"], difficulty=0.5)
    assert dict(example.extra) == {"video_id": 3, "tags": ["x"]} and example.difficulty == "0.5"
    with pytest.raises(TypeError):
        example.extra["video_id"] = 4
    other = one(tmp_path, difficulty=0.5)
    assert example == other and {example: 1}[other] == 1


def test_a_reward_of_ones_own_reads_other_keys_where_the_answer_is_null(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def far(group):\n    return [float(text == group.example.extra['said']) for text in group.texts]\n"
    )
    example = one(tmp_path, answer=None, said="hello")
    rewards = columns_of([example], ["hello", "bye"], [f"{tmp_path}/mine.py:far", "format"], "plain")
    assert rewards.tolist() == [[1, 1], [0, 1]]


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "answer", "think"])
def test_an_open_question_is_asked_without_choices_and_in_the_same_form(tmp_path, name):
    closed, opened = one(tmp_path, multi_choice=["two", "one"], answer=0), one(tmp_path)
    choices = " Please choose the answer from the following options: ['two', 'one']."
    assert render(closed, name) == "How many?" + choices + render(opened, name).removeprefix("How many?")
    assert target(opened, name) == target(closed, name)


def test_a_template_without_a_prompt_for_open_questions_is_an_error_that_says_how_to_add_one(tmp_path):
    example = one(tmp_path)
    with pytest.raises(DataError, match=r"train.jsonl:1: the question has no choices.*Template\(..., open="):
        Template("{question} Of {choices}?").ask(example)
    assert Template("{question}!").ask(example) == "How many?!"
    assert Template("{question} Of {choices}?", open="Well, {question}").ask(example) == "Well, How many?"
    with pytest.raises(ValueError, match="template open"):
        Template("{question}", open="{choices}")


def test_a_system_prompt_and_earlier_turns_stand_before_the_question(tmp_path):
    turns = [{"role": "user", "content": "A <audio>"}, {"role": "assistant", "content": "Rain."}]
    example = one(
        tmp_path, system="Be brief.", messages=turns, audio_path="absent", audio_paths=["a.wav", "b.wav"],
        question_text="And <audio>?",
    )  # fmt: skip
    assert [clip.source.name for clip in example.clips] == ["a.wav", "b.wav"]
    assert render(example, "plain") == (
        Turn("system", "Be brief."), Turn("user", "A <audio>"), Turn("assistant", "Rain."),
        Turn("user", "And <audio>?"),
    )  # fmt: skip
    assert render(one(tmp_path), "plain") == "How many?", "a text alone where there is nothing before it"
    assert texts_of([example], "plain") == ["Be brief.\nA <audio>\nRain.\nAnd <audio>?", "two"]


def test_a_text_without_a_known_answer_has_no_target(tmp_path):
    assert texts_of([one(tmp_path, answer=None)], "plain") == ["How many?"]
    with pytest.raises(DataError, match="has no answer"):
        target(one(tmp_path, answer=None), "plain")


# Order ----------------------------------------------------------------------------------------------------------------


def test_shuffling_choices_leaves_an_open_question_as_it_is(tmp_path):
    example = one(tmp_path, answer=["two", "2"])
    assert [shuffle_choices(example, seed=0, step=step) for step in range(5)] == [example] * 5


def test_questions_that_share_a_clip_directly_or_by_others_are_held_out_together(tmp_path):
    shared = [["a", "b"], ["b", "c"], ["c"], ["d"], ["e", "f"], ["f"], ["g"], ["h"]]
    lines = [
        {"audio_path": "absent", "audio_paths": names, "start": [n] * len(names)} for n, names in enumerate(shared)
    ]
    examples, _ = load_examples(write(tmp_path, *lines))
    for seed in range(10):
        training, held_out = hold_out(examples, 2, seed)
        files = [{clip.source for example in part for clip in example.clips} for part in (training, held_out)]
        assert not files[0] & files[1] and len(held_out) >= 2


# Grading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("two", 1), ("<answer> Two. </answer>", 1), ('"2"', 1), ("<think>one</think><answer>2</answer>", 1),
        ("two cars", 0), ("", 0), ("22", 0), ("<answer>two</answer><answer>2</answer>", 0), ("three", 0),
    ],
)  # fmt: skip
def test_an_open_answer_is_right_if_it_equals_an_accepted_text_after_normalisation(tmp_path, completion, right):
    example = one(tmp_path, answer=["two", "2"])
    assert accuracy(group_of(example, completion)) == [right]
    for name, benchmark in BENCHMARKS.items():
        assert graded(example, completion, benchmark) is bool(right), name


def test_accuracy_refuses_a_question_without_an_answer(tmp_path):
    example = one(tmp_path, answer=None)
    with pytest.raises(RewardError, match='"answer" is null, and accuracy needs one; set reward.weights.accuracy to 0'):
        columns_of([example], ["x"], ["accuracy"], "plain")
    assert graded(example, "x", BENCHMARKS["strict"]) is None
    assert blank_row(example)["correct"] is None and blank_row(one(tmp_path))["correct"] is False


def test_answers_to_open_questions_are_not_none_of_the_choices(tmp_path):
    closed = one(tmp_path, multi_choice=["two", "one"], answer=0)
    rows = [
        row_of(question, prediction="x", correct=False, stopped=True, choice=choice)
        for question, choice in ((one(tmp_path), None), (closed, None), (closed, 1), (closed, 0))
    ]
    assert answer_shares(rows)["no_choice_share"] == pytest.approx(1 / 3)
    assert "no_choice_share" not in answer_shares(rows[:1])


def test_a_rule_without_audio_answers_no_open_question(tmp_path):
    closed, opened, unknown = (
        one(tmp_path, multi_choice=["two", "one"], answer=0),
        one(tmp_path),
        one(tmp_path, answer=None),
    )
    expected = {"always_first_accuracy": 0.5, "longest_choice_accuracy": 0.5, "chance": 0.25}
    assert baseline_figures([closed, opened, unknown]) == expected
    assert baseline_figures([opened, unknown]) == {}


def test_the_answer_file_of_open_questions_is_graded_as_the_evaluation_does(tmp_path):
    examples, _ = load_examples(write(tmp_path, {"answer": ["two", "2"]}, {}, {"answer": None}, {"answer": "three"}))
    pairs = list(zip(examples, ["2", "<answer>Two.</answer>", "two", "two"], strict=True))
    path = write_answers(tmp_path / "answers", pairs, BENCHMARKS["strict"])
    grade_file(str(path), benchmark="strict", out=str(tmp_path / "grades.json"))
    rows = json.loads((tmp_path / "grades.json").read_text())["rows"]
    assert [row["correct"] for row in rows] == [True, True, None, False]
    assert [row["correct"] for row in rows] == [graded(*pair, BENCHMARKS["strict"]) for pair in pairs]


# Runs -----------------------------------------------------------------------------------------------------------------


def open_questions(directory, count, name="train", **more):
    change = {"multi_choice": [], "answer": ["rain", "wind"], **more}
    return write_questions(directory, count, name=name, **{f"line{n + 1}": change for n in range(count)})


def settings_of(tmp_path, model, data, *more):
    (tmp_path / "c.yaml").write_text("{}")
    return [
        str(tmp_path / "c.yaml"), f"run.directory={tmp_path}/run", f"model.path={model}", f"data.train={data}",
        "rollout.group_size=2", "rollout.max_new_tokens=9", "optim.prompts_per_step=2", "optim.steps=2", *more,
    ]  # fmt: skip


def test_open_questions_with_two_clips_and_turns_are_trained_validated_and_answered(tmp_path, qwen2_audio_dir):
    clips = {"audio_path": None, "audio_paths": ["train-0.wav", "train-1.wav"], "end": [0.2, None]}
    data = open_questions(tmp_path, 4, **clips, system="Be brief.")
    settings = settings_of(
        tmp_path, qwen2_audio_dir, data, "data.template=plain", f"data.validation={data}", "evaluation.every=2",
        f"data.test={data}", "rollout.max_new_tokens=12", "loss.beta=0",
    )  # fmt: skip
    train.main(settings)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["questions"] for line in lines if line.get("event") == "evaluation"] == [4]
    evaluate.main([f"{tmp_path}/run"])
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["total"] == 4 and all(row["open"] and row["choice"] is None for row in result["rows"])
    assert "chance" not in result and "no_choice_share" not in result


def test_a_run_that_needs_answers_refuses_questions_without_one_before_it_starts(tmp_path, qwen2_audio_dir):
    data = open_questions(tmp_path, 4, answer=None)
    settings = settings_of(tmp_path, qwen2_audio_dir, data)
    with pytest.raises(
        ConfigError, match=r"4 of 4 questions have no answer, first .*train.jsonl:1, and the reward acc"
    ):
        train.main(settings)
    with pytest.raises(ConfigError, match=r"4 of 4 questions have no answer.* and fine-tuning needs one"):
        sft.main(settings)
    train.main([*settings, "reward.weights={format: 1.0}", "loss.beta=0"])


def test_fine_tuning_teaches_the_first_accepted_answer(tmp_path, qwen2_audio_dir, capsys):
    data = open_questions(tmp_path, 2)
    more = ["data.template=plain", "optim.steps=24", "optim.lr=3e-3", f"data.test={data}"]
    sft.main(settings_of(tmp_path, qwen2_audio_dir, data, *more))
    evaluate.main([f"{tmp_path}/run"])
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    assert [row["prediction"] for row in rows] == ["rain", "rain"] and all(row["correct"] for row in rows)


def test_a_template_that_cannot_ask_open_questions_is_refused_before_a_run(tmp_path, qwen2_audio_dir):
    (tmp_path / "mine.py").write_text(
        "from hark.data.prompts import Template\nshort = Template('{question} Of {choices}?')\n"
    )
    settings = settings_of(
        tmp_path, qwen2_audio_dir, open_questions(tmp_path, 2), f"data.template={tmp_path}/mine.py:short",
        "data.skip_bad=true",
    )  # fmt: skip
    with pytest.raises(DataError, match="train.jsonl:1: the question has no choices"):
        train.main(settings)
