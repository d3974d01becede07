"""data/order.py: every epoch shows every example once, in an order that only the seed and the step decide."""

import pytest

from data.order import rank_slice, step_indices


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


def test_ranks_take_equal_contiguous_parts_that_do_not_depend_on_their_number():
    indices = steps(50, 1, 12)[0]
    for world in (1, 2, 3, 4, 6, 12):
        assert [index for rank in range(world) for index in rank_slice(indices, rank, world)] == indices
        assert {len(rank_slice(indices, rank, world)) for rank in range(world)} == {12 // world}


def test_what_cannot_be_split_or_is_not_there_is_refused():
    with pytest.raises(ValueError, match="12 prompts per step cannot be split over 5 ranks"):
        rank_slice(list(range(12)), 0, 5)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        rank_slice(list(range(12)), 2, 2)
    for bad in [{"count": 0}, {"step": -1}, {"prompts_per_step": 0}]:
        with pytest.raises(ValueError, match="expected at least 1, 1 and 0"):
            step_indices(**{"count": 3, "seed": 0, "step": 0, "prompts_per_step": 2, **bad})
