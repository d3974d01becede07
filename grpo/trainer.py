"""GRPO: one step of the algorithm, stage by stage."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hark.from_file import short_name
from hark.grpo.advantage import deviations, equal_rewards, weighted_rewards
from hark.grpo.config import Config
from hark.grpo.instruments.console import PACE, Completion
from hark.grpo.instruments.draft import recorded_advantages
from hark.grpo.instruments.groups import best_and_worst, group_sums, reward_means, shares_of_variance
from hark.grpo.instruments.trackers import Audio
from hark.grpo.learner import MEANS, Learner
from hark.grpo.loss import TokenTerms
from hark.grpo.recorded import recorded_steps
from hark.grpo.reference import Reference, rollout_logprobs
from hark.grpo.refill import Drawn, draw_with_spread
from hark.grpo.rewards import Rewards, StepRewards
from hark.grpo.runtime.collectives import World, check_interrupted, exchange_rows, reduce_sums
from hark.grpo.runtime.sharding import gathered
from hark.grpo.sampler import sample
from hark.grpo.sft import add_supervised, longest_given
from hark.grpo.shared_data import Key, TrainingData
from hark.grpo.types import PolicyBatch, Rollout, stacked
from hark.models.lora import WithoutAdapters
from hark.models.policy import Policy, Prompt

# (examples of a step, count) -> for the first `count` of them the prompts of each control
Controls = Callable[[Sequence[Any], int], Mapping[str, Sequence[Prompt]]]


class Trainer(Learner[PolicyBatch]):
    """Trains a policy by GRPO.

    rewards: returns one column per name in `reward.weights`, in that order; called in a separate thread. An exception
    on one rank ends the step on all.
    reference: the policy of the KL term; None if loss.beta is 0.
    controls: the prompts whose greedy answers are recorded beside those to the questions as they are.
    target: the text of the right answer to an example, for the supervised term of loss.sft.
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
        rewards: Rewards,
        reference: Policy | WithoutAdapters | None = None,
        controls: Controls = lambda examples, count: {},
        target: Callable[[Any], str] | None = None,
        **options: Any,
    ):
        super().__init__(config, world, policy, data=data, **options)
        self.rewards = StepRewards(rewards, config.reward, world)
        self.controls, self.target = controls, target
        self.cursor: int | None = None  # with rollout.refill, where the next step begins in the run's order
        self.group_size = config.rollout.group_size
        self.recorded = recorded_steps(policy, wanted=config.rollout.cuda_graphs)
        completions = config.optim.prompts_per_step * self.group_size
        self.reference = Reference(reference, config.loss, completions=completions)
        self._latest: tuple[Any, ...] = ()  # of the latest step: examples, completions, columns, rewards, advantages

    def step(self, step: int) -> dict[str, float]:
        drawn = (
            self.refilled(step)
            if self.config.rollout.refill
            else self.drawn(self.data.step(step), *self.positions(step))
        )
        examples, prompts, rollout = drawn.examples, drawn.prompts, drawn.rollout
        counted = self.objective.counted(rollout.mask, rollout.stopped)
        totals = reduce_sums({"tokens": rollout.mask.sum(), "counted": counted.sum()}, self.world)
        self.recorder.note(rollout=rollout)
        self.clock.lap("rollout")
        if self.recorder.is_due:
            self.recorder.note(answers=self.answers(examples, prompts, step))
            self.clock.lap("record")

        completions = self.policy.completion_texts(rollout.tokens, rollout.mask)
        repeated = self.repeated(examples)
        self.recorder.note(texts=completions)
        # Rewards are computed during the reference pass.
        pending = self.rewards.start(examples, rollout, completions, step) if drawn.columns is None else None
        self.clock.lap("reward")

        ref_logprobs = self.reference_logprobs(rollout)
        old_logprobs = self.scored_again(rollout)
        self.clock.lap("reference")

        columns = drawn.columns if pending is None else self.rewards.columns(pending)  # (B, K)
        assert columns is not None
        self.rewards.check_failures(step)
        weights = self.rewards.weights(step)
        rewards = weighted_rewards(columns, weights)
        penalties = self.objective.penalties(old_logprobs, ref_logprobs, rollout.mask, self.reference.beta)
        advantages = self.advantages(columns, weights, rollout.mask, penalties)
        shown = recorded_advantages(advantages, rollout.mask)["advantages"]
        self._latest = repeated, completions, columns, rewards, shown
        self.recorder.note(reward_names=list(self.config.reward.weights), columns=columns, rewards=rewards)
        self.clock.lap("reward")

        batch = self.batch(rollout, old_logprobs, ref_logprobs, advantages, counted, totals["counted"])
        batch = self.with_answers(batch, examples)
        updates = [self.update(batch, step, examples) for _ in range(self.config.loss.inner_epochs)]
        # The gap is that of the first update, which scores with the weights that sampled; later ones do not.
        sums = updates[-1] | {"sampler_gap": updates[0]["sampler_gap"]}
        sums |= {"seconds/waiting": drawn.waited / max(self.world.size - 1, 1)}  # the slowest rank has not waited
        metrics = self.report(sums, columns, weights, rewards, rollout, batch, completions)
        metrics |= {"tokens": totals["tokens"]} | drawn.figures | self.reference.figures()
        self.reference.move(self.policy, step)
        self.reference.adapt(metrics.get("kl"))
        self.cursor = drawn.cursor
        return metrics

    def drawn(self, candidates: Sequence[tuple[Any, Prompt, Key]], since: int, positions: Sequence[int]) -> Drawn:
        """Completions of examples at these positions of the run's order, for a step that begins at position `since`."""
        examples, prompts, keys = zip(*candidates, strict=True)
        self.recorder.note(examples=examples, prompts=prompts, keys=keys, positions=positions, since=since)
        self.clock.lap("load")
        rollout = self.draw(prompts, keys)
        began = time.perf_counter()
        check_interrupted(self.world)  # waits for the slowest rank
        waited = time.perf_counter() - began
        self.clock.lap("rollout")
        return Drawn(examples, prompts, keys, rollout, tuple(positions), waited=waited)

    def repeated(self, examples: Sequence[Any]) -> list[Any]:
        """The example of each completion (B) of N examples."""
        return [example for example in examples for _ in range(self.group_size)]

    def refilled(self, step: int) -> Drawn:
        """Completions and rewards of a step, in which groups of equal rewards are replaced (rollout.refill)."""
        prompts = self.config.optim.prompts_per_step
        since = step * prompts if self.cursor is None else self.cursor

        def draw(
            candidates: Sequence[tuple[Any, Prompt, Key]], positions: Sequence[int]
        ) -> tuple[Rollout, torch.Tensor, float]:
            one = self.drawn(candidates, since, positions)
            texts = self.policy.completion_texts(one.rollout.tokens, one.rollout.mask)
            columns = self.rewards.columns(self.rewards.start(one.examples, one.rollout, texts, step))
            self.clock.lap("reward")
            return one.rollout, columns, one.waited

        def spread(columns: torch.Tensor) -> list[bool]:
            rewards = weighted_rewards(columns, self.rewards.weights(step))
            return (~equal_rewards(rewards, group_size=self.group_size)).tolist()

        drawn = draw_with_spread(
            self.data, step, since, prompts=prompts, further=self.config.rollout.refill, world=self.world,
            pad_id=self.policy.pad_id, draw=draw, spread=spread,
        )  # fmt: skip
        self.recorder.note(examples=drawn.examples, prompts=drawn.prompts, keys=drawn.keys, positions=drawn.positions)
        return drawn

    def draw(self, prompts: tuple[Prompt, ...], keys: Sequence[Key], *, stop: bool = True) -> Rollout:
        """Sample completions of prompts with the settings of the configuration; without `stop`, to the token limit.

        After a signal they end at once, and must not be used.
        """
        rollout = self.config.rollout
        with gathered(self.policy):
            return sample(
                self.policy, prompts, keys=keys, group_size=rollout.group_size, max_new_tokens=rollout.max_new_tokens,
                temperature=rollout.temperature, batch=rollout.batch, recorded=self.recorded, stop=stop,
                keep_prefill=rollout.keep_prefill,
                interrupted=self.world.interruption.received,
            )  # fmt: skip

    def answers(self, examples: Sequence[Any], prompts: Sequence[Prompt], step: int) -> list[dict[str, Any]]:
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
        columns = self.rewards.columns(self.rewards.start([*first] * len(asked), rollout, texts, step))
        rewards = [[None if math.isnan(value) else value for value in row] for row in columns.tolist()]
        rows = [{"text": text, "rewards": row} for text, row in zip(texts, rewards, strict=True)]
        return [dict(zip(asked, rows[n :: len(first)], strict=True)) for n in range(len(first))]

    def reference_logprobs(self, rollout: Rollout) -> torch.Tensor | None:
        """Logprobs (B, T) of the completions under the reference; None without one."""
        return None if self.reference.policy is None else self._logprobs(self.reference.policy, rollout)

    def scored_again(self, rollout: Rollout) -> torch.Tensor:
        """Logprobs (B, T) of the completions under the weights that drew them: the sampler's; with loss.importance_cap
        the scorer's, to weigh how much the sampler differs.
        """
        return self._logprobs(self.policy, rollout) if self.config.loss.importance_cap else rollout.logprobs

    def _logprobs(self, policy: Policy | WithoutAdapters, rollout: Rollout) -> torch.Tensor:
        temperature = self.config.rollout.temperature
        branches = self.config.optim.micro_branches
        return self.in_memory(
            lambda: rollout_logprobs(
                policy, rollout, micro_batch=self.micro_batch.size, micro_branches=branches, temperature=temperature
            )
        )

    def advantages(
        self, columns: torch.Tensor, weights: Sequence[float], mask: torch.Tensor, penalties: torch.Tensor | None
    ) -> torch.Tensor:
        """Advantages (B,) or (B, T) of this rank's completions, among those of all ranks."""
        own = [columns, mask] if penalties is None else [columns, mask, penalties]
        parts = exchange_rows([[tensor.cpu() for tensor in own]], self.world)
        every = [stacked(tensors) for tensors in zip(*parts, strict=True)]
        advantages = self.objective.advantages(
            every[0], weights, every[1], None if penalties is None else every[2],
            group_size=self.group_size,
        )  # fmt: skip
        first = self.world.rank * len(mask)
        advantages = advantages[first : first + len(mask)]
        return (advantages if advantages.dim() == 1 else advantages[:, : mask.shape[1]]).to(self.world.device)

    def batch(
        self,
        rollout: Rollout,
        old_logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor | None,
        advantages: torch.Tensor,
        counted: torch.Tensor,
        tokens: float,
    ) -> PolicyBatch:
        """The inputs of the loss. counted: (B, T), the tokens to train on; `tokens` is their number over all ranks."""
        return PolicyBatch(
            prompts=rollout.prompts,
            group_size=rollout.group_size,
            tokens=rollout.tokens,
            mask=rollout.mask,
            weights=self.objective.weights(counted, completions=len(counted) * self.world.size, tokens=tokens),
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            advantages=advantages,
            beta=self.reference.beta,
            regularised=self.reference.in_loss or self.config.loss.entropy > 0,
            sampled_logprobs=None if old_logprobs is rollout.logprobs else rollout.logprobs,
            prefill=rollout.prefill,
        )

    def with_answers(self, batch: PolicyBatch, examples: Sequence[Any]) -> PolicyBatch:
        """The batch with the right answers to its questions, if loss.sft trains on them too."""
        if not self.config.loss.sft:
            return batch
        assert self.target is not None
        given, _ = self.given_batch([self.target(example) for example in examples], batch.prompts)
        return dataclasses.replace(batch, given=given)

    def accumulated(self, batch: PolicyBatch, *, last: bool = True) -> dict[str, float]:
        sums = super().accumulated(batch, last=last and batch.given is None)
        if batch.given is None:
            return sums
        likelihood = add_supervised(self, batch.given, weight=self.config.loss.sft)
        return sums | {"loss": sums["loss"] + self.config.loss.sft * likelihood, "sft_loss": likelihood}

    def loss(
        self, micro: PolicyBatch, logprobs: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, TokenTerms]:
        loss, terms = self.objective.loss(
            logprobs, micro.old_logprobs, micro.ref_logprobs, micro.advantages, micro.weights,
            mask=micro.mask, beta=micro.beta, sampled_logprobs=micro.sampled_logprobs, entropy=entropy,
        )  # fmt: skip
        sampled = micro.old_logprobs if micro.sampled_logprobs is None else micro.sampled_logprobs
        return loss, terms | {"sampler_gap": (logprobs.detach() - sampled).abs()}

    def state(self) -> dict[str, Any]:
        own = {"beta": self.reference.beta, "cursor": self.cursor, "failing": self.rewards.failing}
        return super().state() | own

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.cursor = state.get("cursor")
        self.rewards.failing = list(state.get("failing", []))
        self.reference.restore(state)

    def prepare(self, step: int) -> None:
        if not self.config.rollout.refill or self.cursor is None:
            return super().prepare(step)
        positions = range(self.cursor, self.cursor + self.config.optim.prompts_per_step)
        self.data.prepare_at(step, self.data.share(positions), since=self.cursor)

    def further_policies(self) -> dict[str, Policy]:
        return self.reference.further_policies()

    def report(
        self,
        sums: dict[str, float],
        columns: torch.Tensor,
        weights: Sequence[float],
        rewards: torch.Tensor,
        rollout: Rollout,
        batch: PolicyBatch,
        texts: Sequence[str],
    ) -> dict[str, float]:
        """The metrics of a step over all ranks, by one all-reduce."""
        completions = len(rewards) * self.world.size
        groups = completions // self.group_size
        macs = self.macs(batch).step(
            reference=self.reference.policy is not None, updates=self.config.loss.inner_epochs,
            keep_prefill=self.config.rollout.keep_prefill,
        )  # fmt: skip
        if batch.given is not None:
            macs += self.macs(batch.given).step(rollout=False, reference=False, updates=self.config.loss.inner_epochs)
        own: dict[str, Any] = {
            "macs": macs,
            "reward": rewards.nansum() / completions,
            "reward_std": deviations(rewards, group_size=self.group_size).sum() / groups,
            "equal_reward_share": equal_rewards(rewards, group_size=self.group_size).sum() / groups,
            "skipped_share": (len(batch.prompts) - len(batch.groups_with_gradient())) / groups,
            "stopped_share": rollout.stopped.sum() / completions,
            "completion_tokens": rollout.mask.sum() / completions,
        }
        for name, column in zip(self.config.reward.weights, columns.T, strict=True):
            own |= {f"reward/{short_name(name)}": column.nansum(), f"given/{short_name(name)}": (~column.isnan()).sum()}
        by_name = dict(zip(self.config.reward.weights, weights, strict=True))
        own |= group_sums(columns, texts, weights=by_name, group_size=self.group_size, groups=groups)
        means = reward_means(shares_of_variance(reduce_sums(sums | own | self.rewards.take_figures(), self.world)))
        scored = means.pop("scored")  # the total weight of the scored tokens; 1 if no group was skipped
        of_scored = {name: means.pop(name) for name in MEANS.values() if name in means}
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
        old, ref = self.scored_again(rollout), self.reference_logprobs(rollout)
        batch = self.batch(rollout, old, ref, advantages, rollout.mask, tokens)
        if not self.config.loss.sft:
            return batch
        assert self.target is not None
        return dataclasses.replace(batch, given=longest_given(self, self.target, prompts))
