"""The training loop: the memory probe, the steps, the log, evaluations, checkpoints and the export."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

import torch

from hark import UserError
from hark.from_file import save_own_files
from hark.grpo.config import to_yaml
from hark.grpo.instruments.flops import best_matmul_rate
from hark.grpo.instruments.metrics import Metrics, peak_gib, restart_peak, speed
from hark.grpo.instruments.record import RecordError
from hark.grpo.instruments.trackers import open_trackers
from hark.grpo.learner import Learner
from hark.grpo.optimizer import allocate_moments
from hark.grpo.runtime.checkpoint import (
    checkpoints,
    export,
    export_adapters,
    load_checkpoint,
    save_checkpoint,
    step_of,
)
from hark.grpo.runtime.collectives import reduce_sums
from hark.grpo.runtime.interrupt import interruptible
from hark.grpo.runtime.out_of_memory import is_out_of_memory, reason
from hark.grpo.runtime.sharding import gathered
from hark.grpo.sampler import sample
from hark.models.policy import Prompt


class MemoryProbeError(UserError, RuntimeError):
    """The longest step does not fit in memory."""


def train(learner: Learner) -> None:
    """Do all steps, from the first one or from the newest checkpoint.

    It overwrites earlier results; the caller checks the directory first (`hark.launch.common.run_directory`).
    """
    probe(learner)
    config, world, optimizer = learner.config, learner.world, learner.optimizer
    rate = best_matmul_rate(world.device, getattr(torch, config.model.dtype))
    rate = reduce_sums({"rate": rate}, world)["rate"]  # the sum over ranks, measured at the same time on all
    metrics = Metrics(
        learner.directory, rank=world.rank, total_steps=config.optim.steps, show=learner.shown,
        dtype=config.model.dtype,
        trackers=partial(open_trackers, config.log.trackers, learner.directory, dataclasses.asdict(config)),
    )  # fmt: skip
    start = 0
    if config.run.resume:
        start, state = load_checkpoint(
            learner.directory / "checkpoints", learner.policy, optimizer, further=learner.further_policies()
        )
        learner.restore(state)
    if world.is_main:
        (learner.directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        save_own_files(learner.directory / "own_files")
        print(f"all settings are in {learner.directory / 'config.yaml'}", flush=True)
    metrics.truncate(start + 1 if start else 0)
    learner.recorder.truncate(start)
    learner.prepare(start)
    with interruptible(lambda: how_to_resume(learner, done=metrics.step)):
        with closing(metrics), recorded(learner):
            do_steps(learner, metrics, start=start, rate=rate)
        if config.checkpoint.export:
            export(learner.policy, learner.directory / "model", world)
            if learner.policy.lora is not None:
                export_adapters(learner.policy, learner.directory / "adapters", world)


def do_steps(learner: Learner, metrics: Metrics, *, start: int, rate: float) -> None:
    """The steps from `start` on, each with what is due after it; `rate` is multiply-adds per second of all ranks."""
    config, world, optimizer = learner.config, learner.world, learner.optimizer
    if start == 0 and config.evaluation.before:
        _evaluate(learner, metrics, done=0)
    for step in range(start, config.optim.steps):
        learner.clock.start()
        world.meter.start()
        restart_peak(world.device)
        learner.recorder.begin(step + 1)
        learner.clock.lap("record")
        values = learner.step(step)
        learner.clock.lap("report")
        values |= learner.recorder.end()
        learner.clock.lap("record")
        values |= {"lr": optimizer.param_groups[0]["lr"], "memory/peak_gib": peak_gib(world.device)}
        values |= learner.clock.seconds() | world.meter.measured()
        done = step + 1
        metrics.log(done, values | speed(values, rate=rate))
        if _is_due(done, config.log.completions, config.optim.steps):
            metrics.show_completions(done, learner.completions(), learner.clips)
        if _is_due(done, config.checkpoint.every, config.optim.steps):
            save_checkpoint(
                learner.directory / "checkpoints", done, learner.policy, optimizer, world,
                keep=config.checkpoint.keep, keep_weights=config.checkpoint.weights, state=learner.state(),
                further=learner.further_policies(),
            )  # fmt: skip
        if _is_due(done, config.evaluation.every, config.optim.steps):
            _evaluate(learner, metrics, done)


@contextmanager
def recorded(learner: Learner) -> Iterator[None]:
    """If an error leaves the block, write the steps before it and the one that it ended."""
    try:
        yield
    except Exception as error:
        try:
            steps = learner.recorder.write_last(error)
        except RecordError as failure:
            print(f"warning: the steps before the error are not recorded: {failure}", flush=True)
        else:
            if steps and learner.world.is_main:
                print(f"steps {steps[0]} to {steps[-1]} are in {learner.recorder.place.parent}", flush=True)
        raise


def how_to_resume(learner: Learner, *, done: int) -> str:
    """What an interrupted run says at its end."""
    saved = checkpoints(learner.directory / "checkpoints", resumable=True)
    if saved:
        how = f"run.resume=true continues from the checkpoint of step {step_of(saved[-1])}"
    else:
        how = f"there is no checkpoint yet (checkpoint.every); to start again, delete {learner.directory}"
    return f"interrupted after step {done}; {how}"


def probe(learner: Learner) -> None:
    """Run the largest step that can occur, the longest prompt with the longest completions; weights do not change.

    A run that does not fit in memory thus fails at its start. Raises MemoryProbeError.
    """
    config, world = learner.config, learner.world
    example, prompt = learner.data.longest()
    prompts = (prompt,) * (config.optim.prompts_per_step // world.size)
    try:
        allocate_moments(learner.optimizer)  # AdamW allocates them in its first step, and they remain
        if learner.validate is not None:
            _longest_evaluation(learner, prompt)
        batch = learner.longest_batch(prompts)
        learner.accumulate(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryProbeError(
            f"out of memory on rank {world.rank} with {example.line or example.id}, a prompt of {len(prompt.ids)} "
            f"tokens, the longest in the data ({reason(error)}); `hark plan` with the same arguments says what fits"
        ) from error
    learner.optimizer.zero_grad()
    learner.optimizer.state.clear()
    if world.is_main:
        size, tokens = batch.group_size, batch.tokens.shape[1]
        print(
            f"the longest step fits: {len(prompts)} prompts of {len(prompt.ids)} tokens on each rank, {size} x "
            f"{tokens} new tokens; peak {peak_gib(world.device):.2f} GiB on rank 0",
            flush=True,
        )


def _longest_evaluation(learner: Learner, prompt: Prompt) -> None:
    rollout, prompts = learner.config.rollout, (prompt,) * learner.config.evaluation.batch
    with gathered(learner.policy):
        sample(
            learner.policy, prompts, group_size=1, max_new_tokens=rollout.max_new_tokens, temperature=0,
            graphs=rollout.cuda_graphs, stop=False,
        )  # fmt: skip


def _evaluate(learner: Learner, metrics: Metrics, done: int) -> None:
    if learner.validate is not None:
        metrics.log_event("evaluation", {"step": done} | learner.validate())


def _is_due(done: int, every: int, last: int) -> bool:
    """Whether `done` is a multiple of `every` or the last step; never if `every` is 0."""
    return every > 0 and (done % every == 0 or done == last)
