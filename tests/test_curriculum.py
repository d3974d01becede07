"""The order of the examples: as in the file, from easy to hard, in stages; bands; what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from hark.data.described import described
from hark.data.difficulty import easy_to_hard, in_band, values_of
from hark.data.errors import DataError
from hark.data.examples import Example, load_examples
from hark.data.order import Curriculum, order_of, staged
from hark.data.prompts import right_answer, target
from hark.grpo.config import ConfigError
from hark.grpo.instruments.record import read_step
from hark.launch import sft, train
from hark.launch.common.config_file import load_config
from hark.launch.common.questions import curriculum_of
from tests.clips import write_questions
from tests.runs import read_metrics

HARD = ("3", "1", "2", "1", "3", "2")  # the difficulty of six questions
RATES = (0.25, 1.0, 0.5, 0.75, 0.0, 0.5)


def questions(difficulties=HARD, rates=RATES, parts=(0,) * 6):
    rows = enumerate(zip(difficulties, rates, parts, strict=True))
    return [
        Example(f"q{n}", (), "Which?", ("a", "b"), 0, line=f"q.jsonl:{n + 1}", difficulty=d, pass_rate=r, part=p)
        for n, (d, r, p) in rows
    ]


def drawn(count, weights=(), parts=(0,) * 6, seed=0, **curriculum):
    order = order_of(questions(parts=parts), seed=seed, weights=weights, curriculum=Curriculum(**curriculum))
    return [order(position) for position in range(count)]


def test_the_order_of_the_file_begins_again_at_its_end():
    assert drawn(8, order="file") == [0, 1, 2, 3, 4, 5, 0, 1]


def test_sorted_goes_from_easy_to_hard_and_keeps_equal_ones_in_file_order():
    assert drawn(8, order="sorted") == [1, 3, 2, 5, 0, 4, 1, 3]
    assert drawn(6, order="sorted", by="pass_rate") == [1, 3, 2, 5, 0, 4]


def test_a_stage_draws_its_own_part_of_the_examples_in_shuffled_epochs():
    parts = [{1, 3}, {2, 5}, {0, 4}]
    order = dict(order="staged", stages=3, total=12)
    found = drawn(16, **order)
    epochs = [found[first : first + 2] for first in range(0, 16, 2)]
    assert [set(epoch) for epoch in epochs] == [parts[stage] for stage in (0, 0, 1, 1, 2, 2, 2, 2)], "12 to 16 go on"
    assert len({tuple(drawn(12, seed=seed, **order)) for seed in range(8)}) > 1, "shuffled by the seed"
    assert drawn(12, **order) == found[:12]


def test_stages_of_unequal_length_begin_where_the_shares_of_the_run_do():
    # 7 prompts in 3 stages: floor(3 p / 7) is 0 0 0 1 1 2 2, and 5 examples are divided as 1, 2, 2.
    for seed in range(8):
        order = staged([10, 11, 12, 13, 14], seed, stages=3, total=7)
        found = [order(position) for position in range(7)]
        assert found[:3] == [10] * 3 and sorted(found[3:5]) == [11, 12] and sorted(found[5:]) == [13, 14]
    with pytest.raises(DataError, match="5 examples are fewer than data.stages=6"):
        staged([10, 11, 12, 13, 14], 0, stages=6, total=7)


def test_each_file_of_a_mixture_is_in_the_order_of_its_own():
    parts, weights = (0, 0, 0, 1, 1, 1), (0.5, 0.5)
    found = drawn(40, weights=weights, parts=parts, order="sorted")
    assert [n for n in found if n < 3][:5] == [1, 2, 0, 1, 2] and [n for n in found if n > 2][:5] == [3, 5, 4, 3, 5]
    with pytest.raises(ValueError, match="stages of a mixture are not defined"):
        drawn(1, weights=weights, parts=parts, order="staged")


def test_words_and_numbers_are_difficulties_but_not_in_one_file():
    assert values_of(questions(("easy", "Hard", "medium", "easy", "hard", "easy")), "difficulty") == [1, 3, 2, 1, 3, 1]
    assert values_of(questions(("0.5", "2", "-1", "1e2", "0", "0")), "difficulty") == [0.5, 2, -1, 100, 0, 0]
    with pytest.raises(DataError, match="'easy' at q.jsonl:2 and '3' at q.jsonl:1"):
        values_of(questions(("3", "easy", "3", "3", "3", "3")), "difficulty")


@pytest.mark.parametrize(
    ("change", "by", "message"),
    [
        ({"difficulty": ""}, "difficulty", 'q.jsonl:3: has no "difficulty"; expected a number, or one of easy, med'),
        ({"difficulty": "so-so"}, "difficulty", "q.jsonl:3: \"difficulty\" is 'so-so'"),
        ({"difficulty": "nan"}, "difficulty", "q.jsonl:3: \"difficulty\" is 'nan'"),
        ({"pass_rate": None}, "pass_rate", 'q.jsonl:3: has no "pass_rate"; `hark pass-rate` measures it'),
    ],
)
def test_a_row_without_the_key_is_named_by_its_line(change, by, message):
    rows = questions()
    rows[2] = dataclasses.replace(rows[2], **change)
    with pytest.raises(DataError, match=message):
        easy_to_hard(rows, range(6), by)


def test_a_band_keeps_both_of_its_ends():
    assert [one.id for one in in_band(questions(), [0.25, 0.5], "pass_rate")] == ["q0", "q2", "q5"]
    with pytest.raises(DataError, match=r"no difficulty of 6 examples is in data.band=\[4, 5\]; they are 1 to 3"):
        in_band(questions(), [4, 5], "difficulty")


# Files and runs -------------------------------------------------------------------------------------------------------


def measured(tmp_path, **changes):
    rates = {f"line{n + 1}": {"pass_rate": n / 8, "target": f"I hear {n}."} for n in range(8)}
    return write_questions(tmp_path, 8, **rates | changes)


def settings_of(tmp_path, model, *more):
    path = tmp_path / "c.yaml"
    path.write_text(f"run: {{directory: {tmp_path}/run, threads: 1}}\nmodel: {{path: {model}}}\n")
    sizes = ["optim.prompts_per_step=2", "rollout.group_size=2", "rollout.max_new_tokens=8", "log.completions=0"]
    return [str(path), *sizes, "checkpoint.export=false", *more]


def test_the_keys_are_read_and_written_again(tmp_path):
    examples, _ = load_examples(measured(tmp_path))
    assert [example.pass_rate for example in examples] == [n / 8 for n in range(8)]
    assert [target(example, "answer") for example in examples][:2] == ["I hear 0.", "I hear 1."]
    assert right_answer(examples[0], "answer") == "<answer>rain</answer>"
    assert described(examples[0])["row"]["pass_rate"] == 0 and described(examples[1])["row"]["target"] == "I hear 1."
    for value in (1.5, "half", True):
        with pytest.raises(DataError, match='train.jsonl:1: "pass_rate" is .*; expected a number from 0 to 1'):
            load_examples(measured(tmp_path, line1={"pass_rate": value}))


def test_fine_tuning_needs_no_answer_beside_a_target(tmp_path, qwen2_audio_dir):
    one = {"line3": {"answer": None, "multi_choice": None, "target": "Rain."}}
    data = write_questions(tmp_path, 4, **one)
    sft.main(settings_of(tmp_path, qwen2_audio_dir, f"data.train={data}", "optim.steps=2"))
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_run_draws_from_its_band_in_stages_and_goes_on_only_with_as_many_steps(tmp_path, qwen2_audio_dir):
    more = ["data.order=staged", "data.order_by=pass_rate", "data.band=[0.25, 0.75]", "data.stages=2", "loss.beta=0"]
    words = settings_of(tmp_path, qwen2_audio_dir, f"data.train={measured(tmp_path)}", *more, "optim.steps=2")
    train.main([*words, "record.every=1", "checkpoint.every=2"])
    rows = [read_step(tmp_path / "run", step).values["prompts"] for step in (1, 2)]
    rates = [{prompt["row"]["pass_rate"] for prompt in step} for step in rows]
    assert rates[0] == {0.625, 0.75} and len(rates[1]) == 2 and rates[1] < {0.25, 0.375, 0.5}
    with pytest.raises(ConfigError, match="optim.steps is 3, but the run in .* was started with 2"):
        train.main([*words, "optim.steps=3", "run.resume=true"])


def test_a_row_without_the_key_stops_a_run_before_the_weights_are_read(tmp_path, qwen2_audio_dir, monkeypatch):
    monkeypatch.setattr("hark.launch.common.training.make_policy", None)
    data = measured(tmp_path, line4={"pass_rate": None})
    words = settings_of(tmp_path, qwen2_audio_dir, f"data.train={data}", "data.order_by=pass_rate")
    for more in ("data.order=sorted", "data.order=staged", "data.band=[0, 1]"):
        with pytest.raises(DataError, match='train.jsonl:4: has no "pass_rate"'):
            train.main([*words, more])


@pytest.mark.parametrize("band", ["[0.5]", "[0.7, 0.2]", "[]"])
def test_a_band_has_two_ends_in_order(tmp_path, band):
    with pytest.raises(ConfigError, match=r"data.band is .*; expected \[LOW, HIGH\]"):
        load_config(settings_of(tmp_path, "m", f"data.band={band}"))


def test_stages_of_a_mixture_are_refused_at_the_start(tmp_path):
    config = load_config(settings_of(tmp_path, "m", "data.train=[a.jsonl:1, b.jsonl:2]", "data.order=staged"))
    with pytest.raises(ConfigError, match="data.order=staged divides one set of examples, and data.train has weights"):
        curriculum_of(config)
