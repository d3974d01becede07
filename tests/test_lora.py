"""Low-rank adapters: new ones change nothing, only they are trained, and PEFT reads the saved files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.export import export_adapters
from hark.grpo.scorer import score
from hark.launch.common.config_file import load_config
from hark.launch.common.policies import lora_of, make_policy, make_reference
from hark.models.loading import load_policy
from hark.models.lora import WithoutAdapters, adapter_delta, is_adapter, read_lora
from hark.models.policy import Lora, PolicyError
from tests.ranks import on_ranks
from tests.runs import ROUNDING, build, largest_difference, read_metrics, train, train_all, weights

LORA = ["lora.rank=4", "lora.alpha=8"]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def logprobs(policy, case) -> torch.Tensor:
    tokens = torch.arange(300, 300 + 3 * 5).reshape(3, 5) % 90 + 100
    return score(policy, case.prompts, tokens, torch.ones(3, 5, dtype=torch.bool), group_size=1)[0]


def randomize_adapters(policy) -> None:
    """Give the adapters nonzero values, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if is_adapter(name):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def adapted(case):
    return load_policy(case.directory, lora=Lora(4, 8.0, TARGETS))


def test_new_adapters_change_nothing_and_only_they_are_trained(case, adapted):
    # Not bit for bit: a frozen tower encodes each clip alone, a trained one all clips in a batch.
    assert (logprobs(adapted, case) - logprobs(case.policy, case)).abs().max() < ROUNDING
    trained = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    assert trained and all(is_adapter(name) for name in trained)
    layers = len(adapted.decoder.layers)
    assert len(trained) == 2 * len(TARGETS) * layers, "the decoder's only; the tower has layers of the same names"
    logprobs(adapted, case).sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapted.model.named_parameters()}
    assert all((gradients[name] is not None) == (name in trained) for name in gradients)
    assert all(gradients[name].any() for name in trained if name.endswith("lora_B"))


def test_an_adapter_adds_its_product_to_the_weight(case, adapted):
    """By hand: the policy with adapters against the plain one with W + alpha / rank * B A."""
    randomize_adapters(adapted)
    for name, parameter in case.policy.model.named_parameters():
        if name.rpartition(".")[0].rpartition(".")[2] in TARGETS and "audio_tower" not in name and "bias" not in name:
            layer = adapted.model.get_submodule(name.removesuffix(".weight"))
            parameter.data += 8.0 / 4 * layer.lora_B.data @ layer.lora_A.data
            assert torch.allclose(adapter_delta(adapted, name), 2 * layer.lora_B.data @ layer.lora_A.data)
    with torch.no_grad():
        assert (logprobs(adapted, case) - logprobs(case.policy, case)).abs().max() < ROUNDING
        assert adapter_delta(adapted, "lm_head.weight") is None


def test_with_adapters_off_the_policy_is_its_own_reference(case, adapted):
    randomize_adapters(adapted)
    with torch.no_grad():
        off = logprobs(WithoutAdapters(adapted), case)
        assert (off - logprobs(case.policy, case)).abs().max() < ROUNDING
        assert not torch.allclose(logprobs(adapted, case), off, atol=1e-3), "they are on again, and matter"


def test_recomputation_and_adapters_give_the_same_gradients(case, adapted):
    again = load_policy(case.directory, lora=Lora(4, 8.0, TARGETS), recompute=True)
    for policy in (adapted, again):
        randomize_adapters(policy)
        logprobs(policy, case).sum().backward()
    for one, two in zip(adapted.parameters(), again.parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, two.grad)


def test_training_moves_only_the_adapters_alike_on_one_and_two_ranks(settings, tmp_path, qwen2_audio_dir):
    runs = {ranks: [*settings, *LORA, f"run.directory={tmp_path}/{ranks}"] for ranks in (1, 2)}
    on_ranks(1, train, runs[1])
    on_ranks(2, train, runs[2])
    assert largest_difference(tmp_path / "1", tmp_path / "2") < ROUNDING
    start, end = load_file(qwen2_audio_dir / "model.safetensors"), weights(tmp_path / "2")
    moved = {name.split(".")[-2] for name in start if not torch.equal(start[name], end[name])}
    assert moved == set(TARGETS), "the merged export differs where adapters are"
    lines = read_metrics(tmp_path / "2")
    assert lines[0]["kl"] == pytest.approx(0, abs=ROUNDING) and lines[-1]["kl"] > 1e-5, "against the adapters off"


def test_the_reference_is_the_policy_itself_only_where_it_is_the_same(settings, tmp_path, causal_lm_dir):
    def run(world: World) -> None:
        for overrides, kind in (([*LORA], WithoutAdapters), ([], None), ([*LORA, "loss.beta=0"], type(None))):
            config = load_config([*settings, *overrides, f"run.directory={tmp_path}/run"])
            reference = make_reference(config, world, make_policy(config, world))
            assert type(reference) is kind if kind else isinstance(reference, torch.nn.Module)
        config = load_config([*settings, *LORA, f"model.reference={causal_lm_dir}", f"run.directory={tmp_path}/run"])
        assert make_reference(config, world, make_policy(config, world)).directory == causal_lm_dir

    on_ranks(1, run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_of_adapters_is_the_run(ranks, settings, tmp_path):
    whole = [*settings, *LORA, f"run.directory={tmp_path}/whole", "optim.steps=4"]
    half = [*settings, *LORA, f"run.directory={tmp_path}/half", "checkpoint.every=2", "optim.steps=2"]
    rest = [*half, "optim.steps=4", "run.resume=true"]
    on_ranks(ranks, train_all, [whole, half, rest])
    a, b = (load_file(tmp_path / name / "adapters" / "adapter_model.safetensors") for name in ("whole", "half"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    saved = tmp_path / "half" / "checkpoints" / "step-000004"
    assert sum(file.stat().st_size for file in saved.glob("weights-*")) < 300_000, (
        "a checkpoint holds the adapters alone"
    )


def test_saved_adapters_are_loaded_and_continued_from(settings, tmp_path, qwen2_audio_dir):
    on_ranks(1, train, [*settings, *LORA, f"run.directory={tmp_path}/first"])
    saved = tmp_path / "first" / "adapters"

    def run(world: World) -> None:
        config = load_config([*settings, f"lora.path={saved}", f"run.directory={tmp_path}/second"])
        trainer = build(world, config)
        lora = trainer.policy.lora
        assert (lora.rank, lora.alpha, lora.path) == (4, 8.0, saved)
        assert len(lora.targets) == len(TARGETS) * len(trainer.policy.decoder.layers)
        export_adapters(trainer.policy, tmp_path / "again", world)
        trainer.step(0)

    on_ranks(1, run)
    weights = saved / "adapter_model.safetensors"
    a, b = (load_file(path) for path in (weights, tmp_path / "again" / weights.name))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    config = load_config([*settings, f"lora.path={saved}", f"run.directory={tmp_path}/third"])
    with pytest.raises(
        ConfigError, match=r"lora.path: .*/adapters is damaged: adapter_model.safetensors does not agree"
    ):
        lora_of(config)
    (saved / "hark.json").unlink()  # by an older version, or changed on purpose
    assert lora_of(config).path == saved


def test_peft_loads_the_adapters_and_computes_the_same(case, adapted, tmp_path):
    import peft

    randomize_adapters(adapted)
    on_ranks(1, lambda world: export_adapters(adapted, tmp_path / "adapters", world))
    model = peft.PeftModel.from_pretrained(case.load_hf(), tmp_path / "adapters")
    for n, prompt in enumerate(case.prompts):
        tokens = torch.tensor([[101, 102, 103]])
        own, _ = score(adapted, [prompt], tokens, torch.ones(1, 3, dtype=torch.bool), group_size=1)
        inputs = case.hf_inputs(n)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[:, -4:-1].clone()
        logits[..., list(adapted.suppressed_ids)] = -torch.inf
        theirs = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        assert (own - theirs).abs().max() < ROUNDING


def test_adapters_that_do_not_fit_are_refused_by_name(case, tmp_path):
    with pytest.raises(PolicyError, match=r"lora.targets: no linear layer is called query; there is .*q_proj"):
        load_policy(case.directory, lora=Lora(4, 8.0, ("query",)))
    with pytest.raises(PolicyError, match="no adapters .*expected adapter_config.json"):
        read_lora(tmp_path)
    policy = load_policy(case.directory, lora=Lora(4, 8.0, ("q_proj",)))
    on_ranks(1, lambda world: export_adapters(policy, tmp_path, world))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(PolicyError, match="use_dora is True; only plain LoRA"):
        read_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "adapter_model.safetensors")
    with pytest.raises(PolicyError, match="is missing"):
        load_policy(case.directory, lora=Lora(4, 8.0, ("q_proj",), tmp_path))
