"""Batch -> new weights: micro-batches, backward passes, gradient clipping and one step of AdamW.

GRPO (`trainer.py`) and supervised fine-tuning (`sft.py`) are learners. They differ in where their batches come from and
in the loss.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from hark.grpo.config import Config
from hark.grpo.instruments.by_module import gradient_norms
from hark.grpo.instruments.console import Completion
from hark.grpo.instruments.draft import Describe
from hark.grpo.instruments.flops import Macs, cost_of, macs
from hark.grpo.instruments.metrics import Clock
from hark.grpo.instruments.nonfinite import NonFiniteError, check_finite
from hark.grpo.instruments.recorder import Recorder
from hark.grpo.instruments.trackers import Audio
from hark.grpo.loss import TokenTerms
from hark.grpo.objective import Objective
from hark.grpo.optimizer import build_optimizer, clip_gradients, learning_rate
from hark.grpo.prefill import Prefill, Prefix, prefilled
from hark.grpo.runtime.collectives import World, check_interrupted, reduce_max, reduce_sums
from hark.grpo.runtime.out_of_memory import is_out_of_memory, reason
from hark.grpo.runtime.sharding import gather_root, reduce_between_replicas
from hark.grpo.scorer import score
from hark.grpo.shared_data import SharedData, TrainingData
from hark.grpo.types import Batch
from hark.models.experts import RouterLoad
from hark.models.policy import Policy, Prompt
from hark.shown import say

Result = TypeVar("Result")
Kind = TypeVar("Kind", bound=Batch)
AnyBatch = TypeVar("AnyBatch", bound=Batch)
NOTE = re.compile(r"(\d{1,9}) instead of (\d{1,9})\n")  # in the file of a MicroBatch
MEANS = {  # the terms of tokens whose weighted means are metrics, and the names of these
    "clipped": "clip_share",
    "kl": "kl",
    "importance": "importance",
    "importance_capped": "importance_capped_share",
    "entropy": "entropy",
    "sampler_gap": "sampler_gap",
}


class MicroBatch:
    """Prompts per forward and backward on one rank: `configured`, or fewer after memory ran out, which a file keeps."""

    def __init__(self, path: Path, configured: int):
        self._path, self._configured, self.size = path, configured, configured
        if path.is_file() and (kept := NOTE.fullmatch(path.read_text(encoding="utf-8", errors="replace"))):
            size, of = map(int, kept.groups())
            self.size = size if of == configured and 1 <= size <= configured else configured

    def halve(self) -> bool:
        """Take half as many from now on; whether that is possible."""
        if self.size == 1:
            return False
        self.size //= 2
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(f"{self.size} instead of {self._configured}\n", encoding="utf-8")
        return True


class Learner(Generic[Kind]):
    """A policy and its optimizer; `update` does one optimizer step on a batch.

    validate: evaluates the validation questions, on all ranks, and returns the metrics to log; None if there are none.
    describe: what a recorded step holds about an example. listen: decodes the clips of one.
    """

    shown: tuple[str, ...] = ()  # names of the metrics on the console line

    def __init__(
        self,
        config: Config,
        world: World,
        policy: Policy,
        *,
        data: TrainingData,
        validate: Callable[[], dict[str, float]] | None = None,
        describe: Describe = lambda example: {"row": {"id": str(example.id)}},
        listen: Callable[[Any], Sequence[Audio]] = lambda example: (),
    ):
        self.config, self.world, self.policy = config, world, policy
        self.data = SharedData(data, world, max_lost=config.data.max_lost)
        self.validate, self.listen = validate, listen
        self.directory = Path(config.run.directory)
        optim = config.optim
        self.optimizer = build_optimizer(policy, weight_decay=optim.weight_decay, betas=(optim.beta1, optim.beta2))
        self.clock = Clock(world.device, world.progress)
        self.micro_batch = MicroBatch(self.directory / "micro_batch.txt", optim.micro_batch)
        self.updates = 0  # of the step that is being done
        self.skipped = 0  # updates of the run whose loss or gradient was not finite
        self.recorder = Recorder(
            self.directory, world, policy, every=config.record.every, total=optim.steps, keep=config.record.keep,
            last=config.record.last, about={"config": dataclasses.asdict(config)}, describe=describe,
        )  # fmt: skip
        self.objective = Objective(config.loss, max_new_tokens=config.rollout.max_new_tokens)
        self._cost = cost_of(policy)
        self._router_load = RouterLoad(policy.decoder)

    def step(self, step: int) -> dict[str, float]:
        """Do step number `step`, counted from 0; returns its metrics over all ranks."""
        raise NotImplementedError

    def loss(self, micro: Kind, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, TokenTerms]:
        """The loss of a micro-batch, and its terms; those of MEANS become metrics."""
        raise NotImplementedError

    def completions(self) -> list[Completion]:
        """Some completions of this rank's latest step, for the console; none if nothing is sampled."""
        return []

    def clips(self) -> dict[str, Audio]:
        """The clips of the questions of `completions`, by names that number the questions."""
        return {}

    def longest_batch(self, prompts: tuple[Prompt, ...]) -> Kind:
        """A batch of these prompts with the longest completions that can occur."""
        raise NotImplementedError

    def update(self, batch: Kind, step: int, examples: Sequence[Any]) -> dict[str, float]:
        """Do one optimizer step on a batch; returns this rank's term of each metric, which is their sum over ranks."""
        self.recorder.note(batch=batch, learning_rate=self.learning_rate(step))
        sums = self.accumulate(batch)
        self.clock.lap("forward_backward")
        norms = gradient_norms(self.policy, self.world) if self.recorder.is_due else {}
        norm = clip_gradients(self.policy, self.config.optim.clip_norm)
        self.recorder.note_update(sums | {"grad_norm": norm, "grad_norms": norms})
        finite = self.is_finite({"the loss": sums["loss"], "the gradient": norm}, batch, step, examples)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if finite:
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        self.clock.lap("optimizer")
        load = {name: value / self.world.size for name, value in self._router_load.take().items()}
        if self.config.optim.skip_nonfinite:
            load["skipped_updates"] = self.skipped / self.world.size
        return sums | load | {"grad_norm": norm / self.world.size}  # the sum over ranks is the norm

    def is_finite(self, values: dict[str, float], batch: Kind, step: int, examples: Sequence[Any]) -> bool:
        """Whether loss and gradient of an update are finite on all ranks.

        Raises NonFiniteError if they are not, unless optim.skip_nonfinite allows to leave out one more.
        """
        try:
            error = None
            check_finite(values, batch, step=step, rank=self.world.rank, examples=examples, place=self.recorder.place)
        except NonFiniteError as found:
            error = found
        if self.config.optim.skip_nonfinite and reduce_max(error is not None, self.world):
            self.skipped += 1
            if self.skipped <= self.config.optim.skip_nonfinite:
                if error is not None:
                    say(f"warning: {error}; it is left out (optim.skip_nonfinite)")
                return False
        if error is not None:
            raise error
        return True

    def accumulate(self, batch: Kind) -> dict[str, float]:
        """Sum the gradients of a batch's micro-batches; returns this rank's term of each metric."""
        return self.in_memory(lambda: self.accumulated(batch))

    def in_memory(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns, which scores micro-batches of the present size.

        Out of memory, the micro-batches are halved and all is computed anew: the update is the same. Several ranks
        cannot do that in the middle of a step, because the others wait in a collective; they do it at their next start.
        """
        while True:
            try:
                return compute()
            except Exception as error:
                if not is_out_of_memory(error) or not self.micro_batch.halve():
                    raise
                rest = "" if self.world.size == 1 else "; the same command with run.resume=true goes on with them"
                say(
                    f"warning: out of memory on rank {self.world.rank} ({reason(error)}); from now on micro-batches "
                    f"have {self.micro_batch.size} prompts instead of {self.config.optim.micro_batch}, and the updates "
                    f"are the same{rest}"
                )
                if self.world.size > 1:
                    raise
            self.optimizer.zero_grad()
            self._router_load.take()

    def accumulated(self, batch: Kind, *, last: bool = True) -> dict[str, float]:
        """The same with micro-batches of the present size. last: whether no further gradients belong to the update."""
        sums: dict[str, Any] = {}
        likeliest = self.config.record.likeliest if self.recorder.is_due else 0
        kept = batch.prefill.take() if batch.prefill else None
        for rows, micro, prefix in self.micro_batches(batch, kept, last=last):
            logprobs, spread = score(
                self.policy, micro.prompts, micro.tokens, micro.mask, group_size=micro.group_size,
                temperature=self.config.rollout.temperature, likeliest=likeliest,
                entropy_gradient=self.config.loss.entropy > 0,
                prefix=prefix,
            )  # fmt: skip
            loss, terms = self.loss(micro, logprobs, spread.entropy)
            loss.backward()
            terms |= {name: value.detach() for name, value in (spread._asdict() | {"logprobs": logprobs}).items()}
            self.recorder.note_terms(rows, terms)
            for name, value in _metrics(micro, terms).items():
                sums[name] = sums.get(name, 0.0) + value
            self.world.progress.mark()
            if not self.updates:  # between two updates of a step the weights are those of no step
                check_interrupted(self.world)
        return {name: float(value) for name, value in sums.items()}  # only at the end, because float() waits for a GPU

    def positions(self, step: int) -> tuple[int, list[int]]:
        """The first position of a step in the run's order, and those of this rank's prompts.

        With rollout.refill a step has others.
        """
        count = self.config.optim.prompts_per_step
        return step * count, self.data.share(range(step * count, (step + 1) * count))

    def learning_rate(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate(
            step, peak=optim.lr, schedule=optim.schedule, warmup=optim.warmup_steps, total=optim.steps,
            floor=optim.lr_floor,
        )  # fmt: skip

    def given_batch(self, texts: Sequence[str], prompts: tuple[Prompt, ...]) -> tuple[Batch, float]:
        """A batch with the texts as completions, one per prompt, and the number of their tokens over all ranks."""
        tokens, mask = self.policy.completions(texts)
        count = reduce_sums({"tokens": mask.sum()}, self.world)["tokens"]
        weights = self.objective.weights(mask, completions=len(mask) * self.world.size, tokens=count)
        return Batch(prompts, group_size=1, tokens=tokens, mask=mask, weights=weights), count

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides weights and moments, for JSON."""
        return {"skipped": self.skipped, "lost": self.data.lost}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        self.skipped = state.get("skipped", 0)
        self.data.lost = list(state.get("lost", []))

    def prepare(self, step: int) -> None:
        """Start to prepare the prompts of the first step of a run or of a resumed run."""
        self.data.prepare(step)

    def further_policies(self) -> dict[str, Policy]:
        """Policies besides the trained one whose weights change and belong to a checkpoint, by name."""
        return {}

    def macs(self, batch: Batch) -> Macs:
        """The least multiply-adds that the passes over this rank's batch need."""
        return macs(
            self._cost, batch.prompts, batch.mask.sum(dim=1),
            audio_id=self.policy.audio_id, groups_with_gradient=batch.groups_with_gradient(),
        )  # fmt: skip

    def micro_batches(
        self, batch: AnyBatch, kept: Prefill | None = None, *, last: bool = True
    ) -> Iterator[tuple[torch.Tensor, AnyBatch, Prefix | None]]:
        """The parts of a batch to score, one after the other: the indices of their completions, the completions, and
        what is known of the prompts. Each must have had its backward before the next.

        kept: the prompts' forward of the rollout. Without it the prompts are part of the rows, or, with
        optim.micro_branches, have a forward and a backward of their own around the parts of their groups.
        """
        for groups, micro in self._groups(batch, last=last):
            parts, every = micro.branches(self.config.optim.micro_branches), range(len(groups))
            own = prefilled(self.policy, micro.prompts) if kept is None and len(parts) > 1 else None
            for branches in parts:
                prefix = kept.select(groups) if kept else own.select(every) if own else None
                yield batch.rows(groups, branches), micro.select(every, branches), prefix
            if own:
                self._through_prompts(own)
        if kept:
            self._through_prompts(kept)

    def _through_prompts(self, prefill: Prefill) -> None:
        gather_root(self.policy)
        prefill.backward()

    def _groups(self, batch: AnyBatch, *, last: bool) -> Iterator[tuple[list[int], AnyBatch]]:
        """The groups of a batch that have a gradient, `optim.micro_batch` at a time: their indices, and the groups.

        Every rank must issue the same collectives, so all ranks do as many micro-batches as the one with the most. A
        rank with fewer repeats its shortest group with weight 0. At least one is done even if no group of any rank has
        a gradient: AdamW decays its moments if a gradient is 0, but skips the parameter if it is None.
        last: whether the update has no further batch. Its last micro-batch reduces gradients between replicas.
        """
        parts = batch.split_by_length(self.micro_batch.size, batch.groups_with_gradient())
        count = max(1, reduce_max(len(parts), self.world)) if batch.skips_groups else len(parts)
        own = len(parts)
        parts += [batch.split_by_length(1)[-1] for _ in range(count - own)]
        for number, groups in enumerate(parts, start=1):
            reduce_between_replicas(self.policy, now=last and number == count)
            micro = batch.select(groups)
            if number > own:
                micro = dataclasses.replace(micro, weights=torch.zeros_like(micro.weights))
            yield groups, micro


def _metrics(micro: Batch, terms: TokenTerms) -> dict[str, torch.Tensor]:
    """What a micro-batch adds to the metrics of a step: `scored` is the weight of its tokens."""
    means = {metric: (micro.weights * terms[name]).sum() for name, metric in MEANS.items() if name in terms}
    return means | {"loss": terms["loss"].sum(), "scored": micro.weights.sum()}
