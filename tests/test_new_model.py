"""`hark new-model`: a small model whose tokenizer fits one's own questions."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import soundfile

from hark import UserError
from hark.data.examples import load_examples
from hark.data.prompts import texts_of
from hark.launch import init, new_model
from hark.launch.common.config_file import load_config
from hark.models.loading import load_policy
from hark.models.mini import SIZES
from hark.models.mini_families import Sizes
from tests.clips import write_questions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_questions(
        tmp_path_factory.mktemp("own"), 6, line2={"multi_choice": ["rain " * 9, "a dog"], "answer": 0}
    )


def test_the_model_loads_and_its_printed_lengths_are_those_of_every_example(data, tmp_path, capsys):
    new_model.main(["--data", str(data), "--out", str(tmp_path / "m"), "--size", "tiny"])
    printed = capsys.readouterr().out
    policy = load_policy(tmp_path / "m")
    examples, _ = load_examples(data)
    texts = texts_of(examples, "answer")
    prompts = [
        len(policy.prepare(text, soundfile.read(example.clips[0].source, dtype="float32")[0]).ids)
        for text, example in zip(texts[::2], examples, strict=True)
    ]
    answer = max(len(policy.tokenizer(text)["input_ids"]) for text in texts[1::2]) + 1
    assert f"longest prompt          {max(prompts)} tokens" in printed
    assert f"longest answer          {answer} tokens" in printed
    assert f"{sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M random parameters" in printed
    assert f"model.path={tmp_path}/m" in printed and "hark train mini" in printed


def test_audio_tokens_are_25_per_second(data, tmp_path, capsys):
    new_model.main(["--data", str(data), "--out", str(tmp_path / "m"), "--size", "tiny"])
    shown = capsys.readouterr().out.partition(" of them audio")[0].rpartition(" ")[2]
    assert int(shown) <= math.ceil(25 * (0.3 + 0.07 * 5)) and int(shown) >= 7


def test_a_model_of_another_family_is_written_and_takes_no_whisper(data, tmp_path, capsys):
    words = ["--data", str(data), "--size", "tiny", "--family", "qwen3_asr"]
    new_model.main([*words, "--out", str(tmp_path / "m")])
    assert "longest prompt" in capsys.readouterr().out
    assert type(load_policy(tmp_path / "m")).__name__ == "Qwen3ASRPolicy"
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(UserError, match="fits a qwen2_audio only"):
        new_model.main([*words, "--out", str(tmp_path / "n"), "--tower-from", str(tmp_path / "whisper")])


def test_the_small_size_is_that_of_the_demo():
    assert SIZES["small"] == dataclasses.asdict(Sizes())


def test_a_mistake_is_one_sentence_and_writes_nothing(data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text(json.dumps({"model_type": "qwen2_audio"}))
    full, out = str(tmp_path / "full"), str(tmp_path / "out")
    for words, message in (
        (["--data", str(data), "--out", full], "exists and is not an empty directory"),
        (["--data", "none.jsonl", "--out", out], "none.jsonl: no such file"),
        (["--data", str(data), "--out", out, "--tower-from", full], "holds a qwen2_audio model; expected a Whisper"),
        (["--data", str(data), "--out", out, "--tower-from", str(tmp_path)], "no checkpoint of Whisper"),
        (["--data", str(data), "--out", out, "--template", "anser"], "did you mean 'answer'"),
    ):
        with pytest.raises(UserError, match=message):
            new_model.main(words)
    assert not (tmp_path / "out").exists()


def test_the_next_commands_are_those_of_the_project_that_the_model_is_in(tmp_path, capsys):
    init.main([str(tmp_path / "mine")])
    data = tmp_path / "mine" / "train.jsonl"
    new_model.main(["--data", str(data), "--out", str(tmp_path / "mine" / "m"), "--size", "tiny"])
    commands = capsys.readouterr().out.splitlines()[-2:]
    project = tmp_path / "mine"
    assert commands == [f"  hark sft {project}/sft.yaml model.path={project}/m", f"  hark train {project}/train.yaml"]
    settings = [load_config([name]).rollout for name in ("mini", "mini_sft", *map(str, project.glob("*.yaml")))]
    assert {rollout.max_new_tokens for rollout in settings} == {new_model.MAX_NEW_TOKENS}
    long = new_model.next_commands(tmp_path / "m", data, "answer", new_model.Lengths(9, 9, answer=20))
    assert long.count("rollout.max_new_tokens=20") == 2
