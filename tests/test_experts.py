"""Mixtures of experts: loaded from directories that store experts one by one, sharded, exported, routers watched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.export import export
from hark.grpo.runtime.sharding import device_mesh, shard
from hark.models.experts import RouterLoad
from hark.models.loading import load_policy
from hark.models.lora import whole
from hark.models.mini import build_mini
from hark.models.policy import PolicyError
from hark.models.stored import StoredTensors
from tests.conftest import TEXTS
from tests.ranks import on_ranks

SIZES = dict(vocabulary=400, hidden=64, layers=2, tower_hidden=64, tower_layers=2)


def build_mixtral(directory: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    build_mini(directory / "tokenizer", TEXTS, vocabulary=320, hidden=64, layers=1, tower_hidden=64, tower_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_omni_moe"])
def directory(request, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    build_mixtral(made) if request.param == "mixtral" else build_mini(made, TEXTS, family=request.param, **SIZES)
    return made


def test_experts_are_stored_one_by_one_and_are_one_tensor_in_the_model(directory):
    stored = [name for name in load_file(directory / "model.safetensors") if ".experts.0." in name]
    assert len(stored) == 3 * 2, "three matrices in each of two layers"
    policy = load_policy(directory)
    hf = type(policy.model).from_pretrained(directory)
    own = dict(policy.model.named_parameters())
    assert any(name.endswith("experts.gate_up_proj") for name in own)
    for name, parameter in hf.named_parameters():
        if name in own:
            assert torch.equal(parameter, own[name]), name


def load_sharded(world: World, directory: Path) -> None:
    policy = load_policy(directory, shard=lambda policy: shard(policy, device_mesh(world)))
    expected = dict(load_policy(directory).model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(whole(parameter), expected[name]), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_loads_its_own_experts(ranks, directory):
    on_ranks(ranks, load_sharded, directory)


def test_a_rank_reads_no_more_than_its_experts(directory, monkeypatch):
    policy = load_policy(directory)
    stored, read = StoredTensors(directory, policy), []
    name = next(name for name in policy.model.state_dict() if name.endswith("experts.gate_up_proj"))
    before = StoredTensors.read_stored
    monkeypatch.setattr(StoredTensors, "read_stored", lambda s, n, part=None: read.append(n) or before(s, n, part))
    part = stored.read(name, (slice(1, 3), slice(0, 20), slice(None)))
    assert torch.equal(part, dict(policy.model.named_parameters())[name][1:3, :20])
    assert sorted({int(n.split("experts.")[1].split(".")[0]) for n in read}) == [1, 2] and len(read) == 4


def export_sharded(world: World, source: Path, target: Path) -> None:
    export(load_policy(source, shard=lambda policy: shard(policy, device_mesh(world))), target, world)


def test_an_export_stores_experts_one_by_one_again_and_what_is_not_loaded_unchanged(directory, tmp_path):
    on_ranks(2, export_sharded, directory, tmp_path / "export")
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "export"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    type(load_policy(directory).model).from_pretrained(tmp_path / "export")


def test_the_routers_load_is_counted_from_all_passes_and_starts_anew(directory):
    policy = load_policy(directory)
    load = RouterLoad(policy.decoder)
    experts = next(m for m in policy.decoder.modules() if type(m).__name__.endswith("Experts"))
    assert load.take() == {}
    hidden, weights = torch.randn(4, 64), torch.ones(4, 2)
    experts(hidden, torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]]), weights)
    count = experts.num_experts
    # Expert 0 got 4 of 8 choices, where an even spread gives each 8 / count; experts 0, 1 and 2 got any.
    assert load.take() == pytest.approx({"router_load": 4 * count / 8, "idle_experts": (count - 3) / count})
    experts(hidden, torch.tensor([[1, 2]] * 4), weights)
    assert load.take()["router_load"] == pytest.approx(4 * count / 8)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_the_thinker_is_trained_inside_a_whole_omni_checkpoint_whose_other_parts_are_exported_unchanged(name, tmp_path):
    thinker, full = tmp_path / "thinker", tmp_path / "full"
    build_mini(thinker, TEXTS, family=name, **SIZES)
    shutil.copytree(thinker, full)
    config = json.loads((thinker / "config.json").read_text())
    (full / "config.json").write_text(json.dumps({"model_type": name, "thinker_config": config}))
    stored = {f"thinker.{key}": value for key, value in load_file(thinker / "model.safetensors").items()}
    other = "token2wav" if name == "qwen2_5_omni" else "code2wav"
    stored |= {"talker.model.layers.0.weight": torch.randn(3, 3).half(), f"{other}.weight": torch.arange(5)}
    save_file(stored, full / "model.safetensors", metadata={"format": "pt"})
    a, b = load_policy(thinker), load_policy(full)
    for (key, parameter), other in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(parameter, other), key
    on_ranks(1, export_sharded, full, tmp_path / "export")
    after = load_file(tmp_path / "export" / "model.safetensors")
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[key], stored[key]) and after[key].dtype == stored[key].dtype for key in stored)


def test_a_surplus_expert_is_named(directory, tmp_path):
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    stored = load_file(copy / "model.safetensors")
    name = next(name for name in stored if ".experts.0." in name)
    stored[name.replace(".experts.0.", ".experts.9.")] = stored[name].clone()
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match=r"experts.* (is \(\d, .*the model has|cannot be made of)"):
        load_policy(copy)
