"""Group-relative advantages against numbers worked by hand, and their properties."""

import pytest
import torch

from hark.grpo.advantage import equal_rewards, group_advantages, weighted_rewards

GENERATOR = torch.Generator().manual_seed(0)
REWARDS = torch.rand(24, generator=GENERATOR)


def test_two_groups_worked_by_hand():
    # Group 1: mean 1/2, deviations (1/2, -1/2, -1/2, 1/2), sample variance 1/3. Group 2: mean 1, sample variance 8/3.
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 1.0, -1.0, 1.0])
    first, second = 0.5 / (3**-0.5 + 1e-4), 2.0 / ((8 / 3) ** 0.5 + 1e-4)
    expected = torch.tensor([first, -first, -first, first, second, 0.0, -second, 0.0])
    torch.testing.assert_close(group_advantages(rewards, group_size=4), expected)
    torch.testing.assert_close(
        group_advantages(rewards, group_size=4, scale="none"),
        torch.tensor([0.5, -0.5, -0.5, 0.5, 2.0, 0.0, -2.0, 0.0]),
    )


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_of_a_group_sum_to_zero(scale):
    sums = group_advantages(REWARDS, group_size=6, scale=scale).unflatten(0, (-1, 6)).sum(1)
    torch.testing.assert_close(sums, torch.zeros(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_permuting_a_group_permutes_its_advantages(scale):
    order = torch.cat([torch.randperm(6, generator=GENERATOR) + 6 * n for n in range(4)])
    expected = group_advantages(REWARDS, group_size=6, scale=scale)[order]
    torch.testing.assert_close(group_advantages(REWARDS[order], group_size=6, scale=scale), expected)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_shifting_the_rewards_of_a_group_changes_nothing(scale):
    shift = torch.tensor([0.0, 3.0, -2.0, 0.5]).repeat_interleave(6)
    torch.testing.assert_close(
        group_advantages(REWARDS + shift, group_size=6, scale=scale),
        group_advantages(REWARDS, group_size=6, scale=scale),
        atol=1e-5,  # rounding of the sum REWARDS + 3, divided by a deviation of about 0.3
        rtol=0,
    )


def test_scaling_the_rewards_changes_nothing_with_std_and_scales_without():
    torch.testing.assert_close(
        group_advantages(10 * REWARDS, group_size=6), group_advantages(REWARDS, group_size=6), rtol=1e-3, atol=0
    )  # only the 1e-4 beside the deviation differs
    torch.testing.assert_close(
        group_advantages(10 * REWARDS, group_size=6, scale="none"),
        10 * group_advantages(REWARDS, group_size=6, scale="none"),
    )


@pytest.mark.parametrize("group_size", [2, 3, 4, 6, 12, 13])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 0.7, 1 / 3, 2.0])
def test_equal_rewards_give_exactly_zero(group_size, value):
    rewards = torch.full((2 * group_size,), value)
    assert (group_advantages(rewards, group_size=group_size) == 0).all()
    assert equal_rewards(rewards, group_size=group_size).all()
    rewards[0] += 1e-3
    assert equal_rewards(rewards, group_size=group_size).tolist() == [False, True]


def test_one_group_does_not_see_another():
    other = REWARDS.clone()
    other[6:] *= 5
    assert torch.equal(group_advantages(other, group_size=6)[:6], group_advantages(REWARDS, group_size=6)[:6])


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale is 'mad'"):
        group_advantages(REWARDS, group_size=6, scale="mad")


def test_a_reward_is_the_weighted_sum_of_its_columns():
    columns = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
    assert weighted_rewards(columns, [1.0, 0.5, 0.25]).tolist() == [1.5, 0.25]
    # 1 is lost beside 1e8 in float32, which has 24 bits.
    assert weighted_rewards(torch.tensor([[1e8, 1.0, -1e8]]), [1.0, 1.0, 1.0]).tolist() == [1.0]


@pytest.mark.parametrize("kinds", [2, 5, 8])
def test_equal_columns_give_exactly_equal_rewards(kinds):
    """A matrix product adds up some rows in another order than the others, and rounds equal ones differently."""
    generator = torch.Generator().manual_seed(kinds)
    weights = torch.rand(kinds, generator=generator).tolist()
    for row in torch.rand(100, kinds, generator=generator):
        assert equal_rewards(weighted_rewards(row.repeat(13, 1), weights), group_size=13).all()
