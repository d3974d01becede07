"""The training loop: the memory probe, the steps, the log, evaluations, checkpoints and the export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from signal import Signals
from types import MappingProxyType
from typing import Any

import torch

from hark import UserError
from hark.files import write_whole
from hark.from_file import save_own_files
from hark.grpo.config import to_yaml
from hark.grpo.instruments.flops import best_matmul_rate
from hark.grpo.instruments.metrics import Metrics, finite, peak_gib, restart_peak, speed
from hark.grpo.instruments.record import RecordError
from hark.grpo.instruments.trackers import open_trackers
from hark.grpo.learner import Learner
from hark.grpo.recorded import recorded_steps
from hark.grpo.runtime.checkpoint import Saver, checkpoints, load_checkpoint, set_aside, step_of
from hark.grpo.runtime.collectives import check_interrupted, reduce_max, reduce_sums
from hark.grpo.runtime.export import export, export_adapters
from hark.grpo.runtime.interrupt import Interrupted
from hark.grpo.runtime.manifest import Manifest
from hark.grpo.runtime.out_of_memory import is_out_of_memory, reason
from hark.grpo.runtime.sharding import gathered
from hark.grpo.runtime.shards import allocate_moments
from hark.grpo.sampler import sample
from hark.models.policy import Prompt
from hark.shown import say


class MemoryProbeError(UserError, RuntimeError):
    """The longest step does not fit in memory."""


def train(
    learner: Learner,
    *,
    about: Mapping[str, Any] = MappingProxyType({}),
    changes: Callable[[Manifest], Sequence[str]] = lambda manifest: (),
) -> None:
    """Do all steps, from the first one or from the newest intact checkpoint.

    It overwrites earlier results; the caller checks the directory first (`hark.launch.common.run_directory`).
    about: what checkpoints say about the run. changes: what differs from the checkpoint that is loaded, in words, or
    raises; which one that is is known only here, as the newest may be damaged.
    """
    config, world = learner.config, learner.world
    with world.interruption.noted(grace=config.run.grace):
        with world.progress.during("memory probe"):
            probe(learner)
        rate = best_matmul_rate(world.device, getattr(torch, config.model.dtype))
        rate = reduce_sums({"rate": rate}, world)["rate"]  # the sum over ranks, measured at the same time on all
        start = resumed(learner, changes) if config.run.resume else 0
        metrics, saver = opened(learner, start, about)
        learner.prepare(start)
        try:
            with closing(metrics), recorded(learner):
                do_steps(learner, metrics, saver, start=start, rate=rate)
        except Interrupted as interruption:
            save_interrupted(learner, metrics, saver)
            raise Interrupted(how_to_resume(learner, metrics.step, interruption.signal), interruption.signal) from None
        except Exception:
            if number := world.interruption.signal:  # a collective fails where torchrun has ended another rank
                raise Interrupted(how_to_resume(learner, metrics.step, number), number) from None
            raise
        if config.checkpoint.export:
            with world.progress.during("export", long=True):
                export(learner.policy, learner.directory / "model", world)
                if learner.policy.lora is not None:
                    export_adapters(learner.policy, learner.directory / "adapters", world)


def resumed(learner: Learner, changes: Callable[[Manifest], Sequence[str]]) -> int:
    """Load the newest intact checkpoint, and say what has changed since; returns its steps, 0 if there is none yet."""
    place = learner.directory / "checkpoints"
    with learner.world.progress.during("reading a checkpoint", long=True):
        manifest = load_checkpoint(
            place, learner.policy, learner.optimizer, learner.world, further=learner.further_policies()
        )
    if manifest is not None:
        learner.restore(manifest.state)
        for text in changes(manifest) if learner.world.is_main else ():
            say(f"since the checkpoint of step {manifest.step} {text}")
    if learner.world.is_main:
        found = f"step {manifest.step}" if manifest else "the beginning: there is no checkpoint yet"
        say(f"continuing from {found}")
    return manifest.step if manifest else 0


def opened(learner: Learner, start: int, about: Mapping[str, Any]) -> tuple[Metrics, Saver]:
    """The log and the checkpoints of a run that begins after step `start`; those of later steps are removed."""
    config, world = learner.config, learner.world
    metrics = Metrics(
        learner.directory, rank=world.rank, total_steps=config.optim.steps, show=learner.shown,
        dtype=config.model.dtype, required=config.checkpoint.required,
        trackers=partial(open_trackers, config.log.trackers, learner.directory, dataclasses.asdict(config)),
    )  # fmt: skip
    if world.is_main:
        set_aside(learner.directory / "checkpoints", after=start)
        write_whole(learner.directory / "config.yaml", to_yaml(config).encode())
        save_own_files(learner.directory / "own_files")
        say(f"all settings are in {learner.directory / 'config.yaml'}")
    metrics.truncate(start + 1 if start else 0)
    learner.recorder.truncate(start)
    saver = Saver(
        learner.directory / "checkpoints", world, keep=config.checkpoint.keep,
        keep_weights=config.checkpoint.weights, background=config.checkpoint.background,
        required=config.checkpoint.required, about=about, saved=start,
    )  # fmt: skip
    return metrics, saver


def do_steps(learner: Learner, metrics: Metrics, saver: Saver, *, start: int, rate: float) -> None:
    """The steps from `start` on, each with what is due after it; `rate` is multiply-adds per second of all ranks."""
    config, world = learner.config, learner.world
    due = _is_due(start, config.evaluation.every, config.optim.steps) if start else config.evaluation.before
    if due and not reduce_max(metrics.has_event("evaluation", start), world):
        evaluated(learner, metrics, saver, done=start)
    for step in range(start, config.optim.steps):
        values = measured_step(learner, step) | saver.take_figures()
        done = step + 1
        metrics.log(done, values | speed(values, rate=rate))
        if _is_due(done, config.log.completions, config.optim.steps):
            metrics.show_completions(done, learner.completions(), learner.clips)
        # Before the checkpoint, so that a run which is killed here evaluates again.
        validation = {}
        if _is_due(done, config.evaluation.every, config.optim.steps):
            validation = evaluated(learner, metrics, saver, done=done)
        saver.finish(wait=False)
        if _is_due(done, config.checkpoint.every, config.optim.steps):
            save(learner, metrics, saver, done, validation=validation)
    saver.finish()


def measured_step(learner: Learner, step: int) -> dict[str, float]:
    """Do a step with its record; returns its metrics, and what the run's meters say of it."""
    clock, world = learner.clock, learner.world
    clock.start(step + 1)
    world.meter.start()
    restart_peak(world.device)
    learner.recorder.begin(step + 1)
    clock.lap("record")
    learner.updates = 0
    values = learner.step(step)
    clock.lap("report")
    values |= learner.recorder.end()
    clock.lap("record")
    values |= {"lr": learner.optimizer.param_groups[0]["lr"], "memory/peak_gib": peak_gib(world.device)}
    return values | clock.seconds() | world.meter.measured()


def evaluated(learner: Learner, metrics: Metrics, saver: Saver, *, done: int) -> dict[str, float]:
    """Evaluate the validation questions and log the figures; returns them on rank 0."""
    if learner.validate is None:
        return {}
    with learner.world.progress.during(f"evaluation after step {done}"):
        figures = learner.validate()
        check_interrupted(learner.world)
    # Before the log, so that a run which is killed between the two evaluates again.
    saver.add_validation(done, finite(figures))
    metrics.log_event("evaluation", {"step": done} | figures)
    return figures


def save(
    learner: Learner,
    metrics: Metrics,
    saver: Saver,
    done: int,
    *,
    validation: Mapping[str, float],
    at_once: bool = False,
) -> None:
    with learner.world.progress.during(f"checkpoint of step {done}", long=True):
        metrics.sync()  # before the checkpoint has its name
        saver.save(
            done, learner.policy, learner.optimizer, state=learner.state(), further=learner.further_policies(),
            validation=finite(dict(validation)), at_once=at_once,
        )  # fmt: skip


def save_interrupted(learner: Learner, metrics: Metrics, saver: Saver) -> None:
    """Save an interrupted run, unless no step is finished, its checkpoint is there, or it saves none."""
    saver.finish()
    if metrics.step and saver.saved != metrics.step and learner.config.checkpoint.every:
        save(learner, metrics, saver, metrics.step, validation={}, at_once=True)


def how_to_resume(learner: Learner, done: int, signal: int) -> str:
    """What an interrupted run says at its end."""
    saved = checkpoints(learner.directory / "checkpoints", resumable=True)
    how = f"continues from the checkpoint of step {step_of(saved[-1])}" if saved else "begins again: nothing was saved"
    return f"{Signals(signal).name} after step {done}: the same command with run.resume=true {how}"


@contextmanager
def recorded(learner: Learner) -> Iterator[None]:
    """If an error leaves the block, write the steps before it and the one that it ended."""
    try:
        yield
    except Exception as error:
        try:
            steps = learner.recorder.write_last(error)
        except RecordError as failure:
            say(f"warning: the steps before the error are not recorded: {failure}")
        else:
            if steps and learner.world.is_main:
                say(f"steps {steps[0]} to {steps[-1]} are in {learner.recorder.place.parent}")
        raise


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
        say(
            f"the longest step fits: {len(prompts)} prompts of {len(prompt.ids)} tokens on each rank, {size} x "
            f"{tokens} new tokens; peak {peak_gib(world.device):.2f} GiB on rank 0",
        )


def _longest_evaluation(learner: Learner, prompt: Prompt) -> None:
    rollout, prompts = learner.config.rollout, (prompt,) * learner.config.evaluation.batch
    with gathered(learner.policy):
        recorded = recorded_steps(learner.policy, wanted=rollout.cuda_graphs, gathered=True)
        sample(
            learner.policy, prompts, group_size=1, max_new_tokens=rollout.max_new_tokens, temperature=0,
            recorded=recorded, stop=False,
        )  # fmt: skip


def _is_due(done: int, every: int, last: int) -> bool:
    """Whether `done` is a multiple of `every` or the last step; never if `every` is 0."""
    return every > 0 and (done % every == 0 or done == last)
