"""The formula of the necessary multiply-adds against what torch counts while the real model runs.

Torch counts every pair of a masked attention, so the products of attention are compared for themselves, and the pairs
that count are held against the tree mask. The tower's convolutions run two frames more, which they reach behind a clip.
"""

from dataclasses import replace

import pytest
import torch
from benchmark import HarkSide, Size, Work, build_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from grpo.flops import best_matmul_rate, cost_of, macs
from grpo.scorer import score
from grpo.tree import branches_layout, prompt_layout, tree_mask

WORK = Work(seconds=4.0, prompts=2, group_size=3, new_tokens=5)


@pytest.fixture(scope="module")
def side(tmp_path_factory):
    directory = tmp_path_factory.mktemp("benchmark")
    build_model(directory, Size(vocabulary=400, hidden=64, inner=96, layers=2, tower_hidden=64, tower_layers=1))
    return HarkSide(directory, WORK)


def counted(function, *args, **kwargs):
    """Multiply-adds of a call outside attention, those of attention, and the result."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = function(*args, **kwargs)
    attention = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    return (counter.get_total_flops() - attention) / 2, attention / 2, result


def test_each_pass_costs_what_torch_counts(side):
    whole = cost_of(side.policy)
    cost = replace(whole, pair=0, heard_pair=0)
    rollout, _, drawn = counted(side.rollout)
    assert drawn.mask.all()
    expected = macs(cost, side.prompts, drawn.mask.sum(dim=1), audio_id=side.policy.audio_id)
    forward, attention, (logprobs, _) = counted(
        score, side.policy, side.prompts, drawn.tokens, drawn.mask, group_size=3
    )
    backward, _, _ = counted(logprobs.sum().backward)
    again = drawn.mask.sum().item() * cost.head  # the scorer computes its logits again in the backward
    assert rollout == pytest.approx(expected.forward, rel=0.01)
    assert forward == pytest.approx(expected.forward, rel=0.01)
    assert backward - again == pytest.approx(expected.backward, rel=0.01)
    prompt, branches, places = len(side.prompts[0].ids), 3 * 4, 400 // 2
    pairs = prompt**2 + branches * (prompt + branches)  # the prompt's own, causal, and the branches' with the whole row
    assert attention == 2 * (len(whole.windows) * whole.pair * pairs + whole.heard_pair * places**2)


@pytest.mark.parametrize("window", [None, 7])
def test_a_token_attends_to_the_pairs_of_the_tree_mask(side, window):
    cost = replace(cost_of(side.policy), token=0, head=0, pair=1, convolutions=(), windows=(window,))
    prompt = side.prompts[0]
    lengths = torch.tensor([len(prompt.ids)])
    row = prompt_layout(lengths, len(prompt.ids)) + branches_layout(lengths, 3, 4)
    pairs = tree_mask(row, row, window).sum().item()
    assert macs(cost, [prompt], torch.tensor([5, 5, 5])).forward == pairs


def test_a_whole_step_is_five_forwards_less_the_gradient_of_the_mel_frames(side):
    cost = cost_of(side.policy)
    passes = macs(cost, side.prompts, torch.full((6,), 5), audio_id=side.policy.audio_id)
    first_convolution = 2 * 400 * side.policy.tower.conv1.weight.numel()
    assert passes.step() == 5 * passes.forward - first_convolution
    assert passes.step(reference=False, updates=2) == 7 * passes.forward - 2 * first_convolution


def test_the_best_matmul_rate_is_a_rate():
    assert 1e8 < best_matmul_rate(repeat=1) < 1e15
