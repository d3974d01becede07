"""The losses against numbers worked by hand, and what clipping, KL and weights must and must not do."""

import math

import pytest
import torch

from hark.grpo.loss import kl_k3, policy_loss, supervised_loss, token_weights

CLIP = dict(clip_low=0.2, clip_high=0.3)
MASK = torch.tensor([[True, True, False], [True, True, True]])


def rows(*values):
    return torch.tensor(values)


def test_one_token_per_case_worked_by_hand():
    # ratio, advantage -> surrogate: clipped above for a gain, below for a loss, and free on the pessimistic side.
    cases = [
        (1.0, 2.0, 2.0),
        (1.5, 2.0, 1.3 * 2.0),
        (0.5, 2.0, 0.5 * 2.0),
        (0.5, -2.0, 0.8 * -2.0),
        (1.5, -2.0, 1.5 * -2.0),
    ]
    for ratio, advantage, surrogate in cases:
        old = rows([-1.0])
        loss, terms = policy_loss(old + math.log(ratio), old, None, rows(advantage), rows([0.25]), beta=0.0, **CLIP)
        assert loss.item() == pytest.approx(-0.25 * surrogate)
        was_clipped = surrogate != pytest.approx(ratio * advantage)
        assert terms["clipped"].item() == was_clipped


def test_the_kl_term_worked_by_hand():
    # pi = 1/2, pi_ref = 1/4: k3 = 1/2 - log(1/2) - 1.
    logprobs, ref = rows([math.log(0.5)]), rows([math.log(0.25)])
    expected = 0.5 + math.log(2) - 1
    assert kl_k3(logprobs, ref).item() == pytest.approx(expected)
    loss, terms = policy_loss(logprobs, logprobs, ref, rows(0.0), rows([1.0]), beta=0.04, **CLIP)
    assert loss.item() == pytest.approx(0.04 * expected)
    assert terms["kl"].item() == pytest.approx(expected)


def test_k3_is_zero_for_equal_policies_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    a, b = -torch.rand(2, 100, generator=generator) * 5
    assert (kl_k3(a, a) == 0).all()
    assert (kl_k3(a, b) >= 0).all()


def test_k3_is_an_unbiased_estimate_of_the_kl_divergence():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expectation = (p * kl_k3(p.log(), q.log())).sum()
    torch.testing.assert_close(expectation, (p * (p / q).log()).sum())


def test_the_gradient_at_equal_policies_is_the_policy_gradient():
    logprobs = rows([-1.0, -2.0, 0.0], [-0.5, -1.5, -2.5]).requires_grad_()
    weights = token_weights(MASK, kind="sequence-mean", completions=2, tokens=5)
    advantages = rows(1.5, -0.5)
    loss, _ = policy_loss(logprobs, logprobs.detach(), None, advantages, weights, beta=0.0, **CLIP)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -weights * advantages[:, None])


def test_a_clipped_token_has_no_gradient():
    logprobs = rows([0.0, 0.0]).requires_grad_()
    old = rows([-1.0, 0.0])  # the first token's ratio is e, far over the clip
    loss, _ = policy_loss(logprobs, old, None, rows(1.0), rows([0.5, 0.5]), beta=0.0, **CLIP)
    loss.backward()
    assert logprobs.grad.tolist() == [[0.0, -0.5]]


def test_padding_adds_nothing_whatever_stands_there():
    weights = token_weights(MASK, kind="token-mean", completions=2, tokens=5)
    logprobs, old, ref = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for junk in (0.0, 3.0):
        filled = [torch.where(MASK, value, torch.tensor(junk)) for value in (logprobs, old, ref)]
        results.append(policy_loss(*filled, rows(1.0, -1.0), weights, beta=0.1, **CLIP)[0])
    assert results[0] == results[1]


def test_sequence_mean_gives_each_completion_and_token_mean_each_token_the_same_say():
    torch.testing.assert_close(
        token_weights(MASK, kind="sequence-mean", completions=4, tokens=10),
        rows([1 / 8, 1 / 8, 0.0], [1 / 12, 1 / 12, 1 / 12]),
    )
    torch.testing.assert_close(
        token_weights(MASK, kind="token-mean", completions=4, tokens=10), rows([0.1, 0.1, 0.0], [0.1, 0.1, 0.1])
    )
    with pytest.raises(ValueError, match="sequence-mean"):
        token_weights(MASK, kind="mean", completions=4, tokens=10)


def test_a_kl_term_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="reference"):
        policy_loss(rows([0.0]), rows([0.0]), None, rows(1.0), rows([1.0]), beta=0.04, **CLIP)


def test_supervised_loss_is_the_weighted_negative_log_likelihood():
    loss, _ = supervised_loss(rows([-1.0, -3.0]), rows([0.5, 0.25]))
    assert loss.item() == pytest.approx(1.25)
