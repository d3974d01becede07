"""What is no policy, and data that does not go with a model, get one sentence before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from hark import UserError
from hark.data import clips
from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import World, exchange_rows
from hark.launch import choose, evaluate, sft, train
from hark.launch.common import questions, trained, training
from hark.launch.common.config_file import load_config
from hark.launch.common.questions import found_in_clips
from hark.models.families.causal_lm import CausalLMPolicy
from hark.models.families.qwen2_audio import Qwen2AudioPolicy
from hark.models.loading import load_policy, load_tokenizer, read_family
from hark.models.policy import PolicyError, completion_lengths
from tests.clips import write_questions
from tests.conftest import build_causal_lm
from tests.ranks import on_ranks

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)


def whisper(directory: Path) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, vocab_size=100)
    WhisperForConditionalGeneration(WhisperConfig(**sizes, **special)).save_pretrained(directory)


def bert(directory: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**SMALL)).save_pretrained(directory)


def classifier(directory: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    Qwen2ForSequenceClassification(Qwen2Config(**SMALL, num_key_value_heads=1)).save_pretrained(directory)


def no_tokenizer(directory: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=1)).save_pretrained(directory)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (whisper, r"no policy for model type 'whisper' \(WhisperForConditionalGeneration\); expected .*qwen2_audio"),
        (bert, r"no policy for model type 'bert' \(BertModel\)"),
        (classifier, r"no policy for model type 'qwen2' \(Qwen2ForSequenceClassification\)"),
        (no_tokenizer, r"has no tokenizer \(tokenizer.json.*copy it"),
    ],
)
def test_a_model_of_transformers_that_is_no_policy_is_refused_by_what_it_is(tmp_path, build, message):
    build(tmp_path)
    for refuse in (read_family, load_policy):
        with pytest.raises(PolicyError, match=message):
            refuse(tmp_path)


def replaced(directory: Path, name: str, text: str | None) -> None:
    (directory / name).unlink()
    if text is not None:
        (directory / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"model_type": "qwe', "config.json: not readable as JSON"),
        ("config.json", '{"hidden_size": 5}', "config.json: has no model_type"),
        ("config.json", '{"model_type": "qwen99"}', "no policy for model type 'qwen99'"),
        ("config.json", None, "config.json is missing"),
        ("processor_config.json", None, "has no audio processor"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("model.safetensors", None, "neither model.safetensors nor"),
    ],
)
def test_a_checkpoint_that_lacks_a_file_or_has_a_broken_one_is_named(qwen2_audio_dir, tmp_path, name, text, message):
    copy = Path(shutil.copytree(qwen2_audio_dir, tmp_path / "copy"))
    replaced(copy, name, text)
    with pytest.raises(PolicyError, match=message) as error:
        read_family(copy)
    assert "\n" not in str(error.value)


def test_weights_in_another_format_a_file_and_a_broken_tokenizer_are_named(qwen2_audio_dir, tmp_path):
    copy = Path(shutil.copytree(qwen2_audio_dir, tmp_path / "copy"))
    with pytest.raises(PolicyError, match=r"config.json: is a file; expected the directory.*copy\?"):
        read_family(copy / "config.json")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(PolicyError, match="as pytorch_model.bin; expected model.safetensors; .*save_pretrained"):
        read_family(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(PolicyError, match="its tokenizer cannot be loaded"):
        load_tokenizer(copy)


def test_the_family_is_known_without_building_a_model(qwen2_audio_dir, causal_lm_dir, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "register_parameter", lambda *_: pytest.fail("a model was built"))
    assert read_family(qwen2_audio_dir) is Qwen2AudioPolicy and Qwen2AudioPolicy.sample_rate == 16_000
    assert read_family(causal_lm_dir) is CausalLMPolicy and CausalLMPolicy.sample_rate is None


@pytest.fixture
def config(tmp_path, qwen2_audio_dir, monkeypatch) -> list[str]:
    """A run whose weights may not be loaded."""
    for module in (training, trained, choose):
        monkeypatch.setattr(module, "make_policy", lambda *_, **__: pytest.fail("the weights were loaded"))
    data, test = write_questions(tmp_path, 4), write_questions(tmp_path, 4, name="test")
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{directory: {tmp_path}/run}}\nmodel: {{path: {qwen2_audio_dir}}}\n"
        f"data: {{train: {data}, validation: {test}, test: {test}}}\nrollout: {{max_new_tokens: 30}}\n"
        "optim: {steps: 1, prompts_per_step: 4}\n"
    )
    return [str(path)]


def test_a_torchrun_that_was_refused_is_refused_again_and_one_that_was_accepted_resumes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "facts", lambda config, _: pytest.fail(f"accepted, resume={config.run.resume}"))

    def attempt(launcher: str, number: int) -> None:
        place = tmp_path / launcher / f"attempt_{number}" / "0"
        place.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(place / "error.json"))
        train.main(config)

    with pytest.raises(pytest.fail.Exception, match="accepted, resume=False"):
        attempt("first", 0)
    (tmp_path / "run" / "metrics.jsonl").touch()
    for number in (0, 1):
        with pytest.raises(ConfigError, match="already holds a run"):
            attempt("second", number)
    with pytest.raises(pytest.fail.Exception, match="accepted, resume=True"):
        attempt("first", 1)


def test_a_silent_clip_ends_every_verb_before_the_weights_are_loaded(config, tmp_path):
    for name in ("train", "test"):
        soundfile.write(tmp_path / f"{name}-1.wav", np.zeros(8000), 16_000)
    for verb, line in ((train, "train.jsonl:2"), (sft, "train.jsonl:2"), (evaluate, "test.jsonl:2")):
        with pytest.raises(UserError, match=rf"1 of 4 clips cannot be used; .*; first:\n.*{line}: .*is silent"):
            verb.main(config)


def test_clips_for_a_model_that_takes_text_only_are_refused_before_the_weights_are_loaded(config, tmp_path):
    build_causal_lm(tmp_path / "text")
    for verb in (train, sft, evaluate):
        with pytest.raises(ConfigError, match=r"takes text only, and .*jsonl:1 has a clip; .*qwen2_audio"):
            verb.main([*config, f"model.path={tmp_path}/text"])


def test_an_answer_that_no_completion_can_hold_is_refused_with_the_number_to_set(config, qwen2_audio_dir, tmp_path):
    """a b c d e f: what tokens it has is the tokenizer's, one more stops it."""
    answer = "<answer>a quite remarkable noise</answer>"
    tokenizer = load_tokenizer(qwen2_audio_dir)
    tokens = len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1
    changed = {"multi_choice": ["a quite remarkable noise", "rain"], "answer": 0}
    write_questions(tmp_path, 4, line3=changed)
    words = [*config, "data.template=answer"]
    said = rf"1 of \d right answers .*{answer}' of .*train.jsonl:3, has {tokens} tokens .* to {tokens} or more"
    with pytest.raises(ConfigError, match=said):
        train.main([*words, f"rollout.max_new_tokens={tokens - 1}"])
    for verb, fits in ((train, tokens), (sft, tokens - 1)):
        with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
            verb.main([*words, f"rollout.max_new_tokens={fits}"])
    unjudged = ["reward.weights={format: 1}", "data.validation=null"]
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        train.main([*words, *unjudged, f"rollout.max_new_tokens={tokens - 1}"])


def test_an_evaluation_counts_the_answers_that_it_cannot_get_and_supervised_training_refuses_them(
    config, tmp_path, capsys
):
    write_questions(
        tmp_path, 4, name="test", line2={"multi_choice": ["rain and a long walk home", "bell"], "answer": 0}
    )
    words = [*config, "rollout.max_new_tokens=5", "data.template=plain"]
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        evaluate.main(words)
    assert "warning: 1 of 4 right answers are longer than rollout.max_new_tokens=5" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="'rain and a long walk home' of .*test.jsonl:2"):
        sft.main([*words, "evaluation.every=1"])


def test_the_tokens_of_completions_are_those_of_the_policy(case):
    texts = ["rain", "<answer>a bell</answer>", "", "rain"]
    lengths = completion_lengths(case.policy.tokenizer, texts)
    assert lengths == {text: len(case.policy.completion_ids(text)) for text in texts}
    assert list(lengths.values()) == sorted(lengths.values(), reverse=True)


def look_at_clips(world: World, words: list[str]) -> None:
    config, names, inspect = load_config(words), [], clips.inspect
    clips.inspect = lambda clip, *more: names.append(clip.source.name) or inspect(clip, *more)
    examples = questions.read_questions(config, Qwen2AudioPolicy, config.data.train)
    found = found_in_clips(config, world, Qwen2AudioPolicy, examples)
    assert sorted(names) == [f"train-{n}.wav" for n in range(world.rank, 4, world.size)], "each rank decodes its share"
    assert exchange_rows([found], world) == [found] * world.size, "all ranks know the same"
    assert [found[clip].fault for clip in sorted(found, key=str)] == ["", "silent", "", "cut off"]
    names.clear()
    assert found_in_clips(config, world, Qwen2AudioPolicy, examples) == found and not names, "nothing is decoded again"


def test_ranks_decode_their_shares_and_agree(config, tmp_path):
    soundfile.write(tmp_path / "train-1.wav", np.zeros(8000), 16_000)
    whole = (tmp_path / "train-3.wav").read_bytes()
    (tmp_path / "train-3.wav").write_bytes(whole[:-1000])
    on_ranks(2, look_at_clips, config)
    assert json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["id"] == "train-0"


def test_a_path_in_a_directory_of_this_machine_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "run" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="mine/nowhere: no such directory"):
        read_family("mine/nowhere")
    with pytest.raises(UserError, match="mine/run: config.json is missing.*there is one in mine/run/model"):
        read_family("mine/run")
    with pytest.raises(UserError, match="mine/run/model: a directory; it holds a model, which a configuration names"):
        load_config(["mine/run/model"])
