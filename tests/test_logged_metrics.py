"""Every figure in metrics.jsonl against a value worked out by hand, not by the engine's own functions.

A small text model does one step of two updates. What was drawn is recorded, and the weights before each update. Under
these weights transformers scores each completion in a row of its own; from its logprobs and the rewards, the papers'
equations are worked out in plain Python.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev, variance

import pytest
import torch

from hark.grpo import loop
from hark.grpo.learner import Learner
from hark.grpo.runtime.collectives import World
from hark.grpo.types import PolicyBatch
from hark.launch.common.config_file import load_config
from hark.models.lora import whole
from tests.ranks import on_ranks
from tests.runs import build, read_metrics

GROUP, CLIP_LOW, CLIP_HIGH, TEMPERATURE, BETA = 4, 0.05, 0.15, 0.8, 0.04
# The rewards of four prompts' completions, as (accuracy, format), of which format counts half. Those of the third
# prompt are equal. Sixteenths, so that float32 holds them.
FORMAT_WEIGHT = 0.5
REWARDS = [
    *[(1, 0), (0, 0), (0, 1), (1, 1)],
    *[(0, 1), (0, 0), (0.25, 0), (0, 1)],
    *[(1, 0), (1, 0), (1, 0), (1, 0)],
    *[(0, 0), (1, 1), (0, 1), (0, 1)],
]
RATE = 2e-4  # small enough for some ratios to stay within the clip
SLEEP = 0.2  # seconds that loading, the rewards and the two updates are made to take
NEAR = dict(rel=1e-4, abs=1e-7)  # float32 against float64; logprobs of size 5 are known to some 1e-6

# What the figures below do not cover is worked out by hand elsewhere.
ELSEWHERE = {"macs": "test_flops.py", "speed/limit_share": "test_flops.py"}


@dataclass
class Record:
    """A step as it happened: its batch, and the weights before each update."""

    batch: PolicyBatch | None = None
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    line: dict[str, float] = field(default_factory=dict)
    peaks: tuple[float, float] = (0.0, 0.0)  # of memory, before and after, in GiB
    prompts: list[list[int]] = field(default_factory=list)
    stop_ids: tuple[int, ...] = ()


def peak() -> float:
    """The most memory of this process until now in GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def slowly(function):
    def slow(*args):
        time.sleep(SLEEP)
        return function(*args)

    return slow


def in_groups(rows: list) -> list[list]:
    """The rows, one list per group."""
    return [rows[first : first + GROUP] for first in range(0, len(rows), GROUP)]


def text_settings(settings: list[str], directory: Path, model: Path) -> list[str]:
    """The settings with a text model, and with its questions without their clips."""
    (train,) = (word.removeprefix("data.train=") for word in settings if word.startswith("data.train="))
    lines = [json.loads(line) for line in Path(train).read_text().splitlines()]
    for line in lines:
        del line["audio_path"]
    (directory / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [
        *settings, f"model.path={model}", f"data.train={directory}/text.jsonl", f"run.directory={directory}/run",
        f"rollout.temperature={TEMPERATURE}", f"loss.clip_low={CLIP_LOW}", f"loss.clip_high={CLIP_HIGH}",
        f"reward.weights={{accuracy: 1.0, format: {FORMAT_WEIGHT}}}", "loss.inner_epochs=2", "optim.steps=1",
        "checkpoint.every=0", "checkpoint.export=false",
    ]  # fmt: skip


def record_step(settings: list[str], directory: Path, model: Path, *overrides: str) -> Record:
    config = load_config([*text_settings(settings, directory, model), *overrides])
    record = Record()

    def watch(learner: Learner) -> None:
        accumulate = learner.accumulate

        def watched(batch: PolicyBatch) -> dict[str, float]:
            record.batch = batch
            weights = {name: whole(p).detach().clone() for name, p in learner.policy.model.named_parameters()}
            record.weights.append(weights)
            return slowly(accumulate)(batch)

        learner.accumulate = watched

    def run(world: World) -> None:
        columns = torch.tensor(REWARDS, dtype=torch.float32)
        learner = build(world, config, rewards=slowly(lambda examples, completions: columns))
        watch(learner)
        learner.data.step = slowly(learner.data.step)
        record.stop_ids = learner.policy.stop_ids
        before = peak()
        loop.train(learner)
        record.peaks = before, peak()

    on_ranks(1, run)
    del record.weights[0]  # the memory probe's
    (record.line,) = read_metrics(directory / "run")
    record.prompts = [prompt.ids.tolist() for prompt in record.batch.prompts]
    return record


class ByHand:
    """The figures of a recorded step."""

    def __init__(self, record: Record, model: Path):
        from transformers import AutoModelForCausalLM

        self.batch, self.hf = record.batch, AutoModelForCausalLM.from_pretrained(model).double()
        self.rows = [
            (record.prompts[b // GROUP], row[: sum(mask)], old[: sum(mask)])
            for b, (row, mask, old) in enumerate(
                zip(*(t.tolist() for t in (self.batch.tokens, self.batch.mask, self.batch.old_logprobs)), strict=True)
            )
        ]
        rewards = [accuracy + FORMAT_WEIGHT * form for accuracy, form in REWARDS]
        self.rewards = rewards
        self.groups = [rewards[first : first + GROUP] for first in range(0, len(rewards), GROUP)]

    def scored(self, weights: dict[str, torch.Tensor] | None) -> list[tuple[torch.Tensor, list[float]]]:
        """Logprobs of each completion's tokens, and the entropies there, under weights; None for the stored ones."""
        if weights is not None:
            self.hf.load_state_dict({name: value.double() for name, value in weights.items()}, strict=False)
        result = []
        for prompt, tokens, _ in self.rows:
            logits = self.hf(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            distribution = logits.log_softmax(dim=-1)
            entropies = [-sum(math.exp(p) * p for p in place) for place in distribution.tolist()]
            result.append((distribution[range(len(tokens)), tokens], entropies))
        return result

    def advantages(self) -> list[float]:
        return [
            (reward - fmean(group)) / (stdev(group) + 1e-4) if stdev(group) else 0.0
            for group in self.groups
            for reward in group
        ]


def mean_over_tokens(rows: list[list[float]]) -> float:
    """Of each completion's mean over its tokens, the mean."""
    return fmean(map(fmean, rows))


@pytest.mark.parametrize("beta", [BETA, 0.0])
def test_every_figure_of_a_step_is_the_one_worked_out_by_hand(beta, settings, tmp_path, causal_lm_dir):
    record = record_step(settings, tmp_path, causal_lm_dir, f"loss.beta={beta}", f"optim.lr={RATE}")
    hand, line = ByHand(record, causal_lm_dir), dict(record.line)
    lengths = [len(tokens) for _, tokens, _ in hand.rows]
    reference = [logprobs.tolist() for logprobs, _ in hand.scored(None)]
    first, second = record.weights
    sampled = [logprobs.tolist() for logprobs, _ in hand.scored(first)]
    now = hand.scored(second)

    # A completion of n tokens has n weights of 1 / (16 n); a token's own term is -min(r A, clip(r) A) + beta k3.
    loss, clipped, kl = torch.zeros((), dtype=torch.float64), [], []
    for (logprobs, _), (_, _, old), ref, advantage in zip(now, hand.rows, reference, hand.advantages(), strict=True):
        clipped.append([])
        kl.append([])
        for new, before, other in zip(logprobs, old, ref, strict=True):
            ratio = (new - before).exp()
            bounded = min(max(ratio.item(), 1 - CLIP_LOW), 1 + CLIP_HIGH)
            clipped[-1].append(float(bounded * advantage < ratio * advantage))
            gain = torch.tensor(bounded * advantage) if clipped[-1][-1] else ratio * advantage
            k3 = (other - new).exp() - (other - new) - 1
            kl[-1].append(k3.item())
            loss = loss + (-gain + beta * k3) / len(old) / len(hand.rows)
    loss.backward()
    gradients = [p.grad for p in hand.hf.parameters() if p.grad is not None]

    scored = [n for n in range(16) if beta or n // GROUP != 2]  # without a reference, groups of equal rewards are not
    gaps = [
        [abs(a - b) for a, b in zip(row, old, strict=True)] for row, (_, _, old) in zip(sampled, hand.rows, strict=True)
    ]
    accuracies, forms = (in_groups([pair[k] for pair in REWARDS]) for k in (0, 1))
    spread = [fmean(map(variance, accuracies)), FORMAT_WEIGHT**2 * fmean(map(variance, forms))]
    expected = {
        "step": 1,
        "reward": fmean(hand.rewards),
        "reward_failures": 0,
        "reward/accuracy": fmean(accuracy for accuracy, _ in REWARDS),
        "reward/format": fmean(form for _, form in REWARDS),
        "reward_std": fmean(map(stdev, hand.groups)),
        "equal_reward_share": 1 / 4,
        "skipped_share": 0.0 if beta else 1 / 4,
        "loss": loss.item(),
        "clip_share": mean_over_tokens([clipped[n] for n in scored]),
        "entropy": mean_over_tokens([now[n][1] for n in scored]),
        "grad_norm": math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)),
        "lr": RATE,
        "distinct_completions": fmean(len(set(map(tuple, group))) for group in in_groups([t for _, t, _ in hand.rows])),
        "equal_share/accuracy": 1 / 4,
        "equal_share/format": 1 / 4,
        "variance_share/accuracy": spread[0] / sum(spread),
        "variance_share/format": spread[1] / sum(spread),
        "tokens": sum(lengths),
        "completion_tokens": fmean(lengths),
        "stopped_share": fmean(tokens[-1] in record.stop_ids for _, tokens, _ in hand.rows),
    } | ({"kl": mean_over_tokens(kl)} if beta else {})
    assert 0.1 < expected["clip_share"] < 0.9 and expected["stopped_share"] not in (0, 0.5, 1), "else little is shown"
    for name, value in expected.items():
        assert line.pop(name) == pytest.approx(value, **NEAR), name

    # The gap is rounding: no value of its own, but of its size.
    gap = mean_over_tokens([gaps[n] for n in scored])
    assert 0 < line.pop("sampler_gap") < 1e-5 and gap < 1e-5
    seconds = {name: line.pop(name) for name in list(line) if name.startswith("seconds/")}
    assert 0 <= seconds.pop("seconds/waiting") < SLEEP, "a process alone"
    assert line.pop("speed/tokens_per_second") == pytest.approx(sum(lengths) / seconds["seconds/step"])
    assert line.pop("communication/gib") == 0, "a process alone"
    assert record.peaks[0] <= line.pop("memory/peak_gib") <= record.peaks[1]
    assert set(line) == set(ELSEWHERE), "figures that no test knows"
    check_seconds(seconds, reference=beta > 0)


def check_seconds(seconds: dict[str, float], *, reference: bool) -> None:
    """Each phase has the time that it was made to take, no other has any of it, and together they are the step."""
    step, _ = seconds.pop("seconds/step"), seconds.pop("seconds/communication")
    phases = {"load", "rollout", "reward", "reference", "forward_backward", "optimizer", "report", "record"}
    assert seconds.keys() == {f"seconds/{phase}" for phase in phases}
    assert seconds["seconds/load"] > SLEEP and seconds["seconds/forward_backward"] > 2 * SLEEP
    # The reference scores while the rewards are found; what it takes longer, they are not waited for.
    assert seconds["seconds/reward"] + seconds["seconds/reference"] > SLEEP
    assert 0.9 * step < sum(seconds.values()) <= step


SCHEDULES = {
    # Of a peak of 1e-3 after a rise over two of six steps.
    "linear": [0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3],
    "cosine": [0.5e-3, 1e-3, *(0.5e-3 * (1 + math.cos(math.pi * n / 4)) for n in range(4))],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_logged_learning_rate_is_the_one_the_optimizer_had(schedule, settings, tmp_path, causal_lm_dir):
    words = text_settings(settings, tmp_path, causal_lm_dir)
    overrides = [f"optim.schedule={schedule}", "optim.warmup_steps=2", "optim.steps=6", "loss.inner_epochs=1"]
    config = load_config([*words, *overrides, "loss.beta=0", "rollout.max_new_tokens=2"])
    had = []

    def run(world: World) -> None:
        columns = torch.tensor(REWARDS, dtype=torch.float32)
        learner = build(world, config, rewards=lambda examples, completions: columns)

        def watch(optimizer: torch.optim.Optimizer, *_) -> None:
            had.append({group["lr"] for group in optimizer.param_groups})

        learner.optimizer.register_step_pre_hook(watch)
        loop.train(learner)

    on_ranks(1, run)
    # The first is the memory probe's, which must move nothing.
    assert had[0] == {0.0}
    for rates, line, expected in zip(had[1:], read_metrics(tmp_path / "run"), SCHEDULES[schedule], strict=True):
        assert rates == {line["lr"]} and line["lr"] == pytest.approx(expected, rel=1e-12)
