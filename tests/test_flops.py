"""The formula of the multiply-adds a step needs, compared with what torch counts while the model runs.

Torch counts every pair of a masked attention, so attention is compared separately, and the pairs that count are
compared with the tree mask. All other counts must be equal exactly.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hark.grpo import loop
from hark.grpo.instruments import flops
from hark.grpo.instruments.flops import Cost, best_matmul_rate, cost_of, macs
from hark.grpo.instruments.metrics import speed
from hark.grpo.runtime.collectives import World
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.sft import SupervisedTrainer
from hark.grpo.trainer import Trainer
from hark.grpo.tree import branches_layout, prompt_layout, tree_mask
from hark.launch.common.config_file import load_config
from hark.launch.studies.sides import HarkSide, Size, Work, build_model
from hark.models import split_attention
from hark.models.loading import load_policy
from hark.models.lora import WithoutAdapters
from hark.models.policy import Lora
from tests.ranks import on_ranks
from tests.runs import build, read_metrics

WORK = Work(seconds=4.0, prompts=2, group_size=3, new_tokens=5)


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
POLICIES = {
    "whole": {},
    "frozen tower": {"train": "no-tower"},
    "adapters": {"lora": Lora(4, 8.0, TARGETS)},
    "adapters of some layers": {"lora": Lora(4, 8.0, ("v_proj", "down_proj"))},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("benchmark")
    build_model(directory, Size(vocabulary=400, hidden=64, inner=96, layers=2, tower_hidden=64, tower_layers=1))
    return directory


@pytest.fixture(scope="module")
def side(directory):
    return HarkSide(directory, WORK)


def counted(function, *args, **kwargs):
    """Multiply-adds of a call outside attention, those of its attention, and the result."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = function(*args, **kwargs)
    flops = counter.get_flop_counts()["Global"]
    attention = flops.get(torch.ops.aten.bmm, 0) + flops.get(torch.ops.aten.baddbmm, 0)
    return (counter.get_total_flops() - attention) / 2, attention / 2, result


@pytest.mark.parametrize("kind", POLICIES)
def test_each_pass_costs_what_torch_counts(kind, side, directory, monkeypatch):
    monkeypatch.setattr("hark.models.linear.AVAILABLE", False)  # torch does not count the products of oneDNN
    policy = load_policy(directory, tower_cache=2**20, **POLICIES[kind])
    whole = cost_of(policy)
    draw = dict(group_size=3, max_new_tokens=5, temperature=1.0, keys=[(0,), (1,)], stop=False)
    rollout, _, drawn = counted(sample, policy, side.prompts, **draw)
    completions = side.prompts, drawn.tokens, drawn.mask
    with torch.no_grad():
        reference, _, _ = counted(score, WithoutAdapters(policy), *completions, group_size=3)
    kernel, pairs = split_attention.flash, []  # pairs in the branches' attention, which torch does not count

    def flash(query, key, value, **options):
        pairs.append(query.shape[0] * query.shape[2] * key.shape[2])
        return kernel(query, key, value, **options)

    monkeypatch.setattr(split_attention, "flash", flash)
    forward, attention, (logprobs, _) = counted(score, policy, *completions, group_size=3)
    backward, _, _ = counted(logprobs.sum().backward)

    cost = replace(whole, pair=0, tower_pair=0)
    passes = macs(cost, side.prompts, drawn.mask.sum(dim=1), audio_id=policy.audio_id)
    # Output positions of the convolutions behind the clips: two of the first, one of the second, for two prompts each.
    first, second = (2 * conv.weight.numel() for conv in (policy.tower.conv1, policy.tower.conv2))
    behind, again = 2 * first + second, 0 if whole.frozen_tower else 1
    assert rollout == passes.tower + passes.rollout + behind
    assert reference == passes.reference + again * behind, "a frozen tower does not run again"
    assert forward == passes.forward + again * behind
    assert backward == passes.backward + again * 2 * (first + second)

    prompt, steps, positions = len(side.prompts[0].ids), 4, 400 // 2
    assert attention == 2 * (len(whole.windows) * whole.pair * prompt**2 + again * whole.tower_pair * positions**2)
    assert sum(pairs) == 2 * len(whole.windows) * 3 * steps * (prompt + steps), "siblings are not attended to"


def test_a_clip_costs_its_convolutions_its_layers_and_its_pairs_worked_by_hand():
    """Nine frames: nine outputs of the first convolution, five of the second, which are the layers' positions."""
    cost = Cost(
        token=0, head=0, pair=0, windows=(), convolutions=((1, 3), (2, 7)), tower_position=11, tower_pair=13
    )  # fmt: skip
    assert cost.tower(9) == 9 * 3 + 5 * 7 + 5 * 11 + 5 * 5 * 13


@pytest.mark.parametrize("window", [None, 7])
def test_a_token_attends_to_the_pairs_of_the_tree_mask(side, window):
    cost = replace(cost_of(side.policy), token=0, head=0, pair=1, convolutions=(), windows=(window,))
    prompt = side.prompts[0]
    lengths = torch.tensor([len(prompt.ids)])
    row = prompt_layout(lengths, len(prompt.ids)) + branches_layout(lengths, 3, 4)
    pairs = tree_mask(row, row, window).sum().item()
    assert macs(cost, [prompt], torch.tensor([5, 5, 5])).forward == pairs


def test_a_whole_step_is_five_forwards_less_the_gradient_of_the_mel_frames_and_the_first_tokens_heads(side):
    cost = cost_of(side.policy)
    passes = macs(cost, side.prompts, torch.full((6,), 5), audio_id=side.policy.audio_id)
    first_convolution = 2 * 400 * side.policy.tower.conv1.weight.numel()
    first_tokens = 2 * (3 - 1) * cost.head
    assert passes.step() == 5 * passes.forward - first_convolution - first_tokens
    assert passes.step(reference=False, updates=2) == 7 * passes.forward - 2 * first_convolution - first_tokens
    assert passes.step(reference=False, rollout=False) == 3 * passes.forward - first_convolution
    prompts = sum(cost.tokens(0, len(prompt.ids)) + prompt.clips[0].tokens * cost.projector for prompt in side.prompts)
    prompts += 2 * cost.tower(400)  # of one of the five forwards
    for updates in (1, 2):
        assert passes.step(updates=updates) - passes.step(updates=updates, keep_prefill=True) == prompts


def test_a_frozen_tower_counts_once_however_many_passes_use_it(side, directory):
    cost = cost_of(load_policy(directory, train="no-tower"))
    passes = macs(cost, side.prompts, torch.full((6,), 5), audio_id=side.policy.audio_id)
    assert passes.tower == 2 * cost.tower(400) > 0
    rest = macs(replace(cost, convolutions=()), side.prompts, torch.full((6,), 5), audio_id=side.policy.audio_id)
    for parts in (dict(), dict(updates=2), dict(rollout=False, reference=False)):
        assert passes.step(**parts) == rest.step(**parts) + passes.tower


def test_a_group_without_a_gradient_needs_the_rollout_and_the_reference_alone(side):
    cost, lengths = cost_of(side.policy), torch.tensor([5, 5, 5, 2, 3, 1])
    one, two = (macs(cost, [side.prompts[n]], lengths.split(3)[n], audio_id=side.policy.audio_id) for n in range(2))
    passes = macs(cost, side.prompts, lengths, audio_id=side.policy.audio_id, groups_with_gradient=[1])
    assert passes.rollout == one.rollout + two.rollout and passes.reference == one.reference + two.reference
    assert (passes.forward, passes.backward) == (two.forward, two.backward)


@pytest.mark.parametrize("kind", [Trainer, SupervisedTrainer])
def test_a_step_reports_what_it_needed_and_how_fast_it_went(kind, settings, tmp_path):
    config = load_config([*settings, f"run.directory={tmp_path}/run", "loss.inner_epochs=2", "optim.steps=2"])
    more, supervised = {}, kind is SupervisedTrainer
    if supervised:
        more = {"target": lambda example: example.answer_text}
    batches = []

    def run(world: World) -> None:
        trainer = build(world, config, kind, **more)
        accumulate = trainer.accumulate
        trainer.accumulate = lambda batch: batches.append(batch) or accumulate(batch)
        loop.train(trainer)
        updates = batches[1:] if supervised else batches[1::2]  # the first is the probe's
        for line, batch in zip(read_metrics(tmp_path / "run"), updates, strict=True):
            lengths, policy = batch.mask.sum(dim=1), trainer.policy
            passes = macs(cost_of(policy), batch.prompts, lengths, audio_id=policy.audio_id)
            rollout = 0 if supervised else passes.rollout + passes.reference
            assert line["macs"] == rollout + (1 if supervised else 2) * (passes.forward + passes.backward)
            assert line["speed/tokens_per_second"] * line["seconds/step"] == pytest.approx(lengths.sum().item())
            assert 1e-4 < line["speed/limit_share"] < 1.5, (
                "small matrices are slow, and no step is faster than a matmul"
            )

    on_ranks(1, run)


def test_the_share_of_the_limit_is_of_the_rate_of_all_ranks():
    assert speed({"tokens": 60.0, "macs": 3e9, "seconds/step": 2.0}, rate=1e10) == {
        "speed/tokens_per_second": 30.0, "speed/limit_share": 0.15
    }  # fmt: skip


def test_the_best_matmul_rate_is_a_rate():
    assert 1e8 < best_matmul_rate(repeat=1) < 1e15


def test_the_rate_is_that_of_the_fastest_product_and_none_is_waited_for_long(monkeypatch):
    """2 ms, 16 ms and 64 ms; the next would take eight times as long as the last, half a second."""
    seconds = {512: 2e-3, 1024: 16e-3, 2048: 64e-3}
    monkeypatch.setattr(flops, "SIZES", (512, 1024, 2048, 4096))
    now = SimpleNamespace(seconds=0.0)

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        now.seconds += seconds[len(a)]

    monkeypatch.setattr(flops, "linear", product)
    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    assert best_matmul_rate(repeat=1) == pytest.approx(2048**3 / 64e-3)
