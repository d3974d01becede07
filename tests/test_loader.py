"""data/loader.py: what a step holds is a pure function of examples, files, seed and step."""

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hark.data.clip import Clip
from hark.data.errors import AudioError, DataError, SkippedClipError
from hark.data.examples import BadExample, Example
from hark.data.loader import BadLog, Loader, evaluation_batches
from hark.data.order import Curriculum, shuffled

COUNT = 11


def examples(count=COUNT):
    return [
        Example(
            f"id{i}",
            (Clip(Path(f"{i}.wav")),),
            f"Question {i}?",
            ("a", "b", "c", "d"),
            i % 4,
            line=f"train.jsonl:{i + 1}",
            seconds=1.0 + 7 * i % 11,
        )
        for i in range(count)
    ]


def position(example):
    return int(example.id[2:])


def reading(bad=(), error=AudioError):
    def waveform(clip):
        number = int(clip.source.stem)
        if number in bad:
            raise error(f"{clip}: is silent")
        return np.full(4, number, dtype=np.float32)

    return waveform


def make(data=None, **changes):
    settings = dict(
        seed=0, prompts_per_step=4, rank=0, world=1, template="answer", shuffle_choices=False, waveform=reading(),
        skip_bad=False, workers=3,
    )  # fmt: skip
    prepare = changes.pop("prepare", lambda text, waveform: (text, float(waveform[0])))
    return Loader(data or examples(), prepare, **{**settings, **changes})


def indices(step, size=4, count=COUNT):
    return [shuffled(range(count), 0)(position) for position in range(step * size, (step + 1) * size)]


def test_a_step_is_its_examples_in_order_with_their_own_text_and_waveform():
    with make() as loader:
        for step in range(8):
            drawn = loader.step(step)
            assert [position(example) for example, _, _ in drawn] == indices(step)
            for example, (text, value), _ in drawn:
                assert text.startswith(example.question) and value == position(example)


def test_any_step_may_be_asked_for_at_any_time_with_the_same_result():
    with make(shuffle_choices=True) as one, make(shuffle_choices=True) as other:
        in_turn = [one.step(step) for step in range(6)]
        for step in (5, 0, 3, 3, 4):
            assert other.step(step) == in_turn[step]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_together_hold_the_same_prompts_whatever_their_number(world):
    bad = {"waveform": reading(bad={1, 2, 7}), "skip_bad": True, "shuffle_choices": True}
    with make(**bad) as alone:
        expected = [alone.step(step) for step in range(6)]
    parts = [make(rank=rank, world=world, **bad) for rank in range(world)]
    assert [together(parts, step, 4) for step in range(6)] == expected
    for part in parts:
        part.close()


def together(parts, step, size):
    """What the ranks have of a step, in the run's order."""
    positions = [position for part in parts for position in part.share(range(step * size, (step + 1) * size))]
    assert sorted(positions) == list(range(step * size, (step + 1) * size))
    drawn = [item for part in parts for item in part.step(step)]
    return [drawn[n] for n in sorted(range(size), key=lambda n: positions[n])]


def test_prompts_are_dealt_by_the_seconds_and_the_text_of_what_is_drawn():
    long, short = "How " + "very " * 200 + "long?", "How?"
    lengths = [(1.0, short), (1.0, long), (30.0, short), (10.0, long), (None, short), (20.0, short)]
    data = [replace(one, seconds=s, question=text) for one, (s, text) in zip(examples(6), lengths, strict=True)]
    in_file_order = {"prompts_per_step": 6, "world": 2, "curriculum": Curriculum(order="file")}
    with make(data, **in_file_order) as first, make(data, rank=1, **in_file_order) as second:
        # Tokens above those of a short text: 25, 25 + 251, 750, 250 + 251, 0 and 500.
        assert (first.share(range(6)), second.share(range(6))) == ([1, 2, 4], [0, 3, 5])
        assert first.share(range(6, 12)) == [7, 8, 10], "the next epoch"
        assert first.share([0, 4, 5, 7]) == [4, 5] and second.share([0, 4, 5, 7]) == [0, 7]


def test_what_a_rank_has_found_bad_does_not_change_its_share():
    bad = {"waveform": reading(bad={1, 2, 7}), "skip_bad": True, "world": 2}
    with make(**bad) as fresh, make(**bad) as later:
        for step in range(6):
            later.step(step)
        assert later.bad
        steps = [range(step * 4, step * 4 + 4) for step in range(6)]
        assert list(map(later.share, steps)) == list(map(fresh.share, steps))


def watching(count):
    """What was prepared, an event that `count` prompts were, and the function that does it."""
    seen, ready = [], threading.Event()

    def prepare(text, waveform):
        seen.append(waveform[0])
        if len(seen) == count:
            ready.set()

    return seen, ready, prepare


def test_the_next_step_is_prepared_while_this_one_runs():
    seen, ready, prepare = watching(8)
    with make(prepare=prepare) as loader:
        loader.step(0)
        assert ready.wait(timeout=20)
        assert Counter(seen) == Counter(indices(0) + indices(1))


def test_the_first_step_of_a_run_can_be_prepared_before_it_is_asked_for():
    seen, ready, prepare = watching(4)
    with make(prepare=prepare) as loader:
        loader.prepare(5)
        assert ready.wait(timeout=20)
        assert Counter(seen) == Counter(indices(5))
        loader.step(5)
    assert Counter(seen[:4]) == Counter(indices(5)) and not set(seen[4:]) - set(indices(6))


def test_a_prepared_step_is_used_and_not_prepared_again():
    calls = []
    with make(examples(100), prepare=lambda text, waveform: calls.append(text)) as loader:
        for step in range(5):
            loader.step(step)
    assert set(Counter(list(calls)).values()) == {1}, "a list, as the threads still prepare the sixth step"


def test_choices_are_shuffled_by_step_with_the_answer_moving_along():
    with make(shuffle_choices=True) as loader:
        orders = set()
        for step in range(12):
            for example, (text, _), _ in loader.step(step):
                assert example.answer_text == "abcd"[position(example) % 4]
                assert str(list(example.choices)) in text
                orders.add(example.choices)
    assert len(orders) > 5


def test_a_bad_clip_is_an_error_that_names_its_line():
    with make(waveform=reading(bad={indices(2)[1]})) as loader:
        loader.step(0)
        loader.step(1)
        with pytest.raises(AudioError, match=rf"train.jsonl:{indices(2)[1] + 1}: .*is silent"):
            loader.step(2)


def test_a_bad_clip_is_replaced_by_the_next_good_one_listed_once_and_counted():
    bad = {3, 4, COUNT - 1}
    replacement = {3: 5, 4: 5, COUNT - 1: 0}
    with make(waveform=reading(bad), skip_bad=True) as loader:
        for step in range(12):
            expected = [replacement.get(index, index) for index in indices(step)]
            assert [position(example) for example, _, _ in loader.step(step)] == expected
        assert sorted(one.id for one in loader.bad) == ["id10", "id3", "id4"]
        assert loader.bad[0].reason.endswith("is silent") and loader.bad[0].line.startswith("train.jsonl:")


def test_a_clip_once_found_bad_is_not_decoded_again():
    read, bad = Counter(), reading({3})

    def waveform(clip):
        read[int(clip.source.stem)] += 1
        return bad(clip)

    with make(waveform=waveform, skip_bad=True, workers=1) as loader:
        for step in range(40):
            loader.step(step)
    # Twice where the next step was prepared before the first find was noted.
    assert read[3] <= 2 < read[5]


def test_clips_skipped_for_their_length_need_no_skip_bad():
    with make(waveform=reading({3}, SkippedClipError)) as loader:
        for step in range(4):
            loader.step(step)
        assert [one.id for one in loader.bad] == ["id3"]


def test_an_error_of_the_program_is_never_taken_for_bad_data():
    def prepare(text, waveform):
        raise KeyError("audio_token")

    with make(prepare=prepare, skip_bad=True) as loader, pytest.raises(KeyError, match="audio_token"):
        loader.step(0)


def test_bad_data_found_by_prepare_is_skipped_like_a_bad_clip():
    def prepare(text, waveform):
        if waveform[0] == 3:
            raise DataError("the prompt is too long")
        return waveform[0]

    with make(prepare=prepare, skip_bad=True) as loader:
        prompts = [prompt for step in range(3) for _, prompt, _ in loader.step(step)]
    assert len(prompts) == 12 and 3 not in prompts


def test_all_examples_bad_is_an_error_even_with_skip_bad():
    with make(waveform=reading(range(COUNT)), skip_bad=True) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match="all 11 examples are bad, one of them train.jsonl"):
                loader.step(0)


def test_an_example_without_audio_is_prepared_from_its_text_alone():
    data = [Example("id0", (), "Which?", ("a", "b"), 0, line="train.jsonl:1")]
    with make(data, prepare=lambda text, *waveforms: (text, *waveforms)) as loader:
        assert all(len(prepared) == 1 for _, prepared, _ in loader.step(0))


def test_what_can_never_work_is_refused_when_the_loader_is_made():
    with pytest.raises(ValueError, match="cannot be split over 3 ranks"):
        make(world=3)
    with pytest.raises(ValueError, match="unknown template"):
        make(template="answr")
    with pytest.raises(DataError, match="no examples"):
        Loader([], None, **dict.fromkeys(
            ["seed", "prompts_per_step", "rank", "world", "template", "shuffle_choices", "waveform", "skip_bad",
             "workers"]))  # fmt: skip


def test_skipped_examples_are_listed_at_once_and_never_twice_also_by_a_resumed_run(tmp_path):
    path = tmp_path / "run" / "bad.jsonl"
    log = BadLog(path)
    assert not path.exists()
    log.add(BadExample("train.jsonl:3", "ä", "is silent"))
    log.add(BadExample("train.jsonl:3", "ä", "is silent"))
    assert json.loads(path.read_text(encoding="utf-8")) == {"file": "train.jsonl:3", "id": "ä", "reason": "is silent"}
    again = BadLog(path)
    again.add(BadExample("train.jsonl:3", "ä", "is silent"))
    again.add(BadExample("b:1", "2", "x"))
    assert [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()] == ["ä", "2"]


def test_the_loader_reports_each_bad_example_once():
    reported = []
    with make(waveform=reading(bad={3, 4}), skip_bad=True, on_bad=reported.append) as loader:
        for step in range(12):
            loader.step(step)
    assert sorted(bad.id for bad in reported) == ["id3", "id4"]


def silenced(loader, steps=60):
    """Which (step, example) had its samples set to zero; example 0 is zeros by itself and left out."""
    drawn = [(step, example, prompt) for step in range(steps) for example, prompt, _ in loader.step(step)]
    return {(step, position(example)): prompt[1] == 0 for step, example, prompt in drawn if position(example)}


def test_silent_share_removes_the_sound_of_that_share_as_a_function_of_seed_step_and_example():
    with make() as loader:
        assert not any(silenced(loader).values())
    with make(silent_share=0.3) as loader, make(silent_share=0.3) as again, make(silent_share=0.3, seed=1) as other:
        first = silenced(loader)
        # 218 draws at 0.3: a standard deviation is 0.031.
        assert abs(sum(first.values()) / len(first) - 0.3) < 0.12
        assert first == silenced(again)
        second = silenced(other)
        assert any(first[drawn] != second[drawn] for drawn in first.keys() & second.keys())


def keys_of(count, steps=6, world=1, **changes):
    """The keys of each step over all ranks, in order."""
    parts = [make(examples(count), rank=rank, world=world, **changes) for rank in range(world)]
    size = changes.get("prompts_per_step", 4)
    keys = [[key for _, _, key in together(parts, step, size)] for step in range(steps)]
    for part in parts:
        part.close()
    return keys


def test_the_first_occurrence_of_an_example_in_a_step_has_the_key_of_seed_step_and_id():
    assert keys_of(1, 2, prompts_per_step=1) == [[(0, 0, 12363731365491689381)], [(0, 1, 12363731365491689381)]]
    (key,) = keys_of(1, 1, prompts_per_step=1, seed=1)[0]
    assert key == (1, 0, 12363731365491689381), "a published hash, not this process's"


def random_numbers(key):
    """The first numbers that the sampler would draw with a key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key)))).random(4).tobytes()


@pytest.mark.parametrize("bad", [set(), {0}, {1, 2}, {0, 1, 3}])
@pytest.mark.parametrize(("count", "size"), [(5, 4), (4, 8), (7, 12), (5, 24)])
def test_no_two_prompts_of_a_step_draw_the_same_numbers(count, size, bad):
    for keys in keys_of(count, prompts_per_step=size, waveform=reading(bad), skip_bad=True):
        assert len(keys) == size == len(set(keys)) == len({random_numbers(key) for key in keys})


@pytest.mark.parametrize("world", [2, 4])
def test_keys_do_not_depend_on_the_number_of_ranks(world):
    settings = dict(prompts_per_step=12, waveform=reading({1, 2}), skip_bad=True)
    assert keys_of(7, world=world, **settings) == keys_of(7, **settings)


def test_a_replacement_has_a_key_of_its_own_and_leaves_the_others_keys_as_they_were():
    clean = keys_of(5, 4, prompts_per_step=5)
    spoilt = keys_of(5, 4, prompts_per_step=5, waveform=reading({3}), skip_bad=True)
    for step, (before, after) in enumerate(zip(clean, spoilt, strict=True)):
        (changed,) = [index for index in range(5) if before[index] != after[index]]
        assert indices(step, 5, 5)[changed] == 3 and len(after[changed]) == 5
        assert after[changed][2:] == (before[indices(step, 5, 5).index(4)][2], 0, before[changed][2])


def batches(count=7, **changes):
    settings = dict(template="answer", waveform=reading(), batch=3, workers=2)
    return evaluation_batches(examples(count), lambda text, waveform: float(waveform[0]), **(settings | changes))


def test_evaluation_batches_hold_every_example_once_in_order():
    drawn = list(batches())
    assert [len(batch) for batch in drawn] == [3, 3, 1]
    assert [position(example) for batch in drawn for example, _ in batch] == list(range(7))
    assert all(value == position(example) for batch in drawn for example, value in batch)
    assert list(batches(count=0)) == []


def test_evaluation_stops_at_a_bad_example_or_reports_it_and_goes_on():
    with pytest.raises(AudioError, match="train.jsonl:6: 5.wav: is silent"):
        list(batches(waveform=reading(bad={5})))
    reported = []
    drawn = list(batches(waveform=reading(bad={5}), skip_bad=True, on_bad=reported.append))
    assert [position(example) for batch in drawn for example, _ in batch] == [0, 1, 2, 3, 4, 6]
    assert [bad.line for bad in reported] == ["train.jsonl:6"]


def test_closing_does_not_wait_for_a_clip_that_is_being_read():
    """A disk that hangs would otherwise keep a run from leaving, after the timer of run.grace has ended."""
    began, may_end = threading.Event(), threading.Event()

    def waveform(clip):
        began.set()
        may_end.wait(60)
        return reading()(clip)

    loader = make(waveform=waveform)
    loader.prepare(0)
    assert began.wait(10)
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    closing.join(5)
    waited = closing.is_alive()
    may_end.set()
    assert not waited
