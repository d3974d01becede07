"""`hark compose`: a Qwen2-Audio of a Whisper encoder and a language model, which keeps what both of them compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hark.data.chat import Turn
from hark.data.errors import DataError
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.launch import compose as program
from hark.launch import sft
from hark.models.compose import AUDIO, AUDIO_BOS, AUDIO_EOS, compose
from hark.models.loading import load_policy
from tests.clips import waveform
from tests.compose import TEMPLATE, build_llama, build_tokenizer, build_whisper, edit_json

SECONDS = 2


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    return build_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return build_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def composed(whisper, llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("composed")
    program.main(["--audio", str(whisper), "--text", str(llama), "--out", str(out), "--seconds", str(SECONDS)])
    return out


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def plain(directory: Path):
    """Model and processor as transformers alone loads them."""
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    model, loading = Qwen2AudioForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), AutoProcessor.from_pretrained(directory)


def inputs_of(processor, text: str, wave) -> dict:
    turn = {"role": "user", "content": [{"type": "audio", "audio": ""}, {"type": "text", "text": text}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    return dict(processor(text=[prompt], audio=[wave], sampling_rate=16_000, return_tensors="pt"))


@torch.no_grad()
def test_transformers_and_hark_load_it_and_agree_on_prompt_logprobs_and_completion(composed):
    model, processor = plain(composed)
    policy = load_policy(composed)
    wave = waveform(1.03, 0)
    inputs = inputs_of(processor, "Which comes second?", wave)
    prompt = policy.prepare("Which comes second?", wave)
    assert inputs["input_ids"][0].tolist() == prompt.ids.tolist()
    rollout = sample(policy, [prompt], group_size=1, max_new_tokens=6, temperature=0)
    tokens = rollout.tokens[0][rollout.mask[0]]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    suppressed = list(policy.suppressed_ids)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=suppressed)
    assert torch.equal(out[0, len(prompt.ids) :], tokens)
    ids = torch.cat([prompt.ids, tokens])[None]
    logits = model(**(inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})).logits[0]
    logits[:, suppressed] = -torch.inf
    expected = logits[len(prompt.ids) - 1 : -1].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    scored, _ = score(policy, [prompt], rollout.tokens, rollout.mask, group_size=1)
    torch.testing.assert_close(scored[0][rollout.mask[0]], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_language_model_and_the_encoder_compute_what_they_did(composed, whisper, llama):
    from transformers import AutoModelForCausalLM, WhisperModel

    model, processor = plain(composed)
    ids = torch.tensor(processor.tokenizer("Rising or falling?")["input_ids"])[None]
    alone = AutoModelForCausalLM.from_pretrained(llama).eval()
    assert alone.config.model_type == "llama" and model.config.text_config.model_type == "qwen2"
    assert torch.allclose(model(input_ids=ids).logits, alone(input_ids=ids).logits, atol=1e-5)
    encoder, own = WhisperModel.from_pretrained(whisper).encoder, model.model.audio_tower
    assert torch.equal(own.embed_positions.weight, encoder.embed_positions.weight[: 50 * SECONDS])
    for name, tensor in encoder.state_dict().items():
        if name != "embed_positions.weight":
            assert torch.equal(own.state_dict()[name], tensor), name


def test_unused_special_tokens_become_the_placeholders_and_nothing_is_resized(composed, llama):
    from transformers import AutoTokenizer

    old, policy = AutoTokenizer.from_pretrained(llama), load_policy(composed)
    new = policy.tokenizer
    assert new.convert_tokens_to_ids([AUDIO, AUDIO_BOS, AUDIO_EOS]) == old.convert_tokens_to_ids(
        ["<|reserved_0|>", "<tool>", "<file>"]
    )
    assert len(new) == len(old) and policy.embed_tokens(torch.tensor([len(new) - 1])).shape == (1, 64)
    assert "<tool>" not in new.get_vocab() and new.eos_token == "<end>" and policy.stop_ids == (old.eos_token_id,)
    assert new("Rising or falling?")["input_ids"] == old("Rising or falling?")["input_ids"]


def test_the_chat_template_is_the_language_models_with_audio_in_the_texts(composed):
    policy = load_policy(composed)
    chat = [Turn("system", "Be brief."), Turn("user", "First <audio> and then <audio>: which?")]
    text = policy.tokenizer.decode(policy.prepare(chat, waveform(0.1, 0), waveform(0.1, 1)).ids)
    clip = f"{AUDIO_BOS}{AUDIO * 2}{AUDIO_EOS}"
    assert text == f"system: Be brief.<end>user: First {clip} and then {clip}: which?<end>assistant: "
    text = policy.tokenizer.decode(policy.prepare("Which?", waveform(0.1, 0)).ids)
    assert text == f"system: Help.<end>user: {clip}Which?<end>assistant: "


@torch.no_grad()
def test_audio_embeddings_are_as_long_as_those_of_tokens(composed):
    policy = load_policy(composed)
    prompt = policy.prepare("Which?", waveform(1.0, 0))
    embeddings, _ = policy.embed([prompt])
    audio = embeddings[0][prompt.ids == policy.audio_id]
    table = policy.decoder.get_input_embeddings().weight
    assert 0.7 < audio.square().mean().sqrt() / table.square().mean().sqrt() < 1.4


def test_clips_may_be_as_long_as_was_asked_for(composed):
    policy = load_policy(composed)
    policy.prepare("Which?", waveform(float(SECONDS), 0))
    with pytest.raises(DataError, match="2 s"):
        policy.prepare("Which?", waveform(SECONDS + 0.1, 0))


def test_equal_seeds_give_equal_checkpoints(composed, whisper, llama, tmp_path):
    compose(whisper, llama, tmp_path / "same", seconds=SECONDS)
    compose(whisper, llama, tmp_path / "other", seconds=SECONDS, seed=1)
    weights = [(path / "model.safetensors").read_bytes() for path in (composed, tmp_path / "same", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]


def test_the_first_layers_alone_are_a_language_model_cut_there(whisper, llama, tmp_path):
    from transformers import AutoModelForCausalLM

    compose(whisper, llama, tmp_path / "cut", seconds=1, layers=1)
    whole, (cut, _) = AutoModelForCausalLM.from_pretrained(llama).eval(), plain(tmp_path / "cut")
    assert (
        len(whole.model.layers) > len(cut.model.language_model.layers) == cut.config.text_config.num_hidden_layers == 1
    )
    whole.model.layers = whole.model.layers[:1]
    ids = torch.arange(9)[None]
    torch.testing.assert_close(cut(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_another_architecture_stays_what_it_is(whisper, tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, head_dim=32)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = compose(whisper, tmp_path, tmp_path / "out", seconds=1, layers=1)
    assert found.family == "qwen3" and load_policy(tmp_path / "out").decoder.config.model_type == "qwen3"


def without_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()


def without_spare_tokens(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATE + "{# <tool> <file> #}")


def with_scaled_logits(directory: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    CohereForCausalLM(CohereConfig(vocab_size=vocabulary, **sizes)).save_pretrained(directory)


def an_encoder_decoder(directory: Path) -> None:
    edit_json(directory / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_template, "has no chat template; expected an instruction-tuned model"),
        (without_spare_tokens, r"1 special tokens are not in use \(<\|reserved_0\|>\); audio needs 3"),
        (with_scaled_logits, "logits differ by .* CohereForCausalLM cannot be composed"),
        (an_encoder_decoder, "no causal language model of transformers"),
        (lambda directory: (directory / "model.safetensors").unlink(), "no causal language model of transformers"),
    ],
)
def test_a_language_model_that_does_not_fit_is_refused_and_nothing_is_written(change, message, copy, whisper, tmp_path):
    change(copy)
    with pytest.raises(DataError, match=message):
        compose(whisper, copy, tmp_path / "out", seconds=SECONDS)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_no_whisper_and_clips_that_are_too_long_are_refused(whisper, llama, tmp_path):
    with pytest.raises(DataError, match="holds a llama model; expected a Whisper checkpoint"):
        compose(llama, llama, tmp_path / "out")
    with pytest.raises(DataError, match=r"--seconds 11: the encoder of .* takes clips of 1 to 10 s"):
        compose(whisper, llama, tmp_path / "out", seconds=11)
    with pytest.raises(DataError, match=r"--layers 9: the language model of .* has 1 to 2 to keep"):
        compose(whisper, llama, tmp_path / "out", seconds=1, layers=9)
    with pytest.raises(DataError, match="is not an empty directory"):
        program.main(["--audio", str(whisper), "--text", str(llama), "--out", str(llama)])


def test_a_whisper_without_the_weights_of_its_encoder_is_refused(whisper, llama, tmp_path):
    broken = shutil.copytree(whisper, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "encoder.layers.1" not in name}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="lack 15 tensors of the encoder"):
        compose(broken, llama, tmp_path / "out", seconds=SECONDS)


def test_the_first_stage_trains_the_projector_alone_and_the_second_all_but_the_tower(composed, questions, tmp_path):
    paths = [f"data.train={questions}", "data.validation=null", "evaluation.every=0", "model.dtype=float32"]
    sizes = ["optim.steps=2", "optim.prompts_per_step=4", "optim.micro_batch=4", "optim.warmup_steps=0"]
    first, second = tmp_path / "first", tmp_path / "second"
    sft.main(["compose_projector", f"model.path={composed}", f"run.directory={first}", *paths, *sizes])
    sft.main(["compose_decoder", f"model.path={first}/model", f"run.directory={second}", *paths, *sizes])
    weights = [load_file(path / "model.safetensors") for path in (composed, first / "model", second / "model")]
    changed = [
        {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        for before, after in zip(weights, weights[1:], strict=False)
    ]
    assert changed == [{"multi_modal_projector"}, {"multi_modal_projector", "language_model"}]
