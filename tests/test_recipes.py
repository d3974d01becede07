"""Every published recipe takes a step with its own template, rewards, loss and order; only paths and sizes change."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hark.data.errors import DataError
from hark.data.examples import Example, load_examples
from hark.data.prompts import find_template
from hark.data.rewards import Group, find_reward
from hark.data.rewards.judging import Judge
from hark.from_file import from_file, is_in_file
from hark.grpo.config import ConfigError
from hark.grpo.instruments.record import read_step
from hark.launch import sft, train
from hark.launch.common.config_file import CONFIGS, load_config
from hark.launch.studies.recipes import RECIPES, page, read_recipe
from hark.models.mini import build_mini, build_mini_speaker
from tests.clips import write_questions
from tests.conftest import TEXTS
from tests.runs import read_metrics

ROOT = Path(__file__).parents[1]
AQA = ("dapo", "dr_grpo", "gspo", "cispo", "sapo")
OMNI = ("asr", "omni_r1", "omni_r1_text", "echo_ink", "ke_omni_r", "audio_mcq")
ENDS = ["data.held_out=0", "data.test=null", "evaluation.every=0", "checkpoint.every=0", "checkpoint.export=false"]
SIZES = ["optim.steps=1", "optim.warmup_steps=0", "optim.prompts_per_step=2", "rollout.max_new_tokens=8"]


@pytest.fixture(scope="session", params=["qwen2_5_omni"])
def omni_dir(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("omni")
    sizes = dict(vocabulary=320, hidden=64, layers=1, tower_hidden=64, tower_layers=1)
    build_mini(directory, TEXTS, family=request.param, **sizes)
    return directory


def text_questions(path: Path) -> Path:
    """Questions without sound, as ARC has them."""
    rows = [
        {"id": n, "question_text": f"Which is {n}?", "multi_choice": ["one", "two"], "answer": n % 2} for n in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def first_step(name: str, model: Path, questions: Path, tmp_path: Path, *more: str) -> dict:
    """The metrics of the first step of a recipe on a small model and a few questions."""
    verb = {"train": train, "sft": sft}[read_recipe(name).verb]
    group = ["rollout.group_size=3"] if verb is train else []
    paths = [f"model.path={model}", f"data.train={questions}", f"run.directory={tmp_path}/run", "model.dtype=float32"]
    verb.main([name, *paths, *ENDS, *SIZES, *group, *more])
    (line,) = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    return line


@pytest.mark.parametrize("name", AQA)
def test_an_algorithm_takes_a_step_on_the_data_of_r1_aqa(name, tmp_path, qwen2_audio_dir, questions):
    own = ["reward.options={soft_overlong: {cache: 2}}"] if name == "dapo" else []  # of 8 tokens
    line = first_step(name, qwen2_audio_dir, questions, tmp_path, *own)
    assert "kl" not in line and {"reward/accuracy", "reward/format"} <= line.keys()
    assert ("reward/soft_overlong" in line) == (name == "dapo")


@pytest.mark.parametrize("name", OMNI)
def test_a_recipe_for_qwen2_5_omni_takes_a_step(name, tmp_path, omni_dir):
    text = name == "omni_r1_text"
    file = text_questions(tmp_path / "text.jsonl") if text else write_questions(tmp_path / "data", 4)
    line = first_step(name, omni_dir, file, tmp_path)
    config = load_config([name])
    given = config.reward.weights.keys() - {"keywords"}  # these rows have none
    assert "kl" in line and {f"reward/{reward}" for reward in given} <= line.keys()


@pytest.mark.parametrize("name", ["sari_sft", "sari"])
def test_sari_takes_a_step_on_structured_thoughts_and_then_on_easy_questions(name, tmp_path, qwen2_audio_dir):
    """Two stages of one prompt each: first one of the easier half, then one of the harder; never one of pass rate 0."""
    sections = "".join(f"<{tag}>x</{tag}>" for tag in ("PLANNING", "CAPTION", "REASONING", "SUMMARY"))
    target = sections + "<answer>rain</answer>"
    rates = (0.0, 0.25, 1.0, 0.5, 0.75)
    rows = {f"line{n + 1}": {"target": target, "pass_rate": rate} for n, rate in enumerate(rates)}
    file = write_questions(tmp_path / "data", 5, **rows)
    more = ["record.every=1", f"model.reference={qwen2_audio_dir}", "data.stages=2"] if name == "sari" else []
    line = first_step(name, qwen2_audio_dir, file, tmp_path, "rollout.max_new_tokens=80", *more)
    if name == "sari":
        asked = [prompt["row"]["pass_rate"] for prompt in read_step(tmp_path / "run", 1).values["prompts"]]
        assert asked[0] in (1.0, 0.75) and asked[1] in (0.5, 0.25) and "kl" in line
    else:
        template = find_template(load_config([name]).data.template)
        assert re.findall(r"<(\w+)>", target) == [*template.tags] and line["loss"] > 0


def test_emotion_takes_a_step_and_halves_its_reward_between_style_and_words(tmp_path, omni_dir):
    spoken = {"answer": "the old man sleeps", "style": "happy", "multi_choice": None}
    file = write_questions(tmp_path / "data", 4, **{f"line{n}": spoken for n in range(1, 5)})
    line = first_step("emotion", omni_dir, file, tmp_path)
    assert line["reward/style"] == line["reward/wer"] == 0.0 and "kl" not in line
    config, examples = load_config(["emotion"]), load_examples(file)[0]
    reward = config.reward
    judge = Judge(list(reward.weights), config.data.template, options=reward.options, only_if=reward.only_if)
    texts = ["<style>Happy</style><answer>The old man sleeps.</answer>",
             "<style>sad</style><answer>The old dog sleeps.</answer>",  # one word of four is wrong
             "<style>happy</style>The old man sleeps", "happy"]  # fmt: skip
    with judge:
        columns = judge(examples[:1], texts, [()] * 4, [True] * 4, 0).columns
    assert (columns @ torch.tensor(list(reward.weights.values()))).tolist() == [1.0, 0.375, 0.5, 0.0]


def test_open_rs_takes_a_step_on_text_and_rewards_a_thought_that_is_closed_once(tmp_path, causal_lm_dir):
    reward = from_file(f"{CONFIGS}/open_rs_reward.py:closed_thought")
    texts = ["so\n</think>\n4", "so </think> 4", "so\n</think>\n\n</think>\n4"]
    example = Example(id="a", clips=(), question="2 + 2?", accepted=("4",))
    group = Group(example, tuple(texts), ((),) * 3, (True,) * 3, find_template("open"))
    assert reward(group) == [1.0, 0.0, 0.0]
    file = tmp_path / "train.jsonl"
    rows = [{"id": n, "question_text": f"2 + {n}?", "answer": str(2 + n), "system": "Think."} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(["open_rs"])
    options = config.reward.options["cosine"]
    assert options["form"] == "open_rs", "the released form, not the default of TRL"
    boxed = Group(example, (r"so\n</think>\n\boxed{4}", r"\boxed{5}"), ((),) * 2, (True,) * 2, find_template("open"))
    right, wrong = find_reward("cosine", options)(boxed)
    assert right == pytest.approx(1.0, abs=1e-3) and wrong == pytest.approx(0.0, abs=1e-3), "short: 1 and 0"
    assert "kl" in first_step("open_rs", causal_lm_dir, file, tmp_path)


def test_speech_takes_a_step_of_sft_on_codec_tokens_and_one_of_grpo_with_a_group_that_is_listened_to(tmp_path):
    """The reward is the number of samples; both functions are of a file beside the working directory's."""
    model, file, own = tmp_path / "speaker", tmp_path / "train.jsonl", tmp_path / "mine.py"
    build_mini_speaker(model, ["low", "high"], codes=8, vocabulary=300, hidden=64, layers=1)
    rows = [{"id": n, "question_text": "low", "answer": "<|s_1|><|s_2|>"} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own.write_text(
        "def decode(ids):\n    return [0.0] * len(ids), 8\ndef score(wave, rate, example):\n    return rate\n"
    )
    options = f"reward.options={{artefact: {{decode: '{own}:decode', score: '{own}:score'}}}}"
    assert first_step("tts_sft", model, file, tmp_path / "sft")["loss"] > 0
    line = first_step("tts", model, file, tmp_path / "grpo", options)
    assert (
        line["reward/artefact"] == 8.0 and line["reward/length_median"] <= 0 < line["reward/diversity"] and "kl" in line
    )
    assert {is_in_file(name) for name in load_config(["tts"]).reward.options["artefact"].values()} == {True}


def test_questions_without_sound_are_refused_unless_they_are_wanted(tmp_path, omni_dir):
    file = text_questions(tmp_path / "text.jsonl")
    with pytest.raises(DataError, match='text.jsonl:1: "audio_path" is missing'):
        first_step("omni_r1", omni_dir, file, tmp_path, "data.skip_bad=false")
    with pytest.raises(ConfigError, match="data.require_audio=false needs model.train=no-tower"):
        load_config(["omni_r1_text", "model.train=all"])


def test_the_recipes_are_those_that_were_published():
    """The numbers of each, written out once more, so that no edit of a configuration goes unnoticed."""
    found = {}
    for name in RECIPES:
        config = load_config([name])
        if read_recipe(name).verb == "sft":
            continue
        rollout, optim = config.rollout, config.optim
        found[name] = (rollout.group_size, rollout.temperature, optim.lr, config.loss.beta, rollout.max_new_tokens)
    assert found == PUBLISHED


PUBLISHED = {  # group size, temperature, learning rate, beta, tokens
    "asr": (12, 1.0, 1e-5, 0.1, 256),
    "emotion": (8, 1.0, 1e-5, 0.0, 256),
    "open_rs": (6, 0.7, 1e-6, 0.04, 3584),
    "tts": (8, 1.0, 1e-4, 0.1, 80),
    "sari": (8, 1.0, 1e-6, 0.04, 512),
    "omni_r1": (8, 1.0, 1e-6, 0.04, 256),
    "omni_r1_text": (8, 1.0, 1e-6, 0.04, 256),
    "echo_ink": (16, 1.0, 1e-6, 0.001, 768),
    "ke_omni_r": (8, 1.0, 1e-6, 0.01, 64),
    "audio_mcq": (8, 1.5, 1e-6, 0.001, 128),
    "dapo": (16, 1.0, 1e-6, 0.0, 256),
    "dr_grpo": (8, 1.0, 1e-6, 0.0, 256),
    "gspo": (8, 1.0, 1e-6, 0.0, 256),
    "cispo": (8, 1.0, 1e-6, 0.0, 256),
    "sapo": (8, 1.0, 1e-6, 0.0, 256),
}


def test_the_loss_and_the_rewards_of_a_recipe_are_its_own():
    dapo, gspo, sapo = (load_config([name]).loss for name in ("dapo", "gspo", "sapo"))
    assert (dapo.clip_low, dapo.clip_high, dapo.token_weights) == (0.2, 0.28, "token-mean")
    assert (gspo.ratio, gspo.clip_low, gspo.clip_high) == ("sequence", 3e-4, 4e-4)
    assert (sapo.bound, sapo.gate_up, sapo.gate_down) == ("sapo", 1.0, 1.05)
    assert load_config(["dapo"]).rollout.refill == 29
    assert load_config(["audio_mcq"]).reward.weights == {"accuracy": 2.0, "format": 0.5}
    assert load_config(["ke_omni_r"]).reward.weights == {"accuracy": 2.0, "format": 1.0}
    plain, text = (load_config([name]) for name in ("omni_r1", "omni_r1_text"))
    assert (plain.rollout, plain.reward, plain.loss, plain.optim) == (text.rollout, text.reward, text.loss, text.optim)


def test_the_page_of_recipes_is_that_of_the_configurations():
    """If this fails: `python -m hark.launch.studies.recipes docs/recipes.md` writes the page again."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert page(text) == text


def test_a_recipe_says_its_paper_its_model_its_data_and_what_runs_here():
    for name in RECIPES:
        recipe = read_recipe(name)
        assert all((recipe.paper, recipe.model, recipe.data, recipe.runs)), name
        assert recipe.compare, name
