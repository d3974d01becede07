"""Loading checkpoints, the mini model, and which models a policy can be made of."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hark.data.errors import DataError
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.export import export
from hark.grpo.runtime.sharding import device_mesh, shard
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.models.loading import load_policy
from hark.models.lora import whole
from hark.models.mini import build_mini
from hark.models.policy import PolicyError
from hark.models.whisper import audio_tokens
from tests.clips import waveform
from tests.conftest import TEXTS, build_causal_lm
from tests.ranks import on_ranks


@pytest.fixture
def copy(qwen2_audio_dir, tmp_path) -> Path:
    return Path(shutil.copytree(qwen2_audio_dir, tmp_path / "copy"))


def edit_weights(directory: Path, change) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def test_every_parameter_is_the_stored_one_also_from_several_files(case, tmp_path):
    hf = case.load_hf()
    hf.save_pretrained(tmp_path / "split", max_shard_size="100KB")
    case.policy.tokenizer.save_pretrained(tmp_path / "split")
    if case.name == "qwen2_audio":
        case.policy.processor.save_pretrained(tmp_path / "split")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    policy = load_policy(tmp_path / "split")
    expected = dict(hf.named_parameters())
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.dtype == torch.float32


def test_tied_embeddings_stay_one_tensor(causal_lm_dir):
    policy = load_policy(causal_lm_dir)
    assert policy.model.config.tie_word_embeddings
    assert policy.model.get_output_embeddings().weight is policy.decoder.get_input_embeddings().weight


def test_bfloat16_files_become_float32_weights(copy):
    stored = load_file(copy / "model.safetensors")
    edit_weights(copy, lambda state: state.update({name: value.bfloat16() for name, value in stored.items()}))
    policy = load_policy(copy)
    name = "model.language_model.norm.weight"
    assert dict(policy.model.named_parameters())[name].dtype == torch.float32
    assert policy.decoder.rotary_emb.inv_freq.dtype == torch.float32


def test_missing_surplus_and_misshapen_tensors_are_named(copy):
    def change(state):
        state.pop("audio_tower.conv1.bias")
        state["language_model.model.norm.weight"] = torch.ones(7)
        state["stranger"] = torch.ones(1)

    edit_weights(copy, change)
    with pytest.raises(PolicyError) as error:
        load_policy(copy)
    for part in ("audio_tower.conv1.bias is missing", "(7,), the model has (64,)", "stranger is not part"):
        assert part in str(error.value)


def test_a_directory_that_is_no_checkpoint_says_so(tmp_path, copy):
    with pytest.raises(PolicyError, match="no such directory"):
        load_policy(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolicyError, match=r"config.json is missing"):
        load_policy(tmp_path / "empty")
    (copy / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match="neither model.safetensors nor"):
        load_policy(copy)


def test_a_model_with_layers_that_take_no_mask_is_refused_by_name(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "wav2vec2"}))
    with pytest.raises(PolicyError, match="no policy for model type 'wav2vec2'"):
        load_policy(copy)
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=320)).save_pretrained(copy)
    with pytest.raises(PolicyError, match="MambaForCausalLM has .*tree mask"):
        load_policy(copy)


def build_mixed_windows(directory: Path) -> None:
    """A small Qwen2 whose first layer has full attention and whose second a window of 8."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    build_causal_lm(directory)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
    config = Qwen2Config(
        **sizes, num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1,
        initializer_range=0.15, bos_token_id=None,
    )  # fmt: skip
    assert config.layer_types == ["full_attention", "sliding_attention"]
    Qwen2ForCausalLM(config).save_pretrained(directory)


@pytest.mark.parametrize("build", [partial(build_causal_lm, sliding_window=8), build_mixed_windows])
def test_sliding_windows_count_positions_not_columns_of_the_row(build, tmp_path):
    """A branch may be far behind its prompt in the row; a window of 8 counts positions, as in a sequence of its own."""
    build(tmp_path)
    policy = load_policy(tmp_path)
    prompts = [policy.prepare(TEXTS[1])]
    assert len(prompts[0].ids) > 8
    rollout = sample(policy, prompts, group_size=4, max_new_tokens=12, temperature=1.0, keys=[(0, 0, 0)])
    scored, _ = score(policy, prompts, rollout.tokens, rollout.mask, group_size=4)
    torch.testing.assert_close(rollout.logprobs, scored.detach(), atol=1e-5, rtol=1e-5)

    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for row, mask in zip(rollout.tokens, rollout.mask, strict=True):
        ids = torch.cat([prompts[0].ids, row[mask]])
        expected = hf(input_ids=ids[None]).logits[0, len(prompts[0].ids) - 1 : -1].log_softmax(-1)
        mine = scored[(rollout.tokens == row).all(1)][0][mask]
        torch.testing.assert_close(mine, expected.gather(-1, row[mask][:, None]).squeeze(-1), atol=1e-5, rtol=1e-5)


def build_scaled(directory: Path, name: str) -> None:
    """A small model of another family; some scale or cap their logits behind the head."""
    import transformers

    build_causal_lm(directory)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, head_dim=16, initializer_range=0.15)
    if name == "Granite":
        config.logits_scaling = 3.0
    if name == "Gemma3":
        config.final_logit_softcapping = 3.0
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(directory)


@pytest.mark.parametrize("name", ["Granite", "Cohere", "Gemma3", "Qwen3", "Llama"])
def test_logits_are_scaled_as_the_family_scales_them(name, tmp_path):
    from transformers import AutoModelForCausalLM

    build_scaled(tmp_path, name)
    policy = load_policy(tmp_path)
    prompt = policy.prepare(TEXTS[1])
    tokens, mask = torch.tensor([[70, 71, 72]]), torch.ones(1, 3, dtype=torch.bool)
    scored, _ = score(policy, [prompt], tokens, mask, group_size=1)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    logits = hf(input_ids=torch.cat([prompt.ids, tokens[0]])[None]).logits[0, len(prompt.ids) - 1 : -1]
    torch.testing.assert_close(scored, logits.log_softmax(-1).gather(-1, tokens.T).T, atol=1e-5, rtol=1e-5)


def test_special_tokens_inside_a_completion_stay_visible_to_rewards(qwen2_audio_dir):
    policy = load_policy(qwen2_audio_dir)
    ids = policy.tokenizer("<answer>a</answer><|im_start|><|im_end|>")["input_ids"]
    texts = policy.completion_texts(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
    assert texts == ["<answer>a</answer><|im_start|>"]


def test_the_frames_of_a_clip_decide_its_placeholders(qwen2_audio_dir):
    policy = load_policy(qwen2_audio_dir)
    for seconds, expected in ((10, 250), (30, 750), (0.03, 1), (1.03, 26)):
        prompt = policy.prepare("What?", waveform(seconds, 0))
        assert (prompt.ids == policy.audio_id).sum() == expected == audio_tokens(prompt.clips[0].frames)
    with pytest.raises(DataError, match="no audio_path"):
        policy.prepare("What?")


def test_the_limits_of_a_clip_that_the_message_gives_are_the_limits_applied(qwen2_audio_dir):
    policy = load_policy(qwen2_audio_dir)

    def prepare(samples: int):
        return policy.prepare("What?", np.ones(samples, dtype=np.float32))

    message = r"takes (\d+) to (\d+) samples, 0.0201 s to 30 s at 16000 Hz"
    for samples in (160, 481_600):
        with pytest.raises(DataError, match=message) as error:
            prepare(samples)
        least, most = map(int, re.search(message, str(error.value)).groups())
        assert [int((prepare(limit).ids == policy.audio_id).sum()) for limit in (least, most)] == [1, 750]
        for beyond in (least - 1, most + 1):
            with pytest.raises(DataError, match=f"a clip of {beyond} samples"):
                prepare(beyond)


def test_a_text_policy_refuses_audio(causal_lm_dir):
    with pytest.raises(DataError, match="reads text only"):
        load_policy(causal_lm_dir).prepare("What?", waveform(1, 0))


def test_a_placeholder_that_a_user_writes_is_refused(qwen2_audio_dir):
    with pytest.raises(DataError, match="2 audio placeholders"):
        load_policy(qwen2_audio_dir).prepare("What is <|AUDIO|>?", waveform(1, 0))


def test_freezing_the_tower_leaves_it_without_gradients_and_the_rest_with_the_same(qwen2_audio_dir):
    gradients = []
    for part in ("all", "no-tower"):
        policy = load_policy(qwen2_audio_dir, train=part)
        prompts = [policy.prepare(TEXTS[0], waveform(0.5, 0))]
        tokens, mask = torch.tensor([[70, 71, 72]]), torch.ones(1, 3, dtype=torch.bool)
        score(policy, prompts, tokens, mask, group_size=1)[0].sum().backward()
        gradients.append({name: p.grad for name, p in policy.model.named_parameters()})
    trained, frozen = gradients
    assert all(frozen[name] is None for name in frozen if "audio_tower" in name)
    for name in frozen:
        if "audio_tower" not in name:
            assert torch.equal(frozen[name], trained[name]), name


def export_sharded(world: World, source: Path, target: Path) -> None:
    policy = load_policy(source, shard=lambda policy: shard(policy, device_mesh(world)))
    export(policy, target, world)


def test_an_export_from_two_ranks_is_the_checkpoint_it_was_loaded_from(case, tmp_path):
    on_ranks(2, export_sharded, case.directory, tmp_path / "export")
    before, after = (load_file(path / "model.safetensors") for path in (case.directory, tmp_path / "export"))
    assert before.keys() == after.keys(), "the hub's names"
    assert all(torch.equal(before[name], after[name]) for name in before)
    kind = type(case.load_hf())
    kind.from_pretrained(tmp_path / "export")
    load_policy(tmp_path / "export")


def test_weights_are_not_the_file_they_were_read_from(case, tmp_path):
    """safetensors maps files into memory; later writes to a file must not change a policy."""
    directory = shutil.copytree(case.directory, tmp_path / "copy")

    def run(world: World) -> None:
        plain, sharded = load_policy(directory), load_policy(directory, shard=lambda p: shard(p, device_mesh(world)))
        file = directory / "model.safetensors"
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size // 4)
            opened.write(b"\x7f" * (file.stat().st_size // 2))
        for policy in (plain, sharded):
            for name, parameter in policy.model.named_parameters():
                assert torch.equal(whole(parameter), case.policy.model.get_parameter(name)), name

    on_ranks(1, run)


def test_mini_is_a_function_of_its_seed_and_spells_any_text(tmp_path):
    sizes = dict(vocabulary=320, hidden=64, layers=1, tower_hidden=64, tower_layers=1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_mini(tmp_path / name, TEXTS, seed=seed, **sizes)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["audio_tower.conv1.weight"], c["audio_tower.conv1.weight"])
    tokenizer = load_policy(tmp_path / "a").tokenizer
    for text in ("<answer>ünïcode, 日本</answer>", "<think>a</think> b"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_mini_takes_its_tower_from_a_whisper_encoder(tmp_path):
    from transformers import WhisperConfig, WhisperModel

    sizes = dict(d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=96, decoder_layers=1)
    whisper = WhisperModel(WhisperConfig(num_mel_bins=80, decoder_attention_heads=2, decoder_ffn_dim=96, **sizes))
    whisper.save_pretrained(tmp_path / "whisper")
    build_mini(tmp_path / "mini", TEXTS, vocabulary=320, hidden=64, layers=1, tower_from=tmp_path / "whisper")
    policy = load_policy(tmp_path / "mini")
    expected = dict(whisper.encoder.named_parameters())
    for name, parameter in policy.tower.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert len(policy.prepare("What?", waveform(1, 0)).ids) > 25


@pytest.mark.parametrize("fault", ["missing", "cut off", "no safetensors", "broken index"])
def test_a_faulty_file_of_a_checkpoint_is_named(fault, qwen2_audio_dir, tmp_path):
    directory = shutil.copytree(qwen2_audio_dir, tmp_path / "copy")
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    save_file(state, directory / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model-1.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    load_policy(directory)
    file = directory / "model-1.safetensors"
    if fault == "missing":
        file.unlink()
    elif fault == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "no safetensors":
        file.write_bytes(b"nothing of the kind")
    else:
        file = directory / "model.safetensors.index.json"
        file.write_text(file.read_text()[:50])
    with pytest.raises(PolicyError, match=f"{file.name}: .*copy it again"):
        load_policy(directory)


def test_an_answer_to_learn_ends_as_the_chat_template_ends_a_turn(qwen2_audio_dir, copy):
    """Whichever stop token the generation config names first."""
    end = load_policy(qwen2_audio_dir).tokenizer.convert_tokens_to_ids("<|im_end|>")
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [100, end]}))
    policy = load_policy(copy)
    assert policy.stop_ids == (100, end)
    ids = policy.completion_ids("<answer>rain</answer>")
    assert ids[-1] == end and policy.tokenizer.decode(ids[:-1]) == "<answer>rain</answer>"
