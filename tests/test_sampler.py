"""What is drawn is a function of the prompt and its key, follows the policy's distribution, and ends where it says."""

import pytest
import torch

from grpo.sampler import _draw, _uniforms, sample
from tests.conftest import Case

LIMIT = 8


def draw(case: Case, which=(0, 1, 2), keys=((0, 0, 0), (0, 0, 1), (0, 0, 2)), group_size=3, **more):
    prompts = [case.prompts[n] for n in which]
    settings = dict(group_size=group_size, max_new_tokens=LIMIT, temperature=1.0, keys=[keys[n] for n in which])
    return sample(case.policy, prompts, **(settings | more))


def groups(rollout):
    """Completions of each prompt as lists of ids."""
    rows = [row[keep].tolist() for row, keep in zip(rollout.tokens, rollout.mask, strict=True)]
    return [rows[first : first + rollout.group_size] for first in range(0, len(rows), rollout.group_size)]


def test_a_prompt_draws_the_same_completions_whatever_stands_beside_it(case):
    together = groups(draw(case))
    alone = [groups(draw(case, which=(n,)))[0] for n in range(3)]
    reordered = groups(draw(case, which=(2, 0, 1)))
    assert together == alone == [reordered[1], reordered[2], reordered[0]]


def test_another_step_or_example_draws_other_completions_and_siblings_differ(case):
    first = groups(draw(case))
    other = groups(draw(case, keys=((0, 1, 0), (0, 1, 1), (0, 1, 2))))
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert all(len({tuple(row) for row in group}) > 1 for group in first)


def test_a_completion_ends_with_its_first_stop_token_or_at_the_limit(case):
    rollout = draw(case, group_size=8)
    stops = set(case.policy.stop_ids)
    assert 0 < rollout.stopped.sum() < len(rollout.stopped), "both ways to end are needed here"
    for tokens, mask, stopped in zip(rollout.tokens, rollout.mask, rollout.stopped, strict=True):
        length = int(mask.sum())
        assert mask[:length].all(), "the mask is one run from the start"
        ids = tokens[:length].tolist()
        assert (ids[-1] in stops) == bool(stopped)
        assert not stops & set(ids[:-1])
        assert stopped or length == LIMIT
        assert (tokens[length:] == case.policy.pad_id).all()


def test_logprobs_are_exactly_zero_at_padding_and_negative_elsewhere(case):
    rollout = draw(case)
    assert (rollout.logprobs[~rollout.mask] == 0).all()
    assert (rollout.logprobs[rollout.mask] < 0).all()


def test_a_suppressed_id_is_never_drawn_however_likely_it_is(case):
    likely = int(draw(case, temperature=0).tokens[0, 0])
    case.policy.suppressed_ids += (likely,)
    for temperature in (0, 1.0, 3.0):
        assert not (draw(case, temperature=temperature).tokens == likely).any()


def test_the_first_token_follows_the_policy_distribution(case):
    """2000 draws of one token against its probabilities; 4.5 standard deviations of the largest ones."""
    count = 2000
    rollout = draw(case, which=(0,), group_size=count, max_new_tokens=1, temperature=0.7)
    tokens = rollout.tokens[:, 0]
    probability = torch.zeros(tokens.max() + 1).scatter_(0, tokens, rollout.logprobs[:, 0].exp())
    share = torch.bincount(tokens) / count
    likely = probability.topk(5).indices
    deviation = (probability[likely] * (1 - probability[likely]) / count).sqrt()
    assert ((share - probability)[likely].abs() < 4.5 * deviation).all()


def test_drawing_inverts_the_cumulative_distribution():
    distribution = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(5, -1)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.76, 1 - 2**-53], dtype=torch.float64)
    assert _draw(distribution, uniform).tolist() == [0, 0, 2, 3, 3]


def test_uniforms_are_the_same_on_every_machine():
    # Philox is a published algorithm: these digits are its, not this computer's.
    assert _uniforms((1, 2, 3), 1, 2).tolist() == [[0.7198955456932165, 0.012702050455707714]]


def test_sampling_without_keys_is_refused(case):
    with pytest.raises(ValueError, match="one key per prompt"):
        sample(case.policy, case.prompts, group_size=2, max_new_tokens=4, temperature=1.0)
