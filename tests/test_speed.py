"""The time of a step by its formula, worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hark.grpo.instruments import speed
from hark.grpo.instruments.flops import Macs
from hark.grpo.instruments.memory import Setting, Work
from hark.grpo.instruments.shape import Shape, Tower
from hark.grpo.instruments.speed import LAUNCHES, OVERHEAD, Counts, Rates, measured, step_seconds

SHAPE = Shape(
    layers=3, hidden=4, inner=8, heads=2, kv_heads=1, head_size=2, vocabulary=10, tied=True, layer=100, root=50,
    adapters=20, tower=Tower(layers=2, width=4, inner=8, heads=2, layer=60, rest=30),
)  # fmt: skip
WORK = Work(prompts=4, micro_batch=2, prompt=12, frames=16, group_size=3, max_new_tokens=5)
SETTING = Setting(shards=1, dtype=4, master=4)
PASSES = Macs(rollout=1000, reference=1200, forward=1200, backward=2400, prompts=600)
PAIRS = Macs(rollout=100, reference=200, forward=200, backward=400, prompts=50)
NONE = Rates(products=math.inf, attention=math.inf, memory=math.inf, launch=0.0, link=math.inf)
PRODUCTS = replace(NONE, products=OVERHEAD * 10.0, attention=OVERHEAD * 10.0)
ATTENTION = replace(NONE, attention=OVERHEAD * 10.0)
MEMORY = replace(NONE, memory=OVERHEAD * 10.0)
HOST = replace(NONE, launch=1.0)


def seconds(rates: Rates, setting: Setting = SETTING, work: Work = WORK, **others) -> dict[str, float]:
    return step_seconds(SHAPE, work, setting, PASSES, PAIRS, rates, trained=400, **others)


def test_where_only_products_take_time_it_is_that_of_the_multiply_adds():
    """The decode steps' part of attention is in the bytes that they read."""
    expected = {"rollout": 95.0, "reference": 120.0, "backward": 360.0, "optimizer": 0.0}
    assert seconds(PRODUCTS) == pytest.approx(expected)
    of_attention = {"rollout": 5.0, "reference": 20.0, "backward": 60.0, "optimizer": 0.0}
    assert seconds(ATTENTION) == pytest.approx(of_attention)
    frozen = step_seconds(SHAPE, WORK, SETTING, replace(PASSES, tower=70), PAIRS, PRODUCTS, trained=400)
    assert frozen == pytest.approx(expected | {"rollout": 95.0 + 7.0})
    assert seconds(PRODUCTS, updates=2)["backward"] == pytest.approx(720.0)
    again = replace(SETTING, recompute=True)
    assert seconds(PRODUCTS, again)["backward"] == pytest.approx(480.0)
    kept = replace(SETTING, keep_prefill=True, reference="none")
    assert seconds(PRODUCTS, kept, updates=2) == pytest.approx({"rollout": 95.0, "backward": 660.0, "optimizer": 0.0})


def test_where_only_memory_takes_time_a_decode_step_reads_weights_and_keys():
    """Three layers of 100 weights and a head of 10 by 4; keys and values of three layers with one head of two."""
    prompts = 2 * (3 * SHAPE.saved(4) * 4 * 12 + 2 * SHAPE.tower.saved(4, 16, 4))
    keys = 2 * 3 * 1 * 2 * 4 * (4 * 12 + 12 * 4 / 2)
    step = 4 * (300 + 40) + keys + 40 * 12 * 10
    assert seconds(MEMORY)["rollout"] == pytest.approx((prompts + 4 * step) / 10)
    assert seconds(MEMORY)["optimizer"] == pytest.approx(9 * 4 * 400 / 10)
    row = 2 * (3 * SHAPE.saved(4) * 4 * (12 + 3 * 4) + 2 * SHAPE.tower.saved(4, 16, 4))
    head = 6 * 4 * 10 * 4 * 3 * 5
    assert seconds(MEMORY)["reference"] == pytest.approx((row + head) / 10)
    assert seconds(MEMORY)["backward"] == pytest.approx((row + head + 2 * row + head) / 10)


def test_the_host_launches_each_part_of_each_micro_batch():
    """Two micro-batches; of groups of three in parts of two there are two parts. A frozen tower is in the rollout."""
    layers = 5 * LAUNCHES
    assert seconds(HOST)["reference"] == 2 * layers and seconds(HOST)["backward"] == 6 * layers
    assert seconds(HOST)["rollout"] == layers + 4 * 3 * LAUNCHES
    assert seconds(HOST, work=replace(WORK, micro_branches=2))["reference"] == 4 * layers
    frozen = seconds(HOST, replace(SETTING, train="no-tower"))
    assert frozen["reference"] == 2 * 3 * LAUNCHES and frozen["rollout"] == layers + 4 * 3 * LAUNCHES


def test_a_gpu_computes_while_its_host_launches_and_a_cpu_does_not():
    both = Rates(products=2.0, attention=1.0, memory=4.0, launch=1 / LAUNCHES, link=math.inf)
    device = OVERHEAD * (20 / 2 + 3 / 1 + 8 / 4)
    assert both.seconds(Counts(20, 3), 8, 5) == pytest.approx(device)
    assert both.seconds(Counts(20, 3), 8, 50) == pytest.approx(50.0)
    assert replace(both, overlaps=False).seconds(Counts(20, 3), 8, 5) == pytest.approx(device + 5)


def test_a_decode_step_of_many_rows_is_bound_by_products_and_one_of_few_by_reading_weights():
    slow = replace(PRODUCTS, memory=1e9)
    assert seconds(slow)["rollout"] == pytest.approx(seconds(PRODUCTS)["rollout"], rel=1e-4)
    assert seconds(replace(MEMORY, products=1e9))["rollout"] == pytest.approx(seconds(MEMORY)["rollout"])


def test_collectives_are_hidden_by_the_passes_and_those_of_the_rollout_are_not():
    rates = replace(PRODUCTS, link=2.0)
    assert seconds(rates, gathered=60, received=60 + 900)["communication"] == pytest.approx(30.0)
    assert seconds(rates, gathered=60, received=60 + 1000)["communication"] == pytest.approx(30.0 + 500 - 480)


def test_the_rates_of_this_machine_are_those_of_its_layers(monkeypatch):
    monkeypatch.setattr(speed, "STREAMED", 2**12)
    rates = measured(torch.device("cpu"), torch.float32, SHAPE, 7, 3)
    assert 0 < rates.launch < 1e-3 and min(rates.memory, rates.products, rates.attention) > 1e3
    assert not rates.overlaps and rates.link == math.inf
