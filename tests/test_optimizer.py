"""The learning rate by hand, and what decays."""

import pytest
import torch

from hark.grpo.optimizer import build_optimizer, clip_gradients, learning_rate
from hark.models.loading import load_policy

RATE = dict(peak=2.0, warmup=4, total=12)


def rates(schedule):
    return [learning_rate(step, schedule=schedule, **RATE) for step in range(12)]


def test_each_schedule_rises_over_the_warm_up_and_then_goes_its_way():
    for schedule in ("linear", "cosine", "constant"):
        assert rates(schedule)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates("constant")[11] == 2.0
    assert rates("linear")[8] == pytest.approx(1.0) and rates("linear")[11] == pytest.approx(0.25)
    assert rates("cosine")[8] == pytest.approx(1.0) and rates("cosine")[11] == pytest.approx(0.0761, abs=1e-4)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="expected linear, cosine or constant"):
        learning_rate(5, schedule="step", **RATE)


def test_matrices_decay_and_vectors_do_not(causal_lm_dir):
    policy = load_policy(causal_lm_dir)
    optimizer = build_optimizer(policy, weight_decay=0.1, betas=(0.9, 0.99))
    assert {group["weight_decay"]: {p.dim() for p in group["params"]} for group in optimizer.param_groups} == {
        0.1: {2},
        0.0: {1},
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(policy.parameters()))


def test_clipping_scales_all_gradients_to_one_norm(causal_lm_dir):
    policy = load_policy(causal_lm_dir)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in policy.parameters())
    assert clip_gradients(policy, 1.0) == pytest.approx(count**0.5)
    total = sum(float((parameter.grad**2).sum()) for parameter in policy.parameters())
    assert total == pytest.approx(1.0, rel=1e-3)
