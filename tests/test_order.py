"""data/order.py: every epoch shows every example once, in an order that only the seed and the step decide; a split."""

import random
from pathlib import Path

import pytest

from hark.data.clip import Clip
from hark.data.errors import DataError
from hark.data.examples import Example
from hark.data.order import dealt, expected_tokens, hold_out, shuffled


def step_indices(count, *, seed, step, prompts_per_step):
    order = shuffled(range(count), seed)
    return [order(position) for position in range(step * prompts_per_step, (step + 1) * prompts_per_step)]


def steps(count, number, size, seed=0):
    return [step_indices(count, seed=seed, step=step, prompts_per_step=size) for step in range(number)]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 7), (5, 12), (1, 3), (12, 1)])
def test_laid_end_to_end_the_steps_are_whole_permutations(count, size):
    flat = [index for step in steps(count, 3 * count, size) for index in step]
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == list(range(count))


def test_any_step_asked_for_alone_is_the_same_as_in_its_turn():
    in_turn = steps(10, 9, 4)
    assert [step_indices(10, seed=0, step=step, prompts_per_step=4) for step in reversed(range(9))] == in_turn[::-1]


def test_epochs_and_seeds_differ_and_the_order_is_fixed_for_all_time():
    first, second = steps(20, 2, 20)
    assert first != second and first != steps(20, 1, 20, seed=1)[0]
    # Written down: an order that changed with the library would break exact resume.
    assert step_indices(6, seed=3, step=1, prompts_per_step=4) == [3, 5, 1, 0]


def test_prompts_dealt_by_hand():
    # Rounds: 30 and 16; 15 to the rank with 16, 5 to that with 30; 2 to the rank with 31, 1 to that with 35.
    assert dealt([30, 16, 15, 5, 2, 1], 2) == [[0, 3, 5], [1, 2, 4]]
    assert dealt([1, 5, 2, 16, 30, 15], 2) == [[0, 1, 4], [2, 3, 5]], "the same prompts in another order"
    assert dealt([30, 16, 15, 5, 2, 1], 3) == [[0, 5], [1, 4], [2, 3]]
    assert dealt([7] * 6, 2) == [[0, 2, 4], [1, 3, 5]], "equal ones in turn"
    assert expected_tokens(2.0, 100) == 75, "25 tokens per second, and one for 4 letters"


def lengths_drawn(seed, count=24):
    """Some of them equal, some long."""
    numbers = random.Random(seed)
    return [numbers.choice([0.0, 40.0, numbers.uniform(20, 800)]) for _ in range(count)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 12, 24])
def test_each_prompt_is_of_one_rank_and_all_ranks_have_equally_many_of_similar_length(world):
    for seed in range(20):
        lengths = lengths_drawn(seed)
        ranks = dealt(lengths, world)
        assert sorted(index for own in ranks for index in own) == list(range(24))
        assert {len(own) for own in ranks} == {24 // world} and all(own == sorted(own) for own in ranks)
        ordered = [sorted((lengths[index] for index in own), reverse=True) for own in ranks]
        for longer, shorter in zip(zip(*ordered, strict=True), list(zip(*ordered, strict=True))[1:], strict=False):
            assert min(longer) >= max(shorter), "the k-th longest of all ranks are one round"
        sums = [sum(own) for own in ordered]
        assert max(sums) - min(sums) <= max(lengths) - min(lengths) + 1e-9
        assert ranks == dealt([length + 320 for length in lengths], world), "completions of one length change nothing"


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="12 prompts per step cannot be split over 5 ranks"):
        dealt([1.0] * 12, 5)


def questions(*clips, root="data"):
    """One example for each clip name; None is a question without audio."""
    places = [() if clip is None else (Clip(Path(root) / clip),) for clip in clips]
    return [Example(f"q{n}", place, "Which?", ("a", "b"), 0) for n, place in enumerate(places)]


MANY = [f"{kind}/{n % 40}.wav" for kind in ("rain", "dog") for n in range(100)] + [None] * 20


def split(examples, count=30, seed=0):
    training, held_out = hold_out(examples, count, seed)
    return {example.id for example in training}, {example.id for example in held_out}


def test_examples_are_held_out_by_whole_clips_in_file_order_and_none_is_lost():
    examples = questions(*MANY)
    training, held_out = hold_out(examples, 30, seed=0)
    assert 30 <= len(held_out) < 30 + 3, "no more than the last clip brings beyond the count"
    assert sorted(training + held_out, key=examples.index) == examples
    assert [examples.index(example) for example in training] == sorted(examples.index(example) for example in training)
    assert not {example.clips for example in training} & {e.clips for e in held_out if e.clips}
    # 20 of 120 examples are their own clip, so some are held out and most are not.
    assert 0 < sum(not example.clips for example in held_out) < 20


def test_what_is_held_out_depends_on_seed_and_clips_alone_not_on_order_or_place():
    examples = questions(*MANY)
    _, held_out = split(examples)
    assert split(examples[::-1])[1] == held_out
    assert split(questions(*MANY, root="/elsewhere/deep/down"))[1] == held_out
    assert split(examples, seed=1)[1] != held_out
    assert held_out < split(examples, count=60)[1], "more of the same order"
    # Written down: another split in a resumed run would train on what it validates on.
    assert split(questions("a.wav", "b.wav", "c.wav", "a.wav"), count=1)[1] == {"q2"}


def test_holding_out_nothing_is_allowed_and_everything_is_not():
    examples = questions("a.wav", "a.wav", "a.wav", "b.wav")
    assert hold_out(examples, 0, seed=0) == (examples, [])
    for few in (questions("a.wav", "a.wav"), questions("a.wav"), [], examples):
        with pytest.raises(DataError, match="nothing would be left to train on"):
            hold_out(few, max(len(few), 1), seed=0)
    with pytest.raises(ValueError, match="count=-1"):
        hold_out(examples, -1, seed=0)
