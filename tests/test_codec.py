"""The codec of speech, the policy that writes its codes, and the data and model that `build_tts` makes of clips."""

from __future__ import annotations

import json
import math
import os
import sys

import numpy as np
import pytest
import soundfile
import torch

from hark.data.clip import Clip
from hark.data.described import described
from hark.data.errors import DataError
from hark.data.examples import Example
from hark.data.prompts import find_template
from hark.data.rewards.artefact import artefact
from hark.data.rewards.group import Group
from hark.data.rewards.transcript import error_rate
from hark.from_file import from_file
from hark.grpo import loop
from hark.grpo.distribution import log_distribution
from hark.grpo.instruments.record import read_step
from hark.grpo.runtime.collectives import joined_world
from hark.grpo.sampler import sample
from hark.launch import build_tts
from hark.launch.common.config_file import CONFIGS, load_config
from hark.models.codec import Settings, load_codec, stretches, train_codec
from hark.models.codec_tokens import CODEC_TOKEN, code_ids
from hark.models.families.causal_lm import CausalLMPolicy
from hark.models.families.codec_lm import CodecLMPolicy
from hark.models.loading import load_policy
from hark.models.mini import build_mini_speaker
from hark.models.policy import PolicyError
from tests.runs import build, read_metrics

DECODE, SCORE = (f"{CONFIGS}/tts_reward.py:{name}" for name in ("decode", "intelligible"))
tts_reward = sys.modules[from_file(SCORE).__module__]
SMALL = Settings(codes=24, iterations=8)
TEXTS = ("low then high", "high then low")


def tones(*pitches: float, seconds: float = 0.2) -> torch.Tensor:
    """Tones of ten harmonics, one after another (samples,): their log-mels differ like those of vowels."""
    time = torch.arange(round(16_000 * seconds)) / 16_000
    return (
        torch.cat([sum(torch.sin(2 * math.pi * h * pitch * time) / h for h in range(1, 11)) for pitch in pitches]) / 4
    )


SPEECH = [tones(*(110.0 * 2 ** (((n * k) % 12) / 12) for k in range(1, 6))) for n in range(1, 9)]
HELD_OUT = tones(130.8, 196.0, 146.8)


@pytest.fixture(scope="module")
def codec():
    return train_codec(SPEECH, SMALL)


def test_codes_reconstruct_a_clip_of_no_training_clip_better_than_a_constant(codec):
    """In the log-mel, the error of the codes is a small part of the variance, which is a constant's error."""
    target = stretches(HELD_OUT, SMALL)
    error = (codec.centres[codec.encode(HELD_OUT)] - target).square().mean()
    constant = (torch.cat([stretches(one, SMALL) for one in SPEECH]).mean(dim=0) - target).square().mean()
    assert error < 0.2 * constant


def test_the_waveform_of_codes_has_the_spectrum_of_the_clip(codec):
    codes = codec.encode(HELD_OUT)
    made = codec.decode(codes)
    assert len(codes) == 15 and len(made) == 15 * 640  # 0.6 s are 15 stretches of 40 ms
    errors = (stretches(made, SMALL) - stretches(HELD_OUT, SMALL)).square().mean()
    silence = (stretches(torch.zeros(9600), SMALL) - stretches(HELD_OUT, SMALL)).square().mean()
    assert errors < 0.2 * silence
    assert torch.equal(made, codec.decode(codes)), "the same codes give the same samples"


def test_a_started_stretch_counts_and_no_code_is_no_sample(codec):
    assert len(codec.encode(HELD_OUT[:641])) == 2 and codec.seconds == 0.04
    assert codec.decode([]).shape == (0,)


def test_centres_are_means_of_their_stretches():
    """Two kinds of stretch and two codes: the centres are exactly the two means."""
    low, high = torch.zeros(6400), tones(220.0, seconds=0.4)
    found = train_codec([low, high], Settings(codes=2), steps=10, seed=1)
    codes = [found.encode(low), found.encode(high)]
    assert {*codes[0]}.isdisjoint(codes[1])
    members = torch.cat([stretches(low, SMALL), stretches(high, SMALL)])
    for code in (0, 1):
        mean = members[torch.tensor(codes[0] + codes[1]) == code].mean(dim=0)
        assert torch.allclose(found.centres[code], mean, atol=1e-5)


def test_a_codec_is_the_same_after_it_was_kept(codec, tmp_path):
    codec.save(tmp_path / "codec")
    again = load_codec(tmp_path / "codec")
    assert again.settings == SMALL and torch.equal(again.centres, codec.centres)
    with pytest.raises(DataError, match="no codec .*; expected codec.json and codec.safetensors"):
        load_codec(tmp_path)


def test_too_little_speech_is_an_error():
    with pytest.raises(DataError, match="0.2 s of speech give 5 stretches for 24 codes"):
        train_codec([tones(110.0)], SMALL)


# The policy -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("speaker")
    build_mini_speaker(path, TEXTS, codes=24, vocabulary=300, hidden=64, layers=1)
    return path


def test_completions_are_codec_tokens_alone_and_every_other_token_has_probability_0(directory):
    policy = load_policy(directory)
    assert type(policy) is CodecLMPolicy and len(policy.code_ids) == 24
    prompts = [policy.prepare(text) for text in TEXTS]
    rollout = sample(policy, prompts, keys=[(0,), (1,)], group_size=8, max_new_tokens=12, temperature=1.0)
    drawn = set(rollout.tokens[rollout.mask].tolist())
    assert drawn <= {*policy.code_ids, *policy.stop_ids} and len(drawn) > 8
    distribution = policy(log_distribution, torch.zeros(1, 64), 1.0)
    assert torch.isfinite(distribution).sum() == 24 + 1


def test_a_completion_is_the_text_of_its_tokens_and_back(directory):
    policy = load_policy(directory)
    text = "".join(map(CODEC_TOKEN.format, (3, 23, 0, 3)))
    tokens, mask = policy.completions([text])
    assert tokens[0].tolist() == [*(policy.code_ids[code] for code in (3, 23, 0, 3)), policy.stop_ids[0]]
    assert policy.completion_texts(tokens, mask) == [text]


def test_without_the_key_in_its_config_it_is_an_ordinary_language_model(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "codec_token"}))
    policy = load_policy(tmp_path)
    assert type(policy) is CausalLMPolicy and policy.suppressed_ids == ()
    with pytest.raises(
        PolicyError, match="the tokenizer has no token '<0>', though config.json has codec_token='<{}>'"
    ):
        code_ids(policy.tokenizer, "<{}>")


# The program ----------------------------------------------------------------------------------------------------------


def test_build_tts_writes_codec_questions_and_a_model_that_reads_them(tmp_path, causal_lm_dir):
    rows = []
    for n, wave in enumerate(SPEECH):
        soundfile.write(tmp_path / f"{n}.wav", wave.numpy(), 16_000)
        rows.append({"id": n, "audio_path": f"{n}.wav", "question_text": "What is said?", "answer": TEXTS[n % 2]})
    (tmp_path / "asr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", str(tmp_path / "asr.jsonl"), "--codes", "24", "--text", str(causal_lm_dir)]
    build_tts.main([str(tmp_path / "tts"), *words])
    codec, policy = load_codec(tmp_path / "tts" / "codec"), load_policy(tmp_path / "tts" / "model")
    (first, *others) = (tmp_path / "tts" / "data" / "train.jsonl").read_text().splitlines()
    row = json.loads(first)
    assert row["question_text"] == TEXTS[0] and len(others) == len(SPEECH) - 1
    ids = policy.completion_ids(row["answer"]).tolist()
    heard = codec.encode(torch.from_numpy(soundfile.read(tmp_path / "0.wav", dtype="float32")[0]))
    assert [policy.code_ids.index(token) for token in ids[:-1]] == heard and len(heard) == 25


def test_build_tts_refuses_a_language_model_with_a_pipe_before_it_reads_it(tmp_path):
    (tmp_path / "text").mkdir()
    os.mkfifo(tmp_path / "text" / "config.json")
    with pytest.raises(DataError, match=r"config.json: a pipe, a socket or a device"):
        build_tts.build_model(tmp_path / "model", TEXTS, 24, tmp_path / "text")


def test_build_tts_leaves_out_a_clip_that_cannot_be_used_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for n in range(2):
        soundfile.write(tmp_path / f"{n}.wav", SPEECH[n].numpy(), 16_000)
    (tmp_path / "1.wav").write_bytes((tmp_path / "1.wav").read_bytes()[:-100])
    examples = [
        Example(str(n), (Clip(tmp_path / f"{n}.wav"),), "What is said?", accepted=(TEXTS[n],), line=f"a.jsonl:{n}")
        for n in range(2)
    ]
    assert [one.id for one in build_tts.checked(examples)] == ["0"]
    assert "left out: a.jsonl:1: " in (said := capsys.readouterr().out) and "is cut off" in said


# GRPO -----------------------------------------------------------------------------------------------------------------


def test_two_steps_of_grpo_on_codec_tokens_with_a_reward_on_the_waveform(tmp_path, directory, codec, monkeypatch):
    """The reward is worked out again from the recorded tokens: codes, waveform, words heard, 1 - tanh(3 WER)."""
    rows = [{"id": n, "question_text": text, "answer": None} for n, text in enumerate(TEXTS)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text("{}")
    words = [
        "data.template=open", "rollout.group_size=4", "rollout.max_new_tokens=10", "optim.prompts_per_step=2",
        "optim.steps=2", "optim.lr=1e-3", "optim.schedule=constant", "loss.beta=0.1", "record.every=1",
        "reward.weights={heard: 1.0}", "checkpoint.export=false", "checkpoint.every=0",
    ]  # fmt: skip
    paths = [f"model.path={directory}", f"data.train={tmp_path}/train.jsonl", f"run.directory={tmp_path}/run"]
    config, policy = load_config([str(tmp_path / "config.yaml"), *paths, *words]), load_policy(directory)

    def worked_out(text: str, tokens: list[int]) -> float:
        wave = codec.decode([policy.code_ids.index(token) for token in tokens if token in policy.code_ids])
        return 1 - math.tanh(3 * error_rate(text.split(), heard(wave))) if len(wave) else 0.0

    monkeypatch.setattr(tts_reward, "heard", lambda wave, rate: " ".join(heard(torch.from_numpy(wave))))
    monkeypatch.setattr(tts_reward, "_codec", lambda: (codec, {t: code for code, t in enumerate(policy.code_ids)}))

    def rewards(examples, texts):
        ids = [(tuple(policy.completion_ids(text).tolist()),) for text in texts]
        groups = [Group(*one, (True,), find_template("open")) for one in zip(examples, zip(texts), ids, strict=True)]
        return torch.tensor([artefact(group, decode=DECODE, score=SCORE) for group in groups])

    with joined_world(threads=1) as world:
        trainer = build(world, config, rewards=rewards, describe=described)
        loop.train(trainer)
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(lines) == 2 and all(line["sampler_gap"] < 1e-5 for line in lines)
    for line in lines:
        record = read_step(tmp_path / "run", line["step"])
        texts = [prompt["row"]["question_text"] for prompt in record.values["prompts"] for _ in range(4)]
        tokens = [
            row[keep].tolist() for row, keep in zip(record.tensors["tokens"], record.tensors["mask"], strict=True)
        ]
        expected = torch.tensor([worked_out(*pair) for pair in zip(texts, tokens, strict=True)])
        assert torch.allclose(record.tensors["reward"], expected, atol=1e-6)
        assert line["reward"] == pytest.approx(expected.mean().item(), abs=1e-6)
        groups = expected.view(2, 4)
        advantages = (groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-4)
        assert torch.allclose(record.tensors["advantages"], advantages.flatten(), atol=1e-4)


def heard(wave: torch.Tensor) -> list[str]:
    """A recogniser of two words: each fifth of a second is "low" or "high" by its zero crossings."""
    parts = wave.split(3200)
    return ["high" if int((part[1:] * part[:-1] < 0).sum()) > len(part) / 16 else "low" for part in parts]


def test_the_reward_of_the_recipe_is_that_of_cosyvoice2(monkeypatch):
    """1 - tanh(3 WER) as it is published, at a WER of 0, 1/4, 1/2 and 1 of four words; 0 without a sample."""
    example = Example(id="a", clips=(), question="The old man sleeps", accepted=())
    for text, reward in [
        ("The old man sleeps.", 1.0),
        ("the old man", 0.364851),
        ("an old man sleep", 0.094852),
        ("", 0.004945),
    ]:
        monkeypatch.setattr(tts_reward, "heard", lambda wave, rate, text=text: text)
        assert tts_reward.intelligible(np.ones(640), 16_000, example) == pytest.approx(reward, abs=1e-6)
    assert tts_reward.intelligible(np.ones(0), 16_000, example) == 0.0
