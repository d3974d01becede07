"""Supervised fine-tuning: given answers replace the rollout, and the loss is their negative log-likelihood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hark.grpo.config import Config
from hark.grpo.instruments.console import PACE
from hark.grpo.learner import Learner
from hark.grpo.loss import TokenTerms, supervised_loss
from hark.grpo.runtime.collectives import World, reduce_sums
from hark.grpo.scorer import score
from hark.grpo.shared_data import TrainingData
from hark.grpo.types import Batch
from hark.models.policy import Policy, Prompt, completion_lengths


def add_supervised(learner: Learner, batch: Batch, *, weight: float) -> float:
    """Add the gradient of `weight` times the supervised loss of a batch; returns this rank's part of that loss."""
    total: Any = 0.0
    for _, micro, _ in learner.micro_batches(batch):
        logprobs, _ = score(
            learner.policy, micro.prompts, micro.tokens, micro.mask, group_size=micro.group_size,
            temperature=learner.config.rollout.temperature,
        )  # fmt: skip
        loss, _ = supervised_loss(logprobs, micro.weights)
        (weight * loss).backward()
        total += loss.detach()
    return float(total)  # only at the end, because float() waits for a GPU


def longest_given(learner: Learner, target: Callable[[Any], str], prompts: tuple[Prompt, ...]) -> Batch:
    """A batch of these prompts with the longest of all given completions."""
    longest = next(iter(completion_lengths(learner.policy.tokenizer, map(target, learner.data.examples))))
    return learner.given_batch([longest] * len(prompts), prompts)[0]


class SupervisedTrainer(Learner[Batch]):
    """Trains a policy on one given completion per prompt.

    target: returns the text of the completion to learn for an example.
    """

    shown = ("loss", "entropy", "grad_norm", PACE)

    def __init__(
        self,
        config: Config,
        world: World,
        policy: Policy,
        *,
        data: TrainingData,
        target: Callable[[Any], str],
        **options: Any,
    ):
        super().__init__(config, world, policy, data=data, **options)
        self.target = target

    def step(self, step: int) -> dict[str, float]:
        examples, prompts, _ = zip(*self.data.step(step), strict=True)
        since, positions = self.positions(step)
        self.recorder.note(examples=examples, prompts=prompts, positions=positions, since=since)
        self.clock.lap("load")
        batch, tokens = self.given_batch([self.target(example) for example in examples], prompts)
        sums = self.update(batch, step, examples)
        macs = self.macs(batch).step(rollout=False, reference=False)
        means = reduce_sums(sums | {"macs": macs}, self.world)
        del means["scored"]  # all tokens are
        return means | {"tokens": tokens}

    def loss(self, micro: Batch, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, TokenTerms]:
        return supervised_loss(logprobs, micro.weights)

    def longest_batch(self, prompts: tuple[Prompt, ...]) -> Batch:
        return longest_given(self, self.target, prompts)
