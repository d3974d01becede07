"""`hark ask`: the answer is greedy, the probabilities are those of separate sequences, a run stands for its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hark.data.errors import DataError
from hark.data.examples import Example
from hark.grpo.config import ConfigError
from hark.launch import ask, sft
from tests.clips import write_questions

CHOICES = ("a bell", "rain", "a dog")


def test_the_probabilities_are_those_of_separate_sequences_in_transformers(case):
    text = "Which sound?"
    example = Example("q", (), text, CHOICES, None)
    found = ask.probabilities(case.policy, case.prompts[0], example, "answer")
    hf, inputs = case.load_hf(), case.hf_inputs(0)
    length = inputs["input_ids"].shape[1]
    for choice, probability in zip(CHOICES, found, strict=True):
        ids = case.policy.completion_ids(f"<answer>{choice}</answer>")
        whole = inputs | {
            "input_ids": torch.cat([inputs["input_ids"], ids[None]], dim=1),
            "attention_mask": torch.ones(1, length + len(ids), dtype=torch.long),
        }
        with torch.no_grad():
            logits = hf(**whole).logits[0, -len(ids) - 1 : -1].float()
        logits[:, list(case.policy.suppressed_ids)] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, ids[:, None]).sum()
        assert probability.log().item() == pytest.approx(expected.item(), abs=2e-4)  # a sum of about ten logprobs


@pytest.fixture
def clip(tmp_path) -> Path:
    write_questions(tmp_path / "few", 2)
    return next((tmp_path / "few").rglob("*.wav"))


def test_a_model_is_asked_with_and_without_sound(qwen2_audio_dir, clip, capsys, monkeypatch):
    asked, probabilities = [], ask.probabilities

    def remember(policy, prompt, *rest):
        asked.append(prompt)
        return probabilities(policy, prompt, *rest)

    monkeypatch.setattr(ask, "probabilities", remember)
    words = [str(qwen2_audio_dir), str(clip), "Which sound?", "--max-new-tokens", "4", "--silent", "--samples", "5"]
    ask.main([*words, "--choices", *CHOICES])
    said = capsys.readouterr().out
    table = [line.split() for line in said.splitlines() if line.startswith(tuple(f"  {name} " for name in CHOICES))]
    for column in (-2, -1):
        assert sum(float(cells[column]) for cells in table) == pytest.approx(100, abs=0.2)
    heard, silent = (prompt.clips[0].features for prompt in asked)
    assert heard.shape == silent.shape and heard.std() > 0.1
    assert silent.std() == 0, "every frame of silence is at the floor"
    assert "5 samples with sound" in said and "5 samples without sound" in said
    counts = [int(line.split()[0]) for line in said.splitlines() if " x " in line]
    assert sum(counts) == 10
    ask.main(words)
    assert "probability" not in capsys.readouterr().out


def test_a_run_is_asked_by_its_own_settings(settings, tmp_path, clip, capsys, monkeypatch):
    """The run learns its answers by heart, so the trained model gives them and the model that it started from not."""
    few = tmp_path / "few" / "train.jsonl"
    sft.main([
        *settings, f"run.directory={tmp_path}/run", f"data.train={few}", "optim.steps=24", "optim.lr=3e-3",
        "data.shuffle_choices=false", "rollout.max_new_tokens=20", "data.template=plain", "checkpoint.export=false",
    ])  # fmt: skip
    row = json.loads(few.read_text().splitlines()[0])
    capsys.readouterr()
    words = [str(few.parent / row["audio_path"]), row["question_text"], "--choices", *row["multi_choice"]]
    ask.main([str(tmp_path / "run"), *words])
    assert f"answer{' ' * 26}{row['multi_choice'][row['answer']]}\n" in capsys.readouterr().out
    asked, render = [], ask.render
    monkeypatch.setattr(ask, "render", lambda *given: asked.append(render(*given)) or asked[-1])
    ask.main([str(tmp_path / "run"), *words[:2], "--template", "answer"])
    ask.main([str(tmp_path / "run"), *words[:2]])
    ask.main([settings[1].removeprefix("model.path="), *words[:2], "--max-new-tokens", "2"])
    assert asked == [f"{words[1]} Output the final answer in <answer> </answer>.", words[1]], "open, in the run's form"
    with pytest.raises(ConfigError, match="--step needs the run.directory"):
        ask.main([str(tmp_path / "nothing"), *words, "--step", "3"])


def test_mistakes_are_said(qwen2_audio_dir, causal_lm_dir, clip, capsys):
    with pytest.raises(ConfigError, match="takes text only, so CLIP must be -"):
        ask.main([str(causal_lm_dir), str(clip), "?"])
    with pytest.raises(ConfigError, match="takes audio, so CLIP must be a file"):
        ask.main([str(qwen2_audio_dir), "-", "?"])
    with pytest.raises(DataError, match=r"its answer may have 100000 .* and the model has \d+ positions"):
        ask.main([str(qwen2_audio_dir), str(clip), "?", "--max-new-tokens", "100000"])
    for words in (["--choices", "a"], ["--choices", "a", "a"], ["--samples", "-1"], ["--temperature", "0"]):
        with pytest.raises(SystemExit):
            ask.main([str(qwen2_audio_dir), str(clip), "?", *words])
