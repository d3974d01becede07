"""Clips that break, vanish or change after the check at the start of a run, and prompts too long for the model."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import soundfile
import torch

from hark import UserError
from hark.data.audio import load_waveform
from hark.data.clip import Clip
from hark.data.clip_memory import ClipMemory
from hark.data.clips import Rules, clips_in, inspect, inspect_all, usable
from hark.data.errors import DataError
from hark.data.examples import BadExample, Example
from hark.data.loader import Loader, evaluation_batches
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.manifest import Manifest
from hark.grpo.runtime.shards import MOMENTS
from hark.grpo.shared_data import SharedData
from hark.launch import sft
from hark.launch.common import training
from hark.launch.common.answering import with_shuffled_audio
from hark.launch.common.config_file import load_config
from hark.launch.common.questions import prepare_of, validation_rows
from hark.launch.common.run_directory import left_out_by
from tests.clips import waveform, write_questions
from tests.ranks import on_ranks
from tests.runs import build

COUNT = 10
RULES = Rules(16_000, 2.0)


@pytest.fixture
def examples(tmp_path):
    """Questions whose clips were checked."""
    for n in range(COUNT):
        soundfile.write(tmp_path / f"{n}.wav", waveform(0.3, n), 16_000)
    data = [
        Example(f"id{n}", (Clip(tmp_path / f"{n}.wav"),), "Which?", ("a", "b"), 0, line=f"train.jsonl:{n + 1}")
        for n in range(COUNT)
    ]
    found = dict(inspect_all(clips_in(data), RULES, workers=2, memory=ClipMemory("rules", tmp_path / "clips.sqlite")))
    return usable(data, found, long_clips="error", skip_bad=False)[0]


def loader(examples, *, rank=0, world=1, skip_bad=True):
    return Loader(
        examples, lambda text, sound: (text, len(sound)), seed=0, prompts_per_step=COUNT, rank=rank, world=world,
        template="plain", shuffle_choices=False, skip_bad=skip_bad, workers=2,
        waveform=lambda clip: load_waveform(clip, sample_rate=16_000, max_seconds=2.0),
    )  # fmt: skip


def vanish(path):
    path.unlink()


def break_(path):
    path.write_bytes(b"RIFF" + bytes(500))


def change(path):
    soundfile.write(path, waveform(0.3, 99), 16_000)


FAULTS = [(vanish, "no such file"), (break_, "has changed"), (change, "has changed since it was checked")]


@pytest.mark.parametrize(("harm", "message"), FAULTS)
def test_a_clip_that_vanishes_breaks_or_changes_during_a_run_stops_it_with_its_line(examples, harm, message):
    with loader(examples, skip_bad=False) as one:
        one.step(0)
        one._cancel()
        harm(examples[3].clips[0].source)
        with pytest.raises(DataError, match=rf"^train.jsonl:4: .*{message}"):
            for step in (5, 6):
                one.step(step)


@pytest.mark.parametrize(("harm", "message"), FAULTS)
def test_with_skip_bad_the_next_good_one_replaces_it_on_any_number_of_ranks(examples, harm, message):
    def ids(step, world):
        drawn = []
        for rank in range(world):
            with loader(examples, rank=rank, world=world) as one:
                drawn += [(example.id, key) for example, _, key in one.step(step)]
        return sorted(drawn)

    harm(examples[3].clips[0].source)
    with loader(examples) as whole:
        in_turn = [sorted((example.id, key) for example, _, key in whole.step(step)) for step in range(4)]
        assert [bad.line for bad in whole.bad] == ["train.jsonl:4"] and message in whole.bad[0].reason
    assert ids(3, 1) == ids(3, 2) == in_turn[3]
    assert [name for name, _ in in_turn[3]].count("id4") == 2 and "id3" not in dict(in_turn[3])


@pytest.mark.parametrize(("harm", "message"), FAULTS)
def test_a_question_of_an_evaluation_whose_clip_breaks_or_changes_is_an_error_or_left_out(examples, harm, message):
    harm(examples[3].clips[0].source)
    bad: list[BadExample] = []
    rest = dict(
        template="plain", batch=4, workers=2, on_bad=bad.append,
        waveform=lambda clip: load_waveform(clip, sample_rate=16_000, max_seconds=2.0),
    )  # fmt: skip
    with pytest.raises(DataError, match=rf"^train.jsonl:4: .*{message}"):
        list(evaluation_batches(examples, lambda text, sound: text, **rest))
    asked = list(evaluation_batches(examples, lambda text, sound: text, skip_bad=True, **rest))
    assert [len(batch) for batch in asked] == [3, 4, 2] and [one.line for one in bad] == ["train.jsonl:4"]


def test_clips_that_other_questions_get_as_a_control_are_compared_with_what_they_were_themselves(examples):
    other = with_shuffled_audio(examples, seed=0)
    assert [one.clips for one in other] != [one.clips for one in examples]
    known = {one.clips: one.digests for one in examples}
    assert all(one.digests == known[one.clips] for one in other) and len(set(known.values())) == COUNT


def test_lost_questions_of_a_validation_are_listed_and_said_and_too_many_stop_the_run(
    examples, tmp_path, monkeypatch, capsys
):
    def evaluate(policy, batches, to_row, world, **settings):
        return [example.id for batch in batches for example, _ in batch]

    monkeypatch.setattr("hark.launch.common.questions.evaluate", evaluate)
    policy = SimpleNamespace(
        positions=None, sample_rate=16_000, prepare=lambda chat, sound: SimpleNamespace(ids=torch.zeros(1))
    )
    (tmp_path / "config.yaml").write_text("{}")
    words = ["model.path=none", f"run.directory={tmp_path}/run", "data.skip_bad=true", "data.template=plain"]

    def validated(*more):
        return validation_rows(load_config([f"{tmp_path}/config.yaml", *words, *more]), ALONE, policy, examples)

    for n in (1, 4, 7):
        change(examples[n].clips[0].source)
    assert validated("data.max_lost=0.3") == [f"id{n}" for n in (0, 2, 3, 5, 6, 8, 9)]
    listed = [json.loads(line)["id"] for line in (tmp_path / "run" / "bad.jsonl").read_text().splitlines()]
    assert listed == ["id1", "id4", "id7"]
    assert "validation: 3 of 10 questions became bad during the run, listed in" in capsys.readouterr().out
    with pytest.raises(UserError, match="3 of 10 examples .* data.max_lost allows, the last train.jsonl:8: .*changed"):
        validated("data.max_lost=0.2")


@pytest.mark.parametrize("harm", [vanish, break_])
def test_a_run_that_starts_again_after_a_clip_was_lost_draws_the_same_and_counts_it(examples, harm, tmp_path):
    """A clip that the run left out when it began is left out again, although it can be used now."""
    examples = [replace(example, digests=()) for example in examples]

    def started(left_out):
        """The examples of a start, its loader's draws of four steps, and the lines that these skipped."""
        found = {clip: inspect(clip, RULES) for clip in clips_in(examples)}
        good, bad = usable(examples, found, long_clips="error", skip_bad=True, left_out=left_out)
        with loader(good) as one:
            draws = [[(example.id, key) for example, _, key in one.step(step)] for step in range(4)]
            return good, [example.id for example in bad], draws, [skipped.line for skipped in one.bad]

    source = examples[7].clips[0].source
    source.rename(tmp_path / "away.wav")
    good, left_out, _, _ = started(None)
    (tmp_path / "away.wav").rename(source)
    harm(examples[3].clips[0].source)
    with loader(good) as one:
        lost = [[(example.id, key) for example, _, key in one.step(step)] for step in range(4)]
    again, out, draws, skipped = started(left_out)
    assert left_out == out == ["id7"] and [example.id for example in again] == [example.id for example in good]
    assert draws == lost and skipped == ["train.jsonl:4"]
    batches = evaluation_batches(
        again, lambda text, sound: text, template="plain", batch=20, workers=1, skip_bad=True,
        waveform=lambda clip: load_waveform(clip, sample_rate=16_000, max_seconds=2.0),
    )  # fmt: skip
    assert [example.id for batch in batches for example, _ in batch] == [one.id for one in good if one.id != "id3"]


ALONE = World(0, 1, torch.device("cpu"))


def test_more_lost_examples_than_the_limit_stop_the_run(examples):
    for n in (1, 4, 7):
        vanish(examples[n].clips[0].source)
    with loader(examples) as one:
        data = SharedData(one, ALONE, max_lost=0.3)
        data.step(0)
        assert sorted(data.lost) == ["id1", "id4", "id7"]
    with loader(examples) as one, pytest.raises(UserError, match="3 of 10 examples .* data.max_lost"):
        SharedData(one, ALONE, max_lost=0.2).step(0)


def test_one_lost_example_is_always_allowed(examples):
    vanish(examples[1].clips[0].source)
    with loader(examples) as one:
        data = SharedData(one, ALONE, max_lost=0.0)
        data.step(0)
        assert data.lost == ["id1"]


def lose_on_two_ranks(world: World, examples, skip_bad: bool, message: str) -> None:
    """One example vanishes that only rank 0 draws, and one that only rank 1 draws."""
    with loader(examples, rank=world.rank, world=world.size, skip_bad=skip_bad) as one:
        with pytest.raises(UserError, match=message):
            SharedData(one, world, max_lost=0.1).step(0)


def drawn_by(examples, rank):
    with loader(examples, rank=rank, world=2) as one:
        return [example for example, _, _ in one.step(0)]


def test_ranks_count_lost_examples_together_and_stop_together(examples):
    for rank in (0, 1):
        vanish(drawn_by(examples, rank)[0].clips[0].source)
    on_ranks(2, lose_on_two_ranks, [replace(one, extra={}) for one in examples], True, "^2 of 10 examples became bad")


def test_an_error_of_the_data_on_one_rank_is_that_of_all(examples):
    lost = drawn_by(examples, 1)[0]
    vanish(lost.clips[0].source)
    on_ranks(2, lose_on_two_ranks, [replace(one, extra={}) for one in examples], False, f"{lost.line}: .*no such file")


def count_after_a_resume(world: World, settings) -> None:
    config = load_config(settings)
    learner, again = build(world, config), build(world, config)
    learner.data.lost = ["train-3"]
    again.restore(json.loads(json.dumps(learner.state())))
    again.data._data.bad.append(BadExample("train.jsonl:5", "train-4", "gone"))
    with pytest.raises(UserError, match="2 of 12 examples became bad"):
        again.data.step(0)


def test_a_resumed_run_goes_on_counting(settings, tmp_path):
    on_ranks(1, count_after_a_resume, [*settings, f"run.directory={tmp_path}/run", "loss.beta=0"])


def test_a_resumed_run_has_the_examples_of_its_beginning(settings, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training.loop, "train", lambda trainer, about, changes: seen.append((trainer, about)))
    words = [*settings, f"run.directory={tmp_path}/run", "data.skip_bad=true", "checkpoint.export=false"]
    words.append(f"data.train={write_questions(tmp_path, 12)}")
    clips = [tmp_path / f"train-{n}.wav" for n in (1, 3)]
    clips[0].rename(tmp_path / "away")
    sft.main(words)
    place = tmp_path / "run" / "checkpoints" / "step-000001"
    place.mkdir(parents=True)
    Manifest(1, {}, {}, {MOMENTS: {}}, about=seen[0][1]).write(place)
    (tmp_path / "away").rename(clips[0])
    clips[1].unlink()
    sft.main([*words, "run.resume=true"])
    begun, resumed = ([(one.id, bool(one.fault)) for one in trainer.data.examples] for trainer, _ in seen)
    assert seen[0][1]["left_out"] == seen[1][1]["left_out"] == left_out_by(tmp_path / "run") == ["train-1"]
    assert seen[0][1]["clips"] == seen[1][1]["clips"] != "", "not compared where a clip is lost"
    assert [name for name, _ in begun] == [name for name, _ in resumed]
    assert [name for name, lost in resumed if lost] == ["train-3"] and not any(lost for _, lost in begun)


def test_a_prompt_that_leaves_no_positions_for_the_answer_is_an_error_and_one_that_fits_is_not():
    config = SimpleNamespace(rollout=SimpleNamespace(max_new_tokens=20))

    def prepare(length, positions):
        policy = SimpleNamespace(positions=positions, prepare=lambda chat: SimpleNamespace(ids=torch.zeros(length)))
        return prepare_of(policy, config.rollout.max_new_tokens)("text")

    assert len(prepare(80, 100).ids) == 80 and len(prepare(81, None).ids) == 81
    with pytest.raises(DataError, match="its prompt has 81 tokens .* the model has 100 positions"):
        prepare(81, 100)
