"""GRPO. `Trainer.step` is the algorithm, top to bottom; the rest of the file is what stands around it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from hark.grpo.advantage import equal_rewards, group_advantages
from hark.grpo.config import Config, to_yaml
from hark.grpo.evaluate import Judge, accuracies, evaluate
from hark.grpo.instruments.flops import Macs, best_matmul_rate, cost_of, macs
from hark.grpo.instruments.metrics import Metrics, Phases, peak_gib, restart_peak, speed
from hark.grpo.instruments.trace import nonfinite_rows, write_step
from hark.grpo.loss import MetricSums, policy_loss, token_weights
from hark.grpo.optimizer import allocate_moments, build_optimizer, clip_gradients, learning_rate
from hark.grpo.runtime.checkpoint import export, export_adapters, load_checkpoint, save_checkpoint
from hark.grpo.runtime.collectives import World, reduce_max, reduce_sums
from hark.grpo.runtime.sharding import gathered, release
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.types import Batch, Groups, Rollout
from hark.models.lora import WithoutAdapters
from hark.models.policy import Policy, Prompt

Pairs = Sequence[tuple[Any, Prompt]]  # (example, prompt)
RewardMatrix = Callable[[Sequence[Any], Sequence[str]], torch.Tensor]  # (examples, completions), B each -> (B, K)


class TrainingData(Protocol):
    """Where prompts come from: a pure function of the step, so that resume needs no state."""

    def step(self, step: int) -> Pairs:
        """This rank's examples and prompts of a step; the next one is prepared meanwhile."""

    def prepare(self, step: int) -> None:
        """Begin to prepare a step."""

    def key(self, step: int, example: Any) -> tuple[int, ...]:
        """What the draws for an example in a step are a function of."""

    def longest(self) -> tuple[Any, Prompt]:
        """The example with the longest prompt."""

    examples: Sequence[Any]  # all that there are


class MemoryProbeError(RuntimeError):
    """The longest step does not fit in memory."""


class NonFiniteError(RuntimeError):
    """A number that is not one, in the middle of a step."""


class Trainer:
    """Trains a policy by GRPO, one `step` at a time.

    reference: the frozen policy of the KL term; None where loss.beta is 0.
    rewards: gives one column per name in `reward.weights`, in that order; called in a thread of its own.
    validation: this rank's batches of (example, prompt) pairs, made anew at each call.
    """

    shown = ("reward", "reward/accuracy", "kl", "entropy", "loss", "grad_norm", "sampler_gap")

    def __init__(
        self,
        config: Config,
        world: World,
        policy: Policy,
        *,
        data: TrainingData,
        rewards: RewardMatrix | None = None,
        reference: Policy | WithoutAdapters | None = None,
        validation: Callable[[], Iterable[Pairs]] | None = None,
        judge: Judge | None = None,
    ):
        self.config, self.world, self.policy, self.reference = config, world, policy, reference
        self.data, self.rewards, self.validation, self.judge = data, rewards, validation, judge
        self.directory = Path(config.run.directory)
        optim = config.optim
        self.optimizer = build_optimizer(policy, weight_decay=optim.weight_decay, betas=(optim.beta1, optim.beta2))
        self.cost = cost_of(policy)
        self.metrics = Metrics(self.directory, rank=world.rank, total_steps=optim.steps, show=self.shown)
        self.phases = Phases(world.device)

    def step(self, step: int) -> dict[str, float]:
        """One step of GRPO; metrics as means over all ranks."""
        group_size = self.config.rollout.group_size
        with self.phases("load"):
            examples, prompts = zip(*self.data.step(step), strict=True)
        with self.phases("rollout"):
            rollout = self._draw(prompts, [self.data.key(step, example) for example in examples])
        with ThreadPoolExecutor(1, "rewards") as thread:  # rewards need the texts alone: the reference scores meanwhile
            with self.phases("reward"):
                completions = self.policy.completion_texts(rollout.tokens, rollout.mask)
                siblings = [example for example in examples for _ in range(group_size)]
                pending = thread.submit(self.rewards, siblings, completions)
            with self.phases("reference"):
                ref_logprobs = self._reference_logprobs(rollout)
            with self.phases("reward"):
                columns = pending.result().to(self.world.device)  # (B, K)
                rewards = columns @ columns.new_tensor(list(self.config.reward.weights.values()))
                advantages = group_advantages(rewards, group_size=group_size, scale=self.config.loss.advantage)
        # Without a reference it is here that ranks wait for the longest rollout.
        tokens = reduce_sums({"tokens": rollout.mask.sum()}, self.world)["tokens"]
        batch = Batch(
            prompts=rollout.prompts,
            group_size=group_size,
            tokens=rollout.tokens,
            mask=rollout.mask,
            old_logprobs=rollout.logprobs,
            ref_logprobs=ref_logprobs,
            advantages=advantages,
            weights=self._weights(rollout.mask, tokens),
        )
        updates = [self.update(batch, step, examples) for _ in range(self.config.loss.inner_epochs)]
        # Only before the first update do the sampler and the scorer see the same weights.
        sums = updates[-1] | {"sampler_gap": updates[0]["sampler_gap"]}
        return self._report(sums, columns, rewards, rollout, batch) | {"tokens": tokens}

    def loss(self, micro: Batch, logprobs: torch.Tensor) -> tuple[torch.Tensor, MetricSums]:
        """The loss of a micro-batch and what to report of it, to be summed over micro-batches and ranks."""
        loss, sums = policy_loss(
            logprobs,
            micro.old_logprobs,
            micro.ref_logprobs,
            micro.advantages,
            micro.weights,
            clip_low=self.config.loss.clip_low,
            clip_high=self.config.loss.clip_high,
            beta=self.config.loss.beta,
        )
        gap = (logprobs.detach() - micro.old_logprobs).abs()
        return loss, sums | {"sampler_gap": (micro.weights * gap).sum(), "scored": micro.weights.sum()}

    def update(self, batch: Batch, step: int, examples: Sequence[Any]) -> dict[str, float]:
        """One optimizer step on a batch; this rank's share of each metric."""
        with self.phases("forward_backward"):
            sums = self.accumulate(batch)
        with self.phases("optimizer"):
            norm = clip_gradients(self.policy, self.config.optim.clip_norm)
            self._check_finite({"the loss": sums["loss"], "the gradient": norm}, batch, step, examples)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            self.optimizer.step()
            self.optimizer.zero_grad()
        # Each rank reports its share, so that the sum over ranks is the norm.
        return sums | {"grad_norm": norm / self.world.size}

    def accumulate(self, batch: Batch) -> dict[str, float]:
        """Add the gradient of a batch, micro-batch by micro-batch; this rank's share of each metric."""
        sums: MetricSums = {}
        for micro in self._micro_batches(batch):
            logprobs, entropy = self._score(self.policy, micro)
            loss, parts = self.loss(micro, logprobs)
            loss.backward()
            parts |= {"entropy": (micro.weights * entropy).sum()}
            sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
        return {name: float(value) for name, value in sums.items()}  # only now: a GPU would be waited for each time

    # Around the algorithm.

    def train(self) -> None:
        """All steps from the first or the newest checkpoint on, with evaluations, checkpoints and the export.

        `check_run_directory` must have passed.
        """
        self.probe()
        config = self.config
        rate = best_matmul_rate(self.world.device, getattr(torch, config.model.dtype))
        rate = reduce_sums({"rate": rate}, self.world)["rate"]  # of all ranks together, measured while all are at it
        start = self._start()
        self.data.prepare(start)
        if start == 0 and config.evaluation.before:
            self._evaluate(0)
        for step in range(start, config.optim.steps):
            self.phases.start()
            self.world.meter.start()
            restart_peak(self.world.device)
            metrics = self.step(step) | {"lr": self.learning_rate(step), "memory/peak_gib": peak_gib(self.world.device)}
            seconds, done = self.phases.seconds(), step + 1
            measured = seconds | self.world.meter.measured() | speed(metrics, seconds["seconds/step"], rate=rate)
            self.metrics.log(done, metrics | measured)
            last = done == config.optim.steps
            if config.checkpoint.every and (done % config.checkpoint.every == 0 or last):
                save_checkpoint(
                    self.directory / "checkpoints", done, self.policy, self.optimizer, self.world,
                    keep=config.checkpoint.keep, keep_weights=config.checkpoint.weights,
                )  # fmt: skip
            if config.evaluation.every and (done % config.evaluation.every == 0 or last):
                self._evaluate(done)
        self.metrics.close()
        if config.checkpoint.export:
            export(self.policy, self.directory / "model", self.world)
            if self.policy.lora is not None:
                export_adapters(self.policy, self.directory / "adapters", self.world)

    def probe(self) -> None:
        """Do the most that a step can ask for, the longest prompt with the longest completions, and change nothing.

        So what does not fit in memory fails now, not when the longest prompt comes. Raises MemoryProbeError.
        """
        example, prompt = self.data.longest()
        prompts = (prompt,) * (self.config.optim.prompts_per_step // self.world.size)
        try:
            allocate_moments(self.optimizer)  # they come with the first step; the ones after it must fit beside them
            if self.validation is not None:
                self._draw_longest((prompt,) * self.config.evaluation.batch, group_size=1, batch=None)
            batch = self.longest_batch(prompts)
            self.accumulate(batch)
        except torch.OutOfMemoryError as error:
            raise MemoryProbeError(
                f"out of memory on rank {self.world.rank} with {example.line or example.id}, a prompt of "
                f"{len(prompt.ids)} tokens, the longest of the data ({error}); launch/plan.py with the same arguments "
                "says what to change"
            ) from error
        self.optimizer.zero_grad()
        self.optimizer.state.clear()
        if self.world.is_main:
            size, tokens = batch.group_size, batch.tokens.shape[1]
            print(
                f"the longest step fits: {len(prompts)} prompts of {len(prompt.ids)} tokens on each rank, {size} x "
                f"{tokens} new tokens; peak {peak_gib(self.world.device):.2f} GiB on rank 0",
                flush=True,
            )

    def longest_batch(self, prompts: tuple[Prompt, ...]) -> Batch:
        """A batch of these prompts with completions as long as may be, after the rollout and the reference pass."""
        rollout = self._draw_longest(prompts)
        return Batch(
            prompts,
            rollout.group_size,
            rollout.tokens,
            rollout.mask,
            weights=self._weights(rollout.mask, rollout.mask.numel() * self.world.size),
            old_logprobs=rollout.logprobs,
            ref_logprobs=self._reference_logprobs(rollout),
            advantages=torch.ones(len(rollout.tokens), device=self.world.device),  # 0 would have no gradient
        )

    def _draw(self, prompts: tuple[Prompt, ...], keys: Sequence[Sequence[int]], **others: Any) -> Rollout:
        """Completions as the configuration has them, but for `others`."""
        rollout = self.config.rollout
        settings = dict(
            group_size=rollout.group_size, max_new_tokens=rollout.max_new_tokens, temperature=rollout.temperature,
            batch=rollout.batch, graphs=rollout.cuda_graphs,
        )  # fmt: skip
        with gathered(self.policy):
            return sample(self.policy, prompts, keys=keys, **(settings | others))

    def _draw_longest(self, prompts: tuple[Prompt, ...], **others: Any) -> Rollout:
        """Completions that all run into the limit."""
        return self._draw(prompts, [(place,) for place in range(len(prompts))], stop=False, **others)

    def learning_rate(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate(step, peak=optim.lr, schedule=optim.schedule, warmup=optim.warmup_steps, total=optim.steps)

    def _start(self) -> int:
        """Step to begin with."""
        start = 0
        if self.config.run.resume:
            start = load_checkpoint(self.directory / "checkpoints", self.policy, self.optimizer)
        if self.world.is_main:
            (self.directory / "config.yaml").write_text(to_yaml(self.config))
        self.metrics.truncate(start + 1 if start else 0)
        return start

    def _evaluate(self, done: int) -> None:
        if self.validation is None or self.judge is None:
            return
        rollout = self.config.rollout
        rows = evaluate(
            self.policy, self.validation(), self.judge, self.world, max_new_tokens=rollout.max_new_tokens,
            batch=self.config.evaluation.batch, graphs=rollout.cuda_graphs,
        )  # fmt: skip
        if rows is not None:
            self.metrics.log_event("evaluation", {"step": done} | accuracies(rows, "task"))

    @torch.no_grad()
    def _reference_logprobs(self, rollout: Rollout) -> torch.Tensor | None:
        """Logprobs (B, T) of the completions under the reference, micro-batch by micro-batch."""
        if self.reference is None:
            return None
        logprobs = torch.zeros_like(rollout.logprobs)
        for groups in rollout.split_by_length(self.config.optim.micro_batch):
            part, _ = self._score(self.reference, rollout.select(groups))
            logprobs[rollout.rows(groups), : part.shape[1]] = part
        if isinstance(self.reference, Policy):
            release(self.reference)
        return logprobs

    def _score(self, policy: Policy | WithoutAdapters, micro: Groups) -> tuple[torch.Tensor, torch.Tensor]:
        """Logprobs and entropy (B, T) of a micro-batch under a policy."""
        size, temperature = micro.group_size, self.config.rollout.temperature
        return score(policy, micro.prompts, micro.tokens, micro.mask, group_size=size, temperature=temperature)

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """What of a batch has a gradient, in parts, as many on every rank, for every rank issues the same collectives.

        A rank with fewer scores its shortest group again, with weight 0. One part is scored even if no rank has any: a
        gradient of 0 is not the same as none to AdamW, whose moments go on.
        """
        parts = batch.split_by_length(self.config.optim.micro_batch, batch.groups_with_gradient())
        count = len(parts)
        if batch.skips:
            count = max(1, reduce_max(len(parts), self.world))
        yield from map(batch.select, parts)
        for _ in range(count - len(parts)):
            shortest = batch.select(batch.split_by_length(1)[-1])
            yield dataclasses.replace(shortest, weights=torch.zeros_like(shortest.weights))

    def _macs(self, batch: Batch) -> Macs:
        """Multiply-adds that the passes over a batch cannot do without, on this rank."""
        lengths, audio_id = batch.mask.sum(dim=1), self.policy.audio_id
        return macs(
            self.cost, batch.prompts, lengths, audio_id=audio_id, groups_with_gradient=batch.groups_with_gradient()
        )

    def _weights(self, mask: torch.Tensor, tokens: float) -> torch.Tensor:
        completions = len(mask) * self.world.size
        return token_weights(mask, kind=self.config.loss.token_weights, completions=completions, tokens=tokens)

    def _report(
        self, sums: dict[str, float], columns: torch.Tensor, rewards: torch.Tensor, rollout: Rollout, batch: Batch
    ) -> dict[str, float]:
        """Means over all ranks, in one reduction."""
        completions = len(rewards) * self.world.size
        spread = rewards.unflatten(0, (-1, rollout.group_size)).std(dim=1)
        equal = equal_rewards(rewards, group_size=rollout.group_size)
        groups = completions // rollout.group_size
        needed = self._macs(batch).step(reference=self.reference is not None, updates=self.config.loss.inner_epochs)
        own = {
            "macs": needed,
            "reward": rewards.sum() / completions,
            "reward_std": spread.sum() / groups,
            "equal_reward_share": equal.sum() / groups,
            "skipped_share": (len(batch.prompts) - len(batch.groups_with_gradient())) / groups,
            "stopped_share": rollout.stopped.sum() / completions,
            "completion_tokens": rollout.mask.sum() / completions,
        }
        names = [f"reward/{name}" for name in self.config.reward.weights]
        own |= dict(zip(names, columns.sum(dim=0) / completions, strict=True))
        means = reduce_sums(sums | own, self.world)
        scored = means.pop("scored")  # weight of the tokens that were scored; 1 where no group was skipped
        of_scored = {name: means.pop(name) for name in ("clip_share", "entropy", "sampler_gap")}
        return means | ({name: value / scored for name, value in of_scored.items()} if scored else {})

    def _check_finite(self, values: dict[str, float], batch: Batch, step: int, examples: Sequence[Any]) -> None:
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if not broken:
            return
        path = self.directory / "nonfinite" / f"step-{step + 1:06d}-rank-{self.world.rank}.pt"
        names = [str(example.id) for example in examples]
        write_step(path, batch, step=step, rank=self.world.rank, examples=names)
        origins = dict.fromkeys(f"{field} of {names[row // batch.group_size]}" for field, row in nonfinite_rows(batch))
        raise NonFiniteError(
            f"step {step + 1}, rank {self.world.rank}: {' and '.join(broken)} is not finite, examples "
            f"{', '.join(names)}; in the batch: {', '.join(list(origins)[:5]) or 'all numbers are finite'}; it is kept "
            f"in {path}, to be read with hark.grpo.instruments.trace.read_step; this update was not made"
        )
