"""Symptoms of a run: each is found in a run that was made to have it, and none in the demo.

The runs are real, of a small text model and a few prompts; the model and the numbers of the rules are those of a user.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from hark.grpo import loop
from hark.grpo import trainer as trainer_module
from hark.grpo.config import Config
from hark.grpo.instruments import history, symptoms
from hark.grpo.instruments.diagnosis import diagnose
from hark.grpo.instruments.history import LONG, WINDOW
from hark.grpo.instruments.metrics import Metrics
from hark.grpo.runtime.collectives import World
from hark.grpo.sampler import sample
from hark.grpo.sft import SupervisedTrainer
from hark.launch.common.config_file import load_config
from hark.launch.common.questions import training_examples, validation_figures
from tests.clips import write_questions
from tests.demo_metrics import FILE, lines_of
from tests.ranks import on_ranks
from tests.runs import build, read_metrics

SMALL = (
    "rollout.max_new_tokens=3", "optim.prompts_per_step=2", "optim.micro_batch=2", "checkpoint.every=0",
    "checkpoint.export=false", "loss.beta=0", "log.completions=0",
)  # fmt: skip


@pytest.fixture
def text(settings, tmp_path, causal_lm_dir, questions) -> list[str]:
    """The settings of a run with a text model; its questions have no clips."""
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    stored = [json.dumps({key: value for key, value in line.items() if key != "audio_path"}) for line in lines]
    (tmp_path / "text.jsonl").write_text("\n".join(stored))
    model = [f"model.path={causal_lm_dir}", f"data.train={tmp_path}/text.jsonl", f"run.directory={tmp_path}/run"]
    return [*settings, *model, *SMALL]


def warned(directory: Path, dtype: str = "float32") -> dict[str, list[int]]:
    """The steps at which a run gave each warning, as its file says; `diagnose` must say the same of the file."""
    lines = read_metrics(directory)
    events = [(line["step"], line["name"], line["text"]) for line in lines if line.get("event") == "warning"]
    assert diagnose(lines, dtype) == events
    return {name: [step for step, other, _ in events if other == name] for _, name, _ in events}


def trained(settings: list[str], *overrides: str, steps: int, **parts) -> dict[str, list[int]]:
    """The warnings of a run."""
    config = load_config([*settings, f"optim.steps={steps}", *overrides])
    on_ranks(1, lambda world: loop.train(build(world, config, **parts)))
    return warned(Path(config.run.directory))


class Noise:
    """Rewards that do not depend on the completions."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, examples, completions) -> torch.Tensor:
        return torch.rand(len(completions), 2, generator=self.generator)


def after_a_pause(call: Callable) -> Callable:
    """A function that first sleeps twice as long as all between its calls takes, however fast the machine is."""
    ended = None

    def slow(*args, **options):
        nonlocal ended
        time.sleep(2 * (time.perf_counter() - ended) if ended else 0)
        value = call(*args, **options)
        ended = time.perf_counter()
        return value

    return slow


# Each symptom in a run made to have it ------------------------------------------------------------------------------


def test_equal_rewards_and_completions_that_are_cut_off_are_found_after_a_window_and_printed_once(
    text, tmp_path, capsys
):
    config = load_config([*text, f"optim.steps={WINDOW + 3}"])

    def run(world: World) -> None:
        learner = build(world, config, rewards=lambda examples, completions: torch.ones(len(completions), 2))
        learner.draw = partial(learner.draw, stop=False)
        loop.train(learner)

    on_ranks(1, run)
    assert warned(tmp_path / "run") == {"groups all equal": [WINDOW], "all truncated": [WINDOW]}
    printed = capsys.readouterr().out
    assert printed.count("warning: groups all equal: in 100% of the groups of the last 20 steps") == 1
    assert "raise rollout.group_size or rollout.temperature" in printed


def test_rewards_that_no_completion_obtains_leave_the_reward_flat_while_the_kl_rises(text):
    found = trained(text, "optim.lr=2e-4", "loss.beta=0.001", steps=2 * LONG + 2, rewards=Noise())
    assert found == {"reward flat": [2 * LONG], "KL rises without reward": [2 * LONG]}


def test_a_format_that_is_learnt_while_accuracy_is_not_is_found(text):
    noise = Noise()

    def rewards(examples, completions):
        form = torch.tensor([float("a" in text or "e" in text) for text in completions])
        return torch.stack([noise(examples, completions)[:, 0], form], dim=1)

    found = trained(text, "optim.lr=3e-3", steps=2 * LONG + 2, rewards=rewards)
    assert found["format learnt, content not"][0] >= 2 * LONG and "reward flat" not in found


def test_a_policy_of_one_answer_has_no_entropy_and_copies_in_its_groups(text):
    found = trained(text, "optim.lr=3e-2", "loss.beta=0.04", "rollout.max_new_tokens=6", steps=2 * WINDOW + 2)
    assert found["entropy collapse"][0] >= 2 * WINDOW and "completions duplicated" in found


def test_a_reward_of_little_weight_is_dominated(text):
    found = trained(text, "reward.weights={accuracy: 1.0, format: 0.05}", steps=WINDOW + 2)
    assert found == {"one reward dominates": [WINDOW]}


def test_updates_that_are_clipped_are_of_too_high_a_rate(text):
    found = trained(text, "loss.inner_epochs=2", "optim.lr=1e-2", steps=WINDOW + 2)
    assert found["learning rate too high"] == [WINDOW]


def test_a_run_resumed_with_too_high_a_rate_is_found_by_its_earlier_gradients(text, tmp_path):
    def run(world: World) -> None:
        for steps, lr, resume in ((WINDOW, 1e-3, False), (3 * WINDOW, 10.0, True)):
            words = [f"optim.lr={lr}", f"optim.steps={steps}", f"run.resume={resume}", "checkpoint.every=20"]
            config = load_config([*text, *words])
            loop.train(build(world, config, SupervisedTrainer, target=lambda example: example.answer_text))

    on_ranks(1, run)
    assert list(warned(tmp_path / "run")) == ["learning rate too high"]


def test_a_sampler_of_another_temperature_is_found_at_the_first_step(text, monkeypatch):
    def warmer(*args, temperature, **options):
        return sample(*args, temperature=1.01 * temperature, **options)

    monkeypatch.setattr(trainer_module, "sample", warmer)
    assert trained(text, steps=2) == {"sampler gap": [1]}


def test_the_gap_of_bfloat16_is_not_that_of_float32(text, tmp_path):
    config = load_config([*text, "model.dtype=bfloat16", "optim.steps=1"])
    on_ranks(1, lambda world: loop.train(build(world, config)))
    assert warned(tmp_path / "run", "bfloat16") == {}
    assert [name for _, name, _ in diagnose(read_metrics(tmp_path / "run"))] == ["sampler gap"]


def test_a_slow_loader_starves_the_step(text, tmp_path):
    config = load_config([*text, f"optim.steps={WINDOW}"])

    def run(world: World) -> None:
        learner = build(world, config)
        learner.data.step = after_a_pause(learner.data.step)
        loop.train(learner)

    on_ranks(1, run)
    assert warned(tmp_path / "run") == {"loader starves the step": [WINDOW]}


def _slow_rank(world: World, config: Config) -> None:
    trainer_module.sample = after_a_pause(sample) if world.rank else sample
    loop.train(build(world, config))


def test_a_slow_rank_is_waited_for(text, tmp_path):
    on_ranks(2, _slow_rank, load_config([*text, f"optim.steps={WINDOW}"]))
    assert warned(tmp_path / "run") == {"ranks wait for one": [WINDOW]}


def test_a_model_that_learns_one_answer_to_all_questions_does_not_listen(settings, tmp_path):
    """The right answer is always rain."""
    always = {f"line{n + 1}": {"answer": 0} for n in range(24)}
    questions = write_questions(tmp_path / "rain", 24, **always)
    words = [f"data.train={questions}", "optim.lr=3e-3", "optim.steps=30", "evaluation.every=15"]
    words += [f"run.directory={tmp_path}/run", "rollout.max_new_tokens=12", "evaluation.silent=true"]
    config = load_config([*settings, *SMALL, *words, "rollout.max_new_tokens=12"])

    def run(world: World) -> None:
        learner = build(world, config, SupervisedTrainer, target=lambda example: "<answer>rain</answer>")
        examples = training_examples(config, world, learner.policy).training
        learner.validate = lambda: validation_figures(config, world, learner.policy, examples)
        loop.train(learner)

    on_ranks(1, run)
    evaluations = [line for line in read_metrics(tmp_path / "run") if line.get("event") == "evaluation"]
    assert evaluations[-1]["accuracy"] == evaluations[-1]["silent_accuracy"] == 1.0
    assert warned(tmp_path / "run") == {"does not listen": [30]}


# No symptom where there is none -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["warm", "grpo", "sft"])
def test_the_demo_has_no_symptom(stage):
    lines = lines_of(stage)
    assert len(lines) > 3 * LONG and diagnose(lines) == []
    assert FILE.stat().st_size < 60_000


def healthy(step: int, draw: random.Random) -> dict[str, float]:
    """A simulated step: the reward rises by a logistic curve, other figures stay, each with the noise of the demo."""
    right = 0.3 + 0.4 / (1 + 2.718 ** (-(step - 80) / 30))
    accuracy = draw.gauss(right, 0.09)
    return {
        "step": step, "reward": accuracy + draw.gauss(0.95, 0.02), "reward/accuracy": accuracy,
        "equal_reward_share": draw.gauss(0.4, 0.1), "sampler_gap": 1e-7, "entropy": draw.gauss(0.4, 0.05),
        "kl": draw.gauss(0.1 + 0.06 * (right - 0.3) / 0.4, 0.04), "clip_share": draw.gauss(0.1, 0.03),
        "grad_norm": draw.lognormvariate(0, 0.5), "stopped_share": 0.99, "distinct_completions": draw.gauss(4, 1),
        "seconds/load": draw.expovariate(20), "seconds/waiting": draw.expovariate(10), "seconds/step": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_symptom(seed):
    draw = random.Random(seed)
    assert diagnose([healthy(step, draw) for step in range(1, 301)]) == []


def evaluations(*figures: tuple[float, float, int]) -> list[tuple[int, str]]:
    """The warnings after evaluations of (accuracy, accuracy without sound, questions)."""
    names = ("accuracy", "silent_accuracy", "questions")
    lines = [{"event": "evaluation", "step": n} | dict(zip(names, one, strict=True)) for n, one in enumerate(figures)]
    return [(step, name) for step, name, _ in diagnose(lines)]


def test_a_silent_control_counts_if_there_are_enough_questions_twice_and_after_training():
    assert evaluations(*[(0.4, 0.35, 160)] * 3) == [(2, "does not listen")], "the first is before training"
    assert evaluations(*[(0.4, 0.35, 40)] * 3) == [], "40 questions do not tell 0.40 from 0.55"
    assert evaluations(*[(0.45, 0.25, 160)] * 3) == []
    assert evaluations((0.4, 0.4, 160), (0.4, 0.35, 160), (0.6, 0.25, 160)) == []


@pytest.mark.parametrize("phase", ["load", "waiting"])
def test_a_few_extreme_steps_move_no_rule(phase):
    draw = random.Random(0)
    lines = [healthy(step, draw) for step in range(1, 201)]
    for line in lines[140:146]:
        line |= {"grad_norm": 1e4, f"seconds/{phase}": 900.0, "seconds/step": 1000.0}
    assert diagnose(lines) == []


# Said once, and again after an absence ------------------------------------------------------------------------------


def equal(*spans: tuple[int, float]) -> list[dict[str, float]]:
    """Steps of which so many have each equal_reward_share."""
    shares = [share for count, share in spans for _ in range(count)]
    return [{"step": step, "equal_reward_share": share} for step, share in enumerate(shares, 1)]


def steps_said(lines: list[dict[str, float]]) -> list[int]:
    return [step for step, name, _ in diagnose(lines) if name == "groups all equal"]


def test_a_symptom_is_said_again_only_after_a_window_without_it():
    assert steps_said(equal((100, 1.0))) == [WINDOW]
    assert steps_said(equal((20, 1.0), (3, 0.5), (100, 1.0))) == [WINDOW], "absent for too short a time"
    assert steps_said(equal((20, 1.0), (40, 0.5), (40, 1.0)))[1:] == [78], "18 of 20, and 2 halves, are 95 %"


def test_a_resumed_run_repeats_no_warning(tmp_path, capsys):
    lines = equal((60, 1.0))
    for first, last in ((0, 30), (30, 60)):
        metrics = Metrics(tmp_path, rank=0, total_steps=60)
        metrics.truncate(first + 1 if first else 0)
        for line in lines[first:last]:
            metrics.log(line["step"], {"equal_reward_share": line["equal_reward_share"]})
    assert warned(tmp_path) == {"groups all equal": [WINDOW]}
    assert capsys.readouterr().out.count("warning:") == 1


def test_a_figure_that_is_not_finite_or_absent_finds_nothing():
    lines = [{"step": step, "reward": None, "kl": None, "grad_norm": None} for step in range(1, 150)]
    assert diagnose(lines) == []


@pytest.mark.parametrize(
    "name", ["reward", "kl", "entropy", "grad_norm", "equal_reward_share", "reward/format", "clip_share"]
)
@pytest.mark.parametrize("where", [slice(0, 120), slice(120, None)])
def test_a_figure_that_only_some_steps_of_a_run_have_ends_no_run(name, where):
    """Steps whose prompts are all skipped have no KL and no entropy, and may be the last ones or the first."""
    lines = [
        {"step": step, "reward": 0.1, "kl": step / 9, "entropy": 1 / step, "grad_norm": float(step), "clip_share": 0.1}
        | {"equal_reward_share": 0.1, "reward/format": min(step / 50, 1), "reward/accuracy": 0.0}
        for step in range(1, 301)
    ]
    for line in lines[where]:
        del line[name]
    diagnose(lines)


def test_steps_without_a_figure_are_left_out_of_a_window_of_which_most_have_it():
    lines = equal((100, 1.0))
    for line in lines[::3]:
        line["equal_reward_share"] = None
    assert steps_said(lines) == [WINDOW]
    for line in lines[1::3]:
        line["equal_reward_share"] = None
    assert steps_said(lines) == []


def test_every_bound_has_a_reason():
    sources = [Path(module.__file__).read_text().splitlines() for module in (history, symptoms)]
    bounds = [line for source in sources for line in source if re.match(r"[A-Z_]+(, [A-Z_]+)? = [\d{]", line)]
    assert len(bounds) > 12 and all("  # " in line for line in bounds)
