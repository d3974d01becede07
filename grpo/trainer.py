"""GRPO: one step of the algorithm, stage by stage."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from hark import UserError
from hark.from_file import short_name
from hark.grpo.advantage import deviations, equal_rewards, weighted_rewards
from hark.grpo.config import Config
from hark.grpo.instruments.console import PACE, Completion
from hark.grpo.instruments.groups import best_and_worst, group_sums, reward_means, shares_of_variance
from hark.grpo.instruments.trackers import Audio
from hark.grpo.learner import MEANS, Key, Learner, TrainingData
from hark.grpo.loss import TokenTerms, adapted_beta, supervised_loss
from hark.grpo.refill import Drawn, draw_with_spread
from hark.grpo.reward_weights import weights_at
from hark.grpo.runtime.collectives import World, exchange_rows, reduce_max, reduce_sums
from hark.grpo.runtime.sharding import gathered, mix_weights, release
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.types import PolicyBatch, Rollout
from hark.models.lora import WithoutAdapters
from hark.models.policy import Policy, Prompt


class Judged(Protocol):
    """The rewards of completions: columns (B, K), NaN where one was not given; failed calls; sums to log."""

    @property
    def columns(self) -> torch.Tensor: ...

    @property
    def failures(self) -> Sequence[Any]: ...

    @property
    def figures(self) -> Mapping[str, float]: ...


# (N examples, B texts, B lists of ids, B times whether it stopped, step) -> rewards
Rewards = Callable[[Sequence[Any], Sequence[str], Sequence[Sequence[int]], Sequence[bool], int], Judged]
# (examples of a step, count) -> for the first `count` of them the prompts of each control
Controls = Callable[[Sequence[Any], int], Mapping[str, Sequence[Prompt]]]


class Trainer(Learner[PolicyBatch]):
    """Trains a policy by GRPO.

    rewards: returns one column per name in `reward.weights`, in that order; called in a separate thread. An exception
    on one rank ends the step on all.
    reference: the frozen policy of the KL term; None if loss.beta is 0.
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
        self.rewards, self.reference, self.controls, self.target = rewards, reference, controls, target
        self.beta = config.loss.beta  # of the next step; with loss.kl_target it changes
        self.cursor: int | None = None  # with rollout.refill, where the next step begins in the run's order
        self.group_size = config.rollout.group_size
        self._reward_thread = ThreadPoolExecutor(1, "rewards")
        self._figures: Counter[str] = Counter()  # this rank's sums of the step: failed rewards, tokens of judges
        self._latest: tuple[Any, ...] = ()  # of the latest step: examples, completions, columns, rewards, advantages

    def step(self, step: int) -> dict[str, float]:
        drawn = self.refilled(step) if self.config.rollout.refill else self.drawn(self.data.step(step))
        examples, prompts, rollout = drawn.examples, drawn.prompts, drawn.rollout
        counted = self.objective.counted(rollout.mask, rollout.stopped)
        own, began = {"tokens": float(rollout.mask.sum()), "counted": float(counted.sum())}, time.perf_counter()
        totals = reduce_sums(own, self.world)  # waits for the slowest rank
        waited = time.perf_counter() - began + drawn.waited
        self.recorder.note(rollout=rollout, positions=drawn.positions, since=drawn.since)
        self.clock.lap("rollout")
        if self.recorder.is_due:
            self.recorder.note(answers=self.answers(examples, prompts, step))
            self.clock.lap("record")

        completions = self.policy.completion_texts(rollout.tokens, rollout.mask)
        repeated = self.repeated(examples)
        self.recorder.note(texts=completions)
        pending = None
        if drawn.columns is None:
            pending = self._reward_thread.submit(
                self.judge, examples, rollout, completions, step
            )  # runs during the reference pass
        self.clock.lap("reward")

        ref_logprobs = self.reference_logprobs(rollout)
        old_logprobs = self.scored_again(rollout)
        self.clock.lap("reference")

        columns = drawn.columns if pending is None else self.agreed(pending.result)  # (B, K)
        assert columns is not None
        weights = self.reward_weights(step)
        rewards = weighted_rewards(columns, weights)
        penalties = self.objective.penalties(old_logprobs, ref_logprobs, rollout.mask, self.beta)
        advantages = self.advantages(columns, weights, rollout.mask, penalties)
        self._latest = repeated, completions, columns, rewards, advantages
        self.recorder.note(reward_names=list(self.config.reward.weights), columns=columns, rewards=rewards)
        self.clock.lap("reward")

        batch = self.batch(rollout, old_logprobs, ref_logprobs, advantages, counted, totals["counted"])
        batch = self.with_answers(batch, examples)
        updates = [self.update(batch, step, examples) for _ in range(self.config.loss.inner_epochs)]
        # The gap is that of the first update, which scores with the weights that sampled; later ones do not.
        sums = updates[-1] | {"sampler_gap": updates[0]["sampler_gap"]}
        sums |= {"seconds/waiting": waited / max(self.world.size - 1, 1)}  # the slowest rank has not waited
        metrics = self.report(sums, columns, weights, rewards, rollout, batch, completions) | {
            "tokens": totals["tokens"]
        }
        self.move_reference(step)
        self.cursor = drawn.cursor
        return metrics | drawn.figures | self.adapt_beta(metrics)

    def drawn(self, candidates: Sequence[tuple[Any, Prompt, Key]]) -> Drawn:
        """Completions of examples."""
        examples, prompts, keys = zip(*candidates, strict=True)
        self.recorder.note(examples=examples, prompts=prompts, keys=keys)
        self.clock.lap("load")
        rollout = self.draw(prompts, keys)
        self.clock.lap("rollout")
        return Drawn(examples, prompts, keys, rollout)

    def judge(self, examples: Sequence[Any], rollout: Rollout, texts: Sequence[str], step: int) -> Judged:
        """The rewards of the completions of N examples."""
        rows = zip(rollout.tokens.tolist(), rollout.mask.sum(dim=1).tolist(), strict=True)
        return self.rewards(examples, texts, [ids[:length] for ids, length in rows], rollout.stopped.tolist(), step)

    def agreed(self, judge: Callable[[], Judged]) -> torch.Tensor:
        """The columns (B, K) that `judge` returns. What it raises on one rank is raised on all: none waits for another.

        Raises the exception itself where it occurred, and a UserError with its message on the other ranks.
        """
        failure = None
        try:
            judged = judge()
        except Exception as error:
            failure = error
        if reduce_max(failure is not None, self.world):
            found = exchange_rows([] if failure is None else [f"rank {self.world.rank}: {failure}"], self.world)
            raise failure or UserError("; ".join(found))
        self._figures.update({"reward_failures": len(judged.failures)} | dict(judged.figures))
        return judged.columns.to(self.world.device)

    def reward_weights(self, step: int) -> list[float]:
        return weights_at(self.config.reward.weights, self.config.reward.schedule, step)

    def repeated(self, examples: Sequence[Any]) -> list[Any]:
        """The example of each completion (B) of N examples."""
        return [example for example in examples for _ in range(self.group_size)]

    def refilled(self, step: int) -> Drawn:
        """Completions and rewards of a step, in which groups of equal rewards are replaced (rollout.refill)."""

        def draw(candidates: Sequence[tuple[Any, Prompt, Key]]) -> tuple[Rollout, torch.Tensor]:
            one = self.drawn(candidates)
            texts = self.policy.completion_texts(one.rollout.tokens, one.rollout.mask)
            columns = self.agreed(self._reward_thread.submit(self.judge, one.examples, one.rollout, texts, step).result)
            self.clock.lap("reward")
            return one.rollout, columns

        def spread(columns: torch.Tensor) -> list[bool]:
            rewards = weighted_rewards(columns, self.reward_weights(step))
            return (~equal_rewards(rewards, group_size=self.group_size)).tolist()

        prompts = self.config.optim.prompts_per_step
        drawn = draw_with_spread(
            self.data, step, step * prompts if self.cursor is None else self.cursor, prompts=prompts,
            further=self.config.rollout.refill, world=self.world, pad_id=self.policy.pad_id, draw=draw, spread=spread,
        )  # fmt: skip
        self.recorder.note(examples=drawn.examples, prompts=drawn.prompts, keys=drawn.keys)
        return drawn

    def draw(self, prompts: tuple[Prompt, ...], keys: Sequence[Key], *, stop: bool = True) -> Rollout:
        """Sample completions of prompts with the settings of the configuration; without `stop`, to the token limit."""
        rollout = self.config.rollout
        with gathered(self.policy):
            return sample(
                self.policy, prompts, keys=keys, group_size=rollout.group_size, max_new_tokens=rollout.max_new_tokens,
                temperature=rollout.temperature, batch=rollout.batch, graphs=rollout.cuda_graphs, stop=stop,
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
        columns = self.agreed(lambda: self.judge([*first] * len(asked), rollout, texts, step))
        rewards = [[None if math.isnan(value) else value for value in row] for row in columns.tolist()]
        rows = [{"text": text, "rewards": row} for text, row in zip(texts, rewards, strict=True)]
        return [dict(zip(asked, rows[n :: len(first)], strict=True)) for n in range(len(first))]

    @torch.no_grad()
    def reference_logprobs(self, rollout: Rollout) -> torch.Tensor | None:
        """Logprobs (B, T) of the completions under the reference, `optim.micro_batch` groups at a time."""
        return None if self.reference is None else self._logprobs(self.reference, rollout)

    @torch.no_grad()
    def scored_again(self, rollout: Rollout) -> torch.Tensor:
        """Logprobs (B, T) of the completions under the weights that drew them: the sampler's, or, to weigh how much the
        sampler differs (loss.importance_cap), the scorer's."""
        return self._logprobs(self.policy, rollout) if self.config.loss.importance_cap else rollout.logprobs

    def _logprobs(self, policy: Policy | WithoutAdapters, rollout: Rollout) -> torch.Tensor:
        logprobs = torch.zeros_like(rollout.logprobs)
        for groups in rollout.split_by_length(self.config.optim.micro_batch):
            micro = rollout.select(groups)
            part, _ = score(
                policy, micro.prompts, micro.tokens, micro.mask,
                group_size=micro.group_size, temperature=self.config.rollout.temperature,
            )  # fmt: skip
            logprobs[rollout.rows(groups), : part.shape[1]] = part
        if isinstance(policy, Policy):
            release(policy)
        return logprobs

    def advantages(
        self, columns: torch.Tensor, weights: Sequence[float], mask: torch.Tensor, penalties: torch.Tensor | None
    ) -> torch.Tensor:
        """Advantages (B,) or (B, T) of this rank's completions, among those of all ranks."""
        own = [columns, mask] if penalties is None else [columns, mask, penalties]
        parts = exchange_rows([[tensor.cpu() for tensor in own]], self.world)
        every = [_joined(tensors) for tensors in zip(*parts, strict=True)]
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
        loss = self.config.loss
        return PolicyBatch(
            prompts=rollout.prompts,
            group_size=rollout.group_size,
            tokens=rollout.tokens,
            mask=rollout.mask,
            weights=self.objective.weights(counted, completions=len(counted) * self.world.size, tokens=tokens),
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            advantages=advantages,
            beta=self.beta,
            regularised=self.reference is not None and loss.kl_in == "loss" or loss.entropy > 0,
            sampled_logprobs=None if old_logprobs is rollout.logprobs else rollout.logprobs,
        )

    def with_answers(self, batch: PolicyBatch, examples: Sequence[Any]) -> PolicyBatch:
        """The batch with the right answers to its questions, if loss.sft trains on them too."""
        if not self.config.loss.sft:
            return batch
        assert self.target is not None
        given, _ = self.given_batch([self.target(example) for example in examples], batch.prompts)
        return dataclasses.replace(batch, given=given)

    def accumulate(self, batch: PolicyBatch) -> dict[str, float]:
        sums = super().accumulate(batch)
        if batch.given is None:
            return sums
        supervised = 0.0
        for _, micro in self.micro_batches(batch.given):
            logprobs, _ = score(
                self.policy, micro.prompts, micro.tokens, micro.mask, group_size=1,
                temperature=self.config.rollout.temperature,
            )  # fmt: skip
            loss = self.config.loss.sft * supervised_loss(logprobs, micro.weights)[0]
            loss.backward()
            supervised += float(loss.detach())
        return sums | {"loss": sums["loss"] + supervised, "sft_loss": supervised / self.config.loss.sft}

    def loss(
        self, micro: PolicyBatch, logprobs: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, TokenTerms]:
        loss, terms = self.objective.loss(
            logprobs, micro.old_logprobs, micro.ref_logprobs, micro.advantages, micro.weights,
            mask=micro.mask, beta=micro.beta, sampled_logprobs=micro.sampled_logprobs, entropy=entropy,
        )  # fmt: skip
        sampled = micro.old_logprobs if micro.sampled_logprobs is None else micro.sampled_logprobs
        return loss, terms | {"sampler_gap": (logprobs.detach() - sampled).abs()}

    def move_reference(self, step: int) -> None:
        """After a step: move the reference towards the policy where loss.reference_every says so."""
        every = self.config.loss.reference_every
        if every and (step + 1) % every == 0:
            assert isinstance(self.reference, Policy)
            mix_weights(self.policy, self.reference, share=self.config.loss.reference_mix)

    def adapt_beta(self, metrics: dict[str, float]) -> dict[str, float]:
        """After a step: adapt beta to the KL of the step if loss.kl_target says so; returns the beta of the step."""
        loss = self.config.loss
        if loss.kl_target is None:
            return {}
        used, completions = self.beta, self.config.optim.prompts_per_step * self.group_size
        self.beta = adapted_beta(
            used, metrics.get("kl", loss.kl_target), target=loss.kl_target, completions=completions,
            horizon=loss.kl_horizon,
        )  # fmt: skip
        return {"beta": used}

    def state(self) -> dict[str, Any]:
        return super().state() | {"beta": self.beta, "cursor": self.cursor}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.cursor = state.get("cursor")
        if self.config.loss.kl_target is not None:
            self.beta = state.get("beta", self.beta)

    def further_policies(self) -> dict[str, Policy]:
        if not self.config.loss.reference_every:
            return {}
        assert isinstance(self.reference, Policy)
        return {"reference": self.reference}

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
        macs = self.macs(batch).step(reference=self.reference is not None, updates=self.config.loss.inner_epochs)
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
        shown = dict(zip(self.config.reward.weights, weights, strict=True))
        own |= group_sums(columns, texts, weights=shown, group_size=self.group_size, groups=groups)
        means = reward_means(shares_of_variance(reduce_sums(sums | own | self._figures, self.world)))
        self._figures.clear()
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
        return self.batch(rollout, old, ref, advantages, rollout.mask, tokens)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all parts (B, X) of one tensor, each padded with 0 to the widest."""
    widest = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, widest - part.shape[1])) for part in parts])
