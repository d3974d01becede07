"""Every configuration of the package runs as its first lines say, with only paths and sizes changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hark.grpo.config import Config
from hark.launch import choose, plan, sft, train
from hark.launch.common.config_file import load_config
from tests.clips import write_questions
from tests.runs import read_metrics

CONFIGS = Path(__file__).parents[1] / "launch" / "configs"
R1_AQA = ("r1_aqa", "r1_aqa_think", "sft_full", "sft_lora", "r1_aqa_lora_1gpu")


def read(name: str) -> tuple[str, Config]:
    path = CONFIGS / f"{name}.yaml"
    return path.read_text(), load_config([str(path)])


@pytest.mark.slow
@pytest.mark.parametrize("name", R1_AQA)
def test_it_trains_chooses_a_checkpoint_and_answers_the_test(name, tmp_path, qwen2_audio_dir, capsys):
    questions = write_questions(tmp_path / "data", 12)
    test = write_questions(tmp_path / "test", 3, name="test")
    text, _ = read(name)
    verb = {"train.py": train, "sft.py": sft}[re.search(r"launch/(\w+\.py) launch/configs", text).group(1)]
    paths = [f"model.path={qwen2_audio_dir}", f"data.train={questions}", f"data.test={test}"]
    paths += [f"run.directory={tmp_path}/run"]
    sizes = ["data.held_out=2", "rollout.max_new_tokens=30", "optim.steps=2", "optim.prompts_per_step=4"]
    sizes += ["optim.warmup_steps=0", "checkpoint.every=1", "evaluation.every=2", "lora.rank=2"]
    verb.main([str(CONFIGS / f"{name}.yaml"), *paths, *(sizes if "lora" in name else sizes[:-1])])
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert ("kl" in lines[0]) == (verb is train)
    choose.main([str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "choice.json").read_text())["step"] in (1, 2)
    answers = json.loads((tmp_path / "run" / "chosen" / "answers.json").read_text())
    assert [row["id"] for row in answers] == ["test-0", "test-1", "test-2"] and "model_prediction" in answers[0]


@pytest.mark.parametrize("name", R1_AQA)
def test_it_opens_with_the_command_the_hardware_the_time_and_the_published_figure(name):
    text, config = read(name)
    head = text[: text.index("run:\n")]
    assert f"launch/configs/{name}.yaml" in head and f"launch/choose.py {config.run.directory}\n" in head
    assert all(f"# {word}:" in head for word in ("Hardware", "Time", "Compare with"))
    assert re.search(r"\d\d\.\d % on MMAU test-mini", head)


def test_r1_aqa_is_the_published_recipe():
    """The recipe's numbers, written out here once more, so that no edit of a configuration goes unnoticed."""
    _, config = read("r1_aqa")
    assert config.model.train == "all" and config.lora.rank == 0 and config.model.dtype == "bfloat16"
    assert config.rollout.group_size * config.optim.prompts_per_step == 128
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup_steps) == (1e-6, "linear", 0)
    assert (config.optim.clip_norm, config.optim.weight_decay) == (1.0, 0.0)
    assert config.optim.micro_batch == 2 and not config.model.recompute, "of the same updates; it fits (see below)"
    assert (config.loss.beta, config.loss.advantage, config.loss.token_weights) == (0.04, "std", "sequence-mean")
    assert (config.rollout.temperature, config.rollout.max_new_tokens, config.run.seed) == (1.0, 256, 42)
    assert config.reward.weights == {"accuracy": 1.0, "format": 1.0} and config.data.template == "answer"
    assert 500 <= config.optim.steps <= 1000 and config.checkpoint.every == 100


def test_thinking_differs_from_r1_aqa_in_its_prompt_alone():
    (_, plain), (_, think) = read("r1_aqa"), read("r1_aqa_think")
    assert think.data.template == "think"
    assert {name for name in ("model", "lora", "sharding", "rollout", "reward", "loss", "optim", "evaluation")
            if getattr(plain, name) != getattr(think, name)} == set()  # fmt: skip


@pytest.mark.parametrize("name", R1_AQA)
def test_by_the_planner_it_fits_the_hardware_it_names(name, capsys):
    text, _ = read(name)
    gpus, sft = re.search(rf"launch/plan.py launch/configs/{name}.yaml --gpus (\d)( --sft)?", text).groups()
    words = [str(CONFIGS / f"{name}.yaml"), "--gpus", gpus, "--shape", "qwen2-audio-7b"]
    plan.main([*words, "--sft"] if sft else words)
    assert "fits in 76.00 GiB (95 % of 80 GiB)" in capsys.readouterr().out
