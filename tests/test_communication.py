"""The formula of a step's communication against what FSDP sends on two and four ranks, without a tolerance."""

from __future__ import annotations

import time

import torch

from hark.grpo.instruments.communication import step_bytes
from hark.grpo.runtime.collectives import GIB, CollectiveMeter, World
from hark.launch.common.config_file import load_config
from tests.ranks import on_ranks
from tests.runs import build, read_metrics, train

KEEP = "rollout.keep_prefill=true"
SPLIT = "optim.micro_branches=2"  # of four
CASES = (
    [],
    ["sharding.reshard=false", "optim.micro_batch=1", "model.recompute=true"],
    ["model.dtype=bfloat16", "model.train=no-tower", "loss.beta=0", "loss.inner_epochs=2"],
    ["lora.rank=3", "optim.micro_batch=1"],  # a first dimension that two ranks do not divide
    ["lora.rank=3", "optim.micro_batch=1", "sharding.reshard=false"],
    [KEEP, "optim.micro_batch=1"],
    [KEEP, "optim.micro_batch=1", "sharding.reshard=false", "loss.beta=0"],
    [KEEP, "model.dtype=bfloat16", "model.train=no-tower", "loss.beta=0", "loss.inner_epochs=2"],
    [KEEP, "lora.rank=3", "optim.micro_batch=1"],
    [SPLIT, "optim.micro_batch=1"],
    [SPLIT, "optim.micro_batch=1", "sharding.reshard=false"],
    [SPLIT, KEEP, "loss.inner_epochs=2", "loss.beta=0"],
)
HYBRID = (["sharding.replicas=2", "optim.micro_batch=1", "optim.prompts_per_step=8"],)  # two micro-batches on a rank


def check_bytes(world: World, settings: list[str]) -> None:
    for case in CASES if world.size == 2 else HYBRID:
        config = load_config([*settings, *case])
        trainer = build(world, config)
        foreseen = step_bytes(
            trainer.policy,
            trainer.reference.policy,
            shards=world.size // config.sharding.replicas,
            replicas=config.sharding.replicas,
            dtype=getattr(torch, config.model.dtype),
            reshard=config.sharding.reshard,
            micro_batches=config.optim.prompts_per_step // world.size // config.optim.micro_batch,
            inner_epochs=config.loss.inner_epochs,
            keep_prefill=config.rollout.keep_prefill,
            parts=len(range(0, config.rollout.group_size, config.optim.micro_branches or config.rollout.group_size)),
        )
        for step in range(2):  # the second must not find what the first has gathered
            began = time.perf_counter()
            world.meter.start()
            trainer.step(step)
            measured = world.meter.measured()
            assert 0 < measured["seconds/communication"] < time.perf_counter() - began
            assert measured["communication/gib"] == foreseen / GIB, (case, step)


def test_a_step_sends_what_the_formula_says_to_the_byte(settings, tmp_path):
    for ranks in (2, 4):
        on_ranks(ranks, check_bytes, [*settings, f"run.directory={tmp_path}/run"])


def test_a_process_alone_sends_nothing(settings, tmp_path):
    on_ranks(1, train, [*settings, f"run.directory={tmp_path}/run", "optim.steps=1"])
    (line,) = read_metrics(tmp_path / "run")
    assert line["communication/gib"] == 0
    assert 0 <= line["seconds/communication"] < line["seconds/step"]


def test_time_in_two_collectives_at_once_counts_once(monkeypatch):
    meter = CollectiveMeter(torch.device("cpu"))
    clock = iter([0.0, 1.0, 2.0, 4.0, 5.0, 7.0, 8.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter.start()
    with meter.measure(GIB // 2), meter.measure(GIB // 2):  # 1 to 5, and 2 to 4 inside
        pass
    with meter.measure():  # 7 to 8
        pass
    assert meter.measured() == {"seconds/communication": 5.0, "communication/gib": 1.0}
