"""Short training runs, and how far apart their weights end.

Weights are compared after AdamW steps at a learning rate of 1e-3, so a wrong gradient moves them by about 1e-3; the
rounding of sums in another order moves them by less than 1e-5. The one exception is the bias of the key projection: a
constant added to all keys does not change a softmax, so its gradient is zero but for rounding, and AdamW, which
divides a gradient by its own size, turns that rounding into steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from hark.data.prompts import target
from hark.data.rewards import Judged
from hark.data.rewards.judging import Judge
from hark.grpo import loop
from hark.grpo.config import Config
from hark.grpo.learner import Learner
from hark.grpo.runtime.collectives import World
from hark.grpo.trainer import Trainer
from hark.launch.common.config_file import load_config
from hark.launch.common.policies import make_policy, make_reference
from hark.launch.common.questions import training_examples, training_loader
from hark.launch.common.training import check_training
from hark.models.lora import whole

ROUNDING = 1e-5
NO_GRADIENT = "k_proj.bias"
CHANCE_ZEROS = 1e-5  # share of entries whose gradient may happen to be as small as its rounding, for the same reason


def length_reward(examples, completions) -> torch.Tensor:
    """Something that differs between the completions of a random model, as accuracy does not."""
    return torch.tensor([[len(text) % 7 / 7, float("a" in text)] for text in completions])


def judging(columns: Callable[[Sequence, Sequence[str]], torch.Tensor]) -> Callable[..., Judged]:
    """The rewards that a function gives of the example of each completion and of its text."""

    def rewards(examples, texts, ids, stopped, step) -> Judged:
        size = len(texts) // len(examples)
        return Judged(columns([example for example in examples for _ in range(size)], texts))

    return rewards


def build(world: World, config: Config, kind: type[Learner] = Trainer, **more) -> Learner:
    policy = make_policy(config, world)
    loader = training_loader(config, world, policy, training_examples(config, world, policy)[0])
    if kind is Trainer:
        right = partial(target, template=config.data.template)
        more = {"rewards": length_reward, "reference": make_reference(config, world, policy), "target": right} | more
        if not isinstance(more["rewards"], Judge):
            more["rewards"] = judging(more["rewards"])
    return kind(config, world, policy, data=loader, **more)


def gradients(world: World, words: list[str]) -> list[dict[str, torch.Tensor]]:
    """The gradients of each update of a step whose updates change nothing."""
    trainer, found = build(world, load_config(words)), []

    def keep() -> None:
        every = {name: parameter.grad for name, parameter in trainer.policy.named_parameters()}
        found.append({name: whole(gradient).clone() for name, gradient in every.items() if gradient is not None})

    trainer.optimizer.step = keep
    trainer.step(0)
    return found


def largest_gap(plain: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> float:
    """The largest difference of gradients, relative to the largest gradient of an update."""
    gaps = []
    for one, other in zip(plain, others, strict=True):
        assert one.keys() == other.keys()
        largest = max(float(gradient.abs().max()) for gradient in one.values())
        assert largest > 1e-3, "no gradient, so nothing is compared"
        gaps += [float((one[name] - other[name]).abs().max()) / largest for name in one]
    return max(gaps)


def train(world: World, settings: list[str]) -> None:
    config = load_config(settings)
    check_training(config, world)
    loop.train(build(world, config))


def train_all(world: World, runs: list[list[str]]) -> None:
    for settings in runs:
        train(world, settings)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / "model.safetensors")


def largest_difference(first: Path, second: Path) -> float:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    differences = torch.cat([(a[name] - b[name]).abs().flatten() for name in a if NO_GRADIENT not in name])
    return float(differences.kthvalue(len(differences) - int(CHANCE_ZEROS * len(differences))).values)


def read_metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def computed(line: dict) -> list[str]:
    """The keys of a line of metrics that do not measure the machine or depend on how many ranks there are."""
    return [name for name in line if not name.startswith(("seconds/", "speed/", "memory/", "communication/"))]
