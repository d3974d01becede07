"""GRPO: one step of the algorithm, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from hark.from_file import short_name
from hark.grpo.advantage import equal_rewards, group_advantages, weighted_rewards
from hark.grpo.config import Config
from hark.grpo.instruments.console import PACE, Completion
from hark.grpo.instruments.groups import best_and_worst, group_sums, shares_of_variance
from hark.grpo.instruments.trackers import Audio
from hark.grpo.learner import Key, Learner, TrainingData
from hark.grpo.loss import TokenTerms, policy_loss
from hark.grpo.runtime.collectives import World, reduce_sums
from hark.grpo.runtime.sharding import gathered, release
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.types import PolicyBatch, Rollout
from hark.models.lora import WithoutAdapters
from hark.models.policy import Policy, Prompt

RewardMatrix = Callable[[Sequence[Any], Sequence[str]], torch.Tensor]  # (examples, completions), B each -> (B, K)
# (examples of a step, count) -> for the first `count` of them the prompts of each control
Controls = Callable[[Sequence[Any], int], Mapping[str, Sequence[Prompt]]]


class Trainer(Learner[PolicyBatch]):
    """Trains a policy by GRPO.

    rewards: returns one column per name in `reward.weights`, in that order; called in a separate thread.
    reference: the frozen policy of the KL term; None if loss.beta is 0.
    controls: the prompts whose greedy answers are recorded beside those to the questions as they are.
    """

    shown = (
        "reward", "reward/accuracy", "equal_reward_share", "reward/format", "completion_tokens",
        "kl", "entropy", "loss", "grad_norm", PACE, "sampler_gap",
    )  # fmt: skip

    def __init__(
        self,
        config: Config,
        world: World,
        policy: Policy,
        *,
        data: TrainingData,
        rewards: RewardMatrix,
        reference: Policy | WithoutAdapters | None = None,
        controls: Controls = lambda examples, count: {},
        **options: Any,
    ):
        super().__init__(config, world, policy, data=data, **options)
        self.rewards, self.reference, self.controls = rewards, reference, controls
        self.group_size = config.rollout.group_size
        self._reward_thread = ThreadPoolExecutor(1, "rewards")
        self._latest: tuple[Any, ...] = ()  # of the latest step: examples, completions, columns, rewards, advantages

    def step(self, step: int) -> dict[str, float]:
        examples, prompts, keys = zip(*self.data.step(step), strict=True)
        self.recorder.note(examples=examples, prompts=prompts, keys=keys)
        self.clock.lap("load")

        rollout = self.draw(prompts, keys)
        own, began = float(rollout.mask.sum()), time.perf_counter()
        tokens = reduce_sums({"tokens": own}, self.world)["tokens"]  # waits for the slowest rank
        waited = time.perf_counter() - began
        self.recorder.note(rollout=rollout)
        self.clock.lap("rollout")
        if self.recorder.is_due:
            self.recorder.note(answers=self.answers(examples, prompts))
            self.clock.lap("record")

        completions = self.policy.completion_texts(rollout.tokens, rollout.mask)
        repeated = [example for example in examples for _ in range(self.group_size)]
        self.recorder.note(texts=completions)
        pending = self._reward_thread.submit(self.rewards, repeated, completions)  # runs during the reference pass
        self.clock.lap("reward")

        ref_logprobs = self.reference_logprobs(rollout)
        self.clock.lap("reference")

        columns = pending.result().to(self.world.device)  # (B, K)
        rewards = weighted_rewards(columns, list(self.config.reward.weights.values()))
        advantages = group_advantages(rewards, group_size=self.group_size, scale=self.config.loss.advantage)
        self._latest = repeated, completions, columns, rewards, advantages
        self.recorder.note(reward_names=list(self.config.reward.weights), columns=columns, rewards=rewards)
        self.clock.lap("reward")

        batch = self.batch(rollout, ref_logprobs, advantages, tokens)
        updates = [self.update(batch, step, examples) for _ in range(self.config.loss.inner_epochs)]
        # The gap is that of the first update, which scores with the weights that sampled; later ones do not.
        sums = updates[-1] | {"sampler_gap": updates[0]["sampler_gap"]}
        sums |= {"seconds/waiting": waited / max(self.world.size - 1, 1)}  # the slowest rank has not waited
        return self.report(sums, columns, rewards, rollout, batch, completions) | {"tokens": tokens}

    def draw(self, prompts: tuple[Prompt, ...], keys: Sequence[Key], *, stop: bool = True) -> Rollout:
        """Sample completions of prompts with the settings of the configuration; without `stop`, to the token limit."""
        rollout = self.config.rollout
        with gathered(self.policy):
            return sample(
                self.policy, prompts, keys=keys, group_size=rollout.group_size, max_new_tokens=rollout.max_new_tokens,
                temperature=rollout.temperature, batch=rollout.batch, graphs=rollout.cuda_graphs, stop=stop,
            )  # fmt: skip

    def answers(self, examples: Sequence[Any], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Greedy answers to the first `record.answers` questions: {"greedy": ..., "silent": ...} for each of them."""
        first = examples[: self.config.record.answers]
        asked = {"greedy": prompts[: len(first)], **self.controls(examples, len(first))}
        flat = [prompt for variants in asked.values() for prompt in variants]
        if not flat:
            return []
        with gathered(self.policy):
            rollout = sample(
                self.policy, flat, group_size=1, max_new_tokens=self.config.rollout.max_new_tokens, temperature=0
            )
        texts = self.policy.completion_texts(rollout.tokens, rollout.mask)
        rewards = self.rewards([*first] * len(asked), texts).tolist()
        rows = [{"text": text, "rewards": row} for text, row in zip(texts, rewards, strict=True)]
        return [dict(zip(asked, rows[n :: len(first)], strict=True)) for n in range(len(first))]

    @torch.no_grad()
    def reference_logprobs(self, rollout: Rollout) -> torch.Tensor | None:
        """Logprobs (B, T) of the completions under the reference, `optim.micro_batch` groups at a time."""
        if self.reference is None:
            return None
        logprobs = torch.zeros_like(rollout.logprobs)
        for groups in rollout.split_by_length(self.config.optim.micro_batch):
            micro = rollout.select(groups)
            part, _ = score(
                self.reference, micro.prompts, micro.tokens, micro.mask,
                group_size=micro.group_size, temperature=self.config.rollout.temperature,
            )  # fmt: skip
            logprobs[rollout.rows(groups), : part.shape[1]] = part
        if isinstance(self.reference, Policy):
            release(self.reference)
        return logprobs

    def batch(
        self, rollout: Rollout, ref_logprobs: torch.Tensor | None, advantages: torch.Tensor, tokens: float
    ) -> PolicyBatch:
        """The inputs of the loss; `tokens` is the number of completion tokens over all ranks."""
        return PolicyBatch(
            prompts=rollout.prompts,
            group_size=rollout.group_size,
            tokens=rollout.tokens,
            mask=rollout.mask,
            weights=self.weights(rollout.mask, tokens),
            old_logprobs=rollout.logprobs,
            ref_logprobs=ref_logprobs,
            advantages=advantages,
        )

    def loss(self, micro: PolicyBatch, logprobs: torch.Tensor) -> tuple[torch.Tensor, TokenTerms]:
        loss, terms = policy_loss(
            logprobs,
            micro.old_logprobs,
            micro.ref_logprobs,
            micro.advantages,
            micro.weights,
            clip_low=self.config.loss.clip_low,
            clip_high=self.config.loss.clip_high,
            beta=self.config.loss.beta,
        )
        return loss, terms | {"sampler_gap": (logprobs.detach() - micro.old_logprobs).abs()}

    def report(
        self,
        sums: dict[str, float],
        columns: torch.Tensor,
        rewards: torch.Tensor,
        rollout: Rollout,
        batch: PolicyBatch,
        texts: Sequence[str],
    ) -> dict[str, float]:
        """The metrics of a step over all ranks, by one all-reduce."""
        completions = len(rewards) * self.world.size
        groups = completions // self.group_size
        macs = self.macs(batch).step(reference=self.reference is not None, updates=self.config.loss.inner_epochs)
        own: dict[str, Any] = {
            "macs": macs,
            "reward": rewards.sum() / completions,
            "reward_std": rewards.unflatten(0, (-1, self.group_size)).std(dim=1).sum() / groups,
            "equal_reward_share": equal_rewards(rewards, group_size=self.group_size).sum() / groups,
            "skipped_share": (len(batch.prompts) - len(batch.groups_with_gradient())) / groups,
            "stopped_share": rollout.stopped.sum() / completions,
            "completion_tokens": rollout.mask.sum() / completions,
        }
        for name, column in zip(self.config.reward.weights, columns.T, strict=True):
            own[f"reward/{short_name(name)}"] = column.sum() / completions
        own |= group_sums(columns, texts, weights=self.config.reward.weights, group_size=self.group_size, groups=groups)
        means = shares_of_variance(reduce_sums(sums | own, self.world))
        scored = means.pop("scored")  # the total weight of the scored tokens; 1 if no group was skipped
        of_scored = {name: means.pop(name) for name in ("clip_share", "entropy", "sampler_gap")}
        return means | ({name: value / scored for name, value in of_scored.items()} if scored else {})

    def completions(self) -> list[Completion]:
        """The best and the worst completion of a few groups of the latest step."""
        if not self._latest:
            return []
        return best_and_worst(*self._latest, names=self.config.reward.weights, group_size=self.group_size)

    def clips(self) -> dict[str, Audio]:
        """The first clip of each question of `completions`: "clips/1" is that of the first question."""
        examples = {str(example.id): example for example in self._latest[0]} if self._latest else {}
        questions = dict.fromkeys(one.id for one in self.completions())
        heard = [self.listen(examples[question])[:1] for question in questions]
        return {f"clips/{n}": clip for n, first in enumerate(heard, 1) for clip in first}

    def longest_batch(self, prompts: tuple[Prompt, ...]) -> PolicyBatch:
        rollout = self.draw(prompts, [(n,) for n in range(len(prompts))], stop=False)
        advantages = torch.ones(len(rollout.tokens), device=self.world.device)  # 0 would give no gradient
        tokens = rollout.mask.numel() * self.world.size
        return self.batch(rollout, self.reference_logprobs(rollout), advantages, tokens)
