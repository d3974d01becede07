"""Weights may be sharded, replicated, kept in host memory or left whole: the update is that of one process."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import TIMEOUT, World
from hark.grpo.runtime.sharding import device_mesh
from hark.launch.common.config_file import load_config
from tests.ranks import on_ranks
from tests.runs import ROUNDING, build, largest_difference, read_metrics, train, train_all, weights

FROZEN = "model.train=no-tower"


@pytest.fixture
def alone(settings, tmp_path):
    """The run of one process that the others are held against."""
    on_ranks(1, train, [*settings, f"run.directory={tmp_path}/alone"])
    return tmp_path / "alone"


@pytest.mark.slow
def test_four_ranks_hybrid_with_adapters_or_resuming_what_two_began_are_one_process(settings, tmp_path, alone):
    """One start of four ranks for all three, because a start takes longer than the runs."""
    lora = [*settings, "lora.rank=4", "lora.alpha=8"]
    half = [*settings, f"run.directory={tmp_path}/resumed", "checkpoint.every=2", "optim.steps=2"]
    # Several micro-batches, of which the last reduces gradients between replicas, and right answers after them.
    hybrid = [*settings, "sharding.replicas=2", "optim.micro_batch=1"]
    answers = "loss.sft=0.5"
    on_ranks(1, train, [*lora, f"run.directory={tmp_path}/lora1"])
    on_ranks(1, train, [*settings, answers, f"run.directory={tmp_path}/answers1"])
    more = [[*hybrid, f"run.directory={tmp_path}/hybrid2"], [*hybrid, answers, f"run.directory={tmp_path}/answers2"]]
    on_ranks(2, train_all, [half, *more])
    on_ranks(4, check_mesh_and_train, [
        [*hybrid, f"run.directory={tmp_path}/hybrid4"],
        [*lora, "sharding.replicas=2", f"run.directory={tmp_path}/lora4"],
        [*half, "optim.steps=3", "run.resume=true"],
    ])  # fmt: skip
    for name in ("hybrid2", "hybrid4", "resumed"):
        assert largest_difference(alone, tmp_path / name) < ROUNDING, name
    assert largest_difference(tmp_path / "lora1", tmp_path / "lora4") < ROUNDING
    assert largest_difference(tmp_path / "answers1", tmp_path / "answers2") < ROUNDING
    # The norm of a replicated gradient must count each entry once.
    norms = [[line["grad_norm"] for line in read_metrics(path)] for path in (alone, tmp_path / "hybrid4")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def check_mesh_and_train(world: World, runs: list[list[str]]) -> None:
    mesh = device_mesh(world, replicas=2)
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]] and mesh.mesh_dim_names == ("replicate", "shard")
    assert device_mesh(world, replicas=4).mesh.tolist() == [[0], [1], [2], [3]]
    for name in mesh.mesh_dim_names:
        assert mesh.get_group(name)._get_backend(world.device).options._timeout == TIMEOUT, name
    train_all(world, runs)


def test_replicas_must_divide_the_ranks():
    def run(world: World) -> None:
        with pytest.raises(ConfigError, match="sharding.replicas is 2; it must divide the number of processes, 1"):
            device_mesh(world, replicas=2)

    on_ranks(1, run)


def test_weights_in_host_memory_make_the_same_update(settings, tmp_path, alone):
    offload = [f"run.directory={tmp_path}/offload", "sharding.offload=true", "sharding.offload_reference=true"]
    on_ranks(2, train, [*settings, *offload])
    assert largest_difference(alone, tmp_path / "offload") < ROUNDING


def check_places(world: World, settings: list[str]) -> None:
    """Frozen weights stand whole where they must not or need not be gathered, and in the compute dtype."""
    for overrides, whole in (([], "nothing"), ([FROZEN], "audio_tower")):
        trainer = build(world, load_config([*settings, *overrides]))
        for step in range(2):  # and again after a step, which must have freed what it gathered
            for policy in (trainer.policy, trainer.reference.policy):
                for name, parameter in policy.model.named_parameters():
                    kept = whole in name or (world.size == 1 and not parameter.requires_grad)
                    assert isinstance(parameter, DTensor) != kept, name
                    assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
            trainer.step(step)


def test_one_process_in_float32_uses_its_weights_as_they_are(settings, tmp_path):
    def run(world: World) -> None:
        for offload in (False, True):
            trainer = build(
                world, load_config([*settings, f"run.directory={tmp_path}/run", f"sharding.offload={offload}"])
            )
            for policy in (trainer.policy, trainer.reference.policy):
                trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
                assert all(isinstance(parameter, DTensor) == offload for parameter in trained)

    on_ranks(1, run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_frozen_tower_stands_whole_and_a_trained_one_is_sharded(ranks, settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "model.dtype=bfloat16"]
    on_ranks(ranks, check_places, run)


def test_what_a_frozen_tower_has_heard_is_heard_once_and_changes_nothing(settings, tmp_path):
    """With room for all clips and for none; ranks hit and miss at different times."""
    run = [*settings, FROZEN, "optim.steps=8"]  # 32 prompts of 12 clips
    runs = [[*run, f"run.directory={tmp_path}/{room}", f"model.tower_cache={room}"] for room in (0, 1024)]
    on_ranks(2, train_all, runs)
    a, b = weights(tmp_path / "0"), weights(tmp_path / "1024")
    assert all(torch.equal(a[name], b[name]) for name in a), "a clip is heard alone, so bit for bit"

    heard = []

    def count(world: World) -> None:
        trainer = build(world, load_config([*run, f"run.directory={tmp_path}/count"]))
        first = trainer.policy.tower.layers[0]
        first.register_forward_pre_hook(lambda layer, inputs: heard.append((len(inputs[0]), float(inputs[0].sum()))))
        for step in range(8):
            trainer.step(step)

    on_ranks(1, count)
    assert len(heard) == len(set(heard)) == 12, "once per clip, in rollout, reference, scoring and later epochs"
    assert {clips for clips, _ in heard} == {1}, "alone"


def test_pure_bfloat16_trains_in_bfloat16(settings, tmp_path):
    config = load_config(
        [*settings, f"run.directory={tmp_path}/run", "model.dtype=bfloat16", "model.master_dtype=bfloat16"]
    )

    def run(world: World) -> None:
        trainer = build(world, config)
        trained = [parameter for parameter in trainer.policy.parameters() if parameter.requires_grad]
        before = [parameter.full_tensor().clone() for parameter in trained]
        trainer.step(0)
        states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
        assert {tensor.dtype for tensor in (*trained, *states)} == {torch.bfloat16}
        assert any(not torch.equal(b, a.full_tensor()) for b, a in zip(before, trained, strict=True))

    on_ranks(1, run)
