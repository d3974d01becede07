"""The contract over all audio families, each loaded from a small directory that transformers itself wrote.

The limits are those of `hark check-policy`: 2e-5 for logprobs and 5e-5 for gradients, the rounding of float32 when the
same numbers are added in another order. The differences that occur are below 1e-5.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hark.data.chat import Turn
from hark.data.errors import DataError
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.sharding import device_mesh, shard
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.launch import check_policy
from hark.launch.common.contract import (
    GRADIENTS,
    VALUES,
    Question,
    _draw,
    _largest,
    _native,
    _scored,
    check,
    questions_of,
    verify,
)
from hark.models import loading
from hark.models.families.automatic import AutomaticPolicy
from hark.models.loading import load_policy, read_family
from hark.models.lora import whole
from hark.models.mini import build_mini
from hark.models.mini_families import FAMILIES
from hark.models.policy import Lora, PolicyError
from tests.clips import waveform
from tests.conftest import TEXTS
from tests.ranks import on_ranks

SIZES = dict(vocabulary=400, hidden=64, layers=2, tower_hidden=64, tower_layers=2)
BLOCKS = ("audioflamingo3", "musicflamingo", "voxtral", "glmasr")  # families that cut a clip into windows of 30 s


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name in FAMILIES:
        made[name] = tmp_path_factory.mktemp(name)
        build_mini(made[name], TEXTS, family=name, **SIZES)
    return made


def native_of(policy):
    return type(policy.model).from_pretrained(policy.directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_the_contract(name, directories):
    policy = load_policy(directories[name])
    assert policy.decoder.config.num_attention_heads == 2 * policy.decoder.config.num_key_value_heads, "grouped heads"
    findings = list(check(policy, native_of(policy)))
    assert len(findings) == 10
    assert all(finding.holds for finding in findings), [finding for finding in findings if not finding.holds]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_clip_longer_than_one_window_is_that_of_the_processor(name, directories):
    policy = load_policy(directories[name])
    sound = waveform(31.23, 3)
    prompt = policy.prepare(TEXTS[0], sound)
    question = [Question(TEXTS[0], (sound,), prompt)]
    assert policy.native_inputs(TEXTS[0], sound)["input_ids"][0].tolist() == prompt.ids.tolist()
    rollout = _draw(policy, question)
    expected = _native(policy, native_of(policy), question, rollout)
    assert _largest(_scored(policy, rollout, rollout.prompts), expected, rollout.mask) < VALUES


def test_windows_of_the_decoder_shorter_than_the_prompt_count_positions_in_an_audio_family_too(directories, tmp_path):
    directory = Path(shutil.copytree(directories["audioflamingo3"], tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config["text_config"]["layer_types"] = ["full_attention", "sliding_attention"]
    (directory / "config.json").write_text(json.dumps(config))
    policy = load_policy(directory)
    assert policy.windows == {"full_attention": None, "sliding_attention": 8}
    assert all(finding.holds for finding in check(policy, native_of(policy), gradients=False))


@pytest.mark.parametrize("name", ["qwen2_audio", "audioflamingo3", "qwen2_5_omni", "glmasr"])
def test_the_automatic_policy_keeps_the_contract_too(name, directories):
    with mock.patch.object(loading, "FAMILIES", {}):
        policy = load_policy(directories[name])
    assert isinstance(policy, AutomaticPolicy)
    findings = list(check(policy, native_of(policy)))
    assert all(finding.holds for finding in findings), [finding for finding in findings if not finding.holds]
    verify(policy)


def test_an_automatic_policy_that_does_not_keep_the_contract_is_refused_with_the_table(directories):
    with mock.patch.object(loading, "FAMILIES", {}):
        policy = load_policy(directories["qwen2_audio"])
    embed = policy.embed
    policy.embed = lambda prompts: (1.01 * embed(prompts)[0], embed(prompts)[1])
    with pytest.raises(
        PolicyError, match="does not keep the contract:(.|\n)*FAILS a row of branches = separate forwards"
    ):
        verify(policy)


def test_turns_of_a_conversation_and_marks_of_clips_reach_the_prompt(directories):
    policy = load_policy(directories["qwen2_audio"])
    turns = [Turn("system", "Be brief."), Turn("user", "Is it <audio> or <audio>?")]
    first, second = waveform(0.4, 0), waveform(0.8, 1)
    prompt = policy.prepare(turns, first, second)
    text = policy.tokenizer.decode([int(i) for i in prompt.ids if i != policy.audio_id])
    assert text.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it <|audio_bos|><|audio_eos|> or "
    )
    runs = "".join("a" if i == policy.audio_id else "." for i in prompt.ids.tolist()).split(".")
    assert [len(run) for run in runs if run] == [clip.tokens for clip in prompt.clips] == [10, 20]
    with pytest.raises(DataError, match="2 marks <audio> in the texts for 1 clips"):
        policy.prepare(turns, first)


@pytest.mark.parametrize("name", ["qwen2_audio", "qwen2_5_omni", "granite_speech"])
def test_a_frozen_tower_with_a_cache_and_adapters_on_every_part_change_nothing_at_first(name, directories):
    plain = load_policy(directories[name])
    questions = questions_of(plain)
    rollout = _draw(plain, questions)
    expected = _scored(plain, rollout, rollout.prompts)
    tower = {"qwen2_audio": "tower.q_proj", "qwen2_5_omni": "tower.q_proj", "granite_speech": "tower.to_q"}[name]
    projector = {"qwen2_5_omni": "projector.proj"}.get(name, "projector.linear")
    for other in (
        load_policy(directories[name], train="no-tower", tower_cache=2**20),
        load_policy(directories[name], lora=Lora(2, 4.0, ("all-linear", tower, projector))),
    ):
        assert _largest(_scored(other, rollout, rollout.prompts), expected, rollout.mask) < VALUES
        _scored(other, rollout, rollout.prompts, backward=True)
    adapted = {
        n.rpartition(".")[0] for n, p in other.model.named_parameters() if p.requires_grad and p.grad is not None
    }
    in_tower = [n for n in adapted if n.startswith(other.tower_name)]
    in_projector = [n for n in adapted if any(n.startswith(p) for p in other.projector_names)]
    assert len(in_tower) >= 2 and in_projector and len(adapted) > 14


@pytest.mark.parametrize("name", ["qwen2_audio", "qwen2_5_omni"])
def test_training_the_projector_alone_gives_gradients_to_it_alone(name, directories):
    policy = load_policy(directories[name], train="projector")
    rollout = _draw(policy, questions_of(policy))
    _scored(policy, rollout, rollout.prompts, backward=True)
    with_gradient = {n for n, p in policy.model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in policy.model.named_parameters() if n.startswith(policy.projector_names)}


def compare_gradients(world: World, directories: dict[str, Path], lora: Lora | None) -> None:
    """Each rank scores one of two prompts; the summed gradients against those of one process that scores both."""
    for name, directory in directories.items():
        alone = load_policy(directory, lora=lora)
        sharded = load_policy(directory, lora=lora, shard=partial(shard, mesh=device_mesh(world)))
        rollout = _draw(alone, questions_of(alone))
        weights = torch.linspace(-1.0, 2.0, rollout.mask.numel()).reshape(rollout.mask.shape) * rollout.mask
        logprobs, _ = score(alone, rollout.prompts, rollout.tokens, rollout.mask, group_size=3)
        (logprobs * weights).sum().backward()
        part = rollout.select([world.rank])
        logprobs, _ = score(sharded, part.prompts, part.tokens, part.mask, group_size=3)
        (logprobs * weights[rollout.rows([world.rank]), : logprobs.shape[1]]).sum().backward()
        largest = max(parameter.grad.abs().max() for parameter in alone.parameters() if parameter.grad is not None)
        for (key, expected), own in zip(alone.model.named_parameters(), sharded.model.parameters(), strict=True):
            assert (expected.grad is None) == (own.grad is None), (name, key)
            if own.grad is not None:
                assert (whole(own.grad) - expected.grad).abs().max() < GRADIENTS * largest, (name, key)


@pytest.mark.parametrize("lora", [None, Lora(2, 4.0, ("all-linear",))], ids=["all", "adapters"])
def test_two_ranks_sum_the_gradients_of_one_process(lora, directories):
    on_ranks(2, compare_gradients, directories, lora)


def test_a_chat_template_that_leaves_the_clip_out_is_refused(directories, tmp_path):
    directory = Path(shutil.copytree(directories["qwen2_audio"], tmp_path / "model"))
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|AUDIO|>", ""))
    with pytest.raises(PolicyError, match=r"chat template writes 0 audio placeholders \(<\|AUDIO\|>\) for a clip"):
        load_policy(directory)
    directory = Path(shutil.copytree(directories["audioflamingo3"], tmp_path / "other"))
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(PolicyError, match="its chat template cannot be used"):
        load_policy(directory)


def test_a_processor_whose_placeholders_are_not_as_many_as_embeddings_is_an_error(directories):
    policy = load_policy(directories["qwen2_audio"])
    prompt = policy.prepare(TEXTS[0], waveform(0.5, 0))
    short = type(prompt)(prompt.ids[prompt.ids != policy.audio_id], prompt.clips)
    with pytest.raises(PolicyError, match="0 audio placeholders for 12 audio embeddings"):
        sample(policy, [short], group_size=1, max_new_tokens=2, temperature=0.0)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("vibevoice_asr", "draws random latents"),
        ("nemotron_h_omni", "Mamba layers"),
        ("inkling_mm_model", "convolve neighbouring tokens"),
        ("doge", "a mask of their own"),
        ("voxtral_realtime", "not part of the prompt"),
    ],
)
def test_families_that_cannot_share_a_row_are_refused_by_name_with_the_reason(kind, reason, directories, tmp_path):
    directory = Path(shutil.copytree(directories["qwen2_audio"], tmp_path / "model"))
    (directory / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(PolicyError, match=f"no policy for model type '{kind}': .*{reason}"):
        read_family(directory)


OWN = '''
from hark.models.families.qwen2_audio import Qwen2AudioPolicy

class Mine(Qwen2AudioPolicy):
    """A policy of one's own."""

class Louder(Mine):
    def project(self, hidden):
        return 1.1 * super().project(hidden)

nothing = 3
'''


def test_a_policy_of_ones_own_is_used_and_checked(directories, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    directory = directories["qwen2_audio"]
    assert type(load_policy(directory, own=f"{file}:Mine")).__name__ == "Mine"
    check_policy.main([str(directory), "--policy", f"{file}:Mine"])
    said = capsys.readouterr().out
    assert "as Mine" in said and said.count("\nok ") == 10
    with pytest.raises(SystemExit) as stopped:
        check_policy.main([str(directory), "--policy", f"{file}:Louder", "--without-gradients"])
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and "FAILS a row of branches" in said and "gradients" not in said
    with pytest.raises(PolicyError, match="nothing: is no class derived from"):
        load_policy(directory, own=f"{file}:nothing")


def test_a_placeholder_outside_the_vocabulary_needs_no_embedding(directories, tmp_path):
    """As in the published Granite Speech, whose placeholder is the first id after its vocabulary."""
    directory = Path(shutil.copytree(directories["granite_speech"], tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    size = len(tokenizer)
    tokenizer.add_tokens(["<|clip|>"], special_tokens=True)
    tokenizer.save_pretrained(directory)
    for path in [
        directory / "processor_config.json",
        directory / "chat_template.jinja",
        directory / "tokenizer_config.json",
    ]:
        path.write_text(path.read_text().replace("<|audio|>", "<|clip|>"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"audio_token_index": size}))
    policy = load_policy(directory)
    assert policy.audio_id == size and policy.suppressed_ids == ()
    prompt = policy.prepare(TEXTS[0], waveform(0.5, 0))
    assert int((prompt.ids == size).sum()) == prompt.clips[0].tokens
    tokens, mask = torch.tensor([[70, 71]]), torch.ones(1, 2, dtype=torch.bool)
    assert score(policy, [prompt], tokens, mask, group_size=1)[0].isfinite().all()


def test_a_placeholder_that_pads_a_batch_is_no_clip(directories, monkeypatch):
    """As in a tokenizer whose padding token is the placeholder."""
    policy = load_policy(directories["glmasr"])
    monkeypatch.setattr(type(policy), "pad_id", property(lambda self: self.audio_id))
    prompts = [question.prompt for question in questions_of(policy)]
    together, lengths = policy.embed(prompts)
    assert lengths[0] != lengths[1]
    for row, prompt, length in zip(together, prompts, lengths, strict=True):
        torch.testing.assert_close(row[:length], policy.embed([prompt])[0][0], atol=1e-5, rtol=1e-5)


def test_adapters_beside_the_weights_are_not_left_out_silently(directories, tmp_path):
    directory = Path(shutil.copytree(directories["granite_speech"], tmp_path / "model"))
    (directory / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(PolicyError, match="holds adapters beside its weights.*set lora.path"):
        load_policy(directory)


def test_clips_shorter_and_longer_than_a_tower_takes_are_named(directories):
    for name in FAMILIES:
        policy = load_policy(directories[name])
        if policy.shortest:
            with pytest.raises(DataError, match="a clip of .* samples; this tower takes"):
                policy.prepare("What?", np.ones(round(policy.shortest * 16_000) - 1, np.float32))
        shortest = np.ones(max(round(policy.shortest * 16_000), 1600), np.float32)
        assert policy.prepare("What?", shortest).clips[0].tokens >= 1
        with pytest.raises(DataError, match="this tower takes"):
            policy.prepare("What?", np.ones(round(policy.longest * 16_000) + 1, np.float32))
