"""Trains what a configuration describes."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import SIGTERM

from hark.data.described import described
from hark.data.prompts import find_template
from hark.data.rewards import check_rewards
from hark.grpo import loop
from hark.grpo.algorithms import find_advantage, find_own_loss
from hark.grpo.config import Config, ConfigError, differences
from hark.grpo.instruments.trackers import check_trackers
from hark.grpo.learner import Learner
from hark.grpo.runtime.checkpoint import newest_intact
from hark.grpo.runtime.collectives import World, exchange_rows, joined_world, reduce_max
from hark.grpo.runtime.lock import locked
from hark.grpo.runtime.watchdog import watched
from hark.launch.common.exports import announce_export
from hark.launch.common.policies import make_policy
from hark.launch.common.questions import (
    bad_log,
    check_answers,
    check_lengths,
    check_order,
    curriculum_of,
    listening,
    training_examples,
    training_loader,
    validation_figures,
)
from hark.launch.common.run_directory import (
    ATTENTION,
    CLIPS,
    LEFT_OUT,
    check_changes,
    check_run_directory,
    clips_digest,
    facts,
    left_out_before,
)
from hark.models.loading import read_family
from hark.shown import say


def train(config: Config, make_trainer: Callable[..., Learner], *, judged: bool, answered: str) -> None:
    """Train what `make_trainer(config, world, policy, data=, validate=, describe=)` makes.

    judged: whether rewards judge completions to the training examples, whose right answers must then be possible.
    answered: what needs the right answers of all training examples; "" where nothing does.
    """
    directory, patience = Path(config.run.directory), config.run.patience
    with (
        joined_world(threads=config.run.threads, patience=patience) as world,
        world.interruption.noted(grace=0.0, signals=[SIGTERM]),  # until the loop, which saves; Ctrl-C is raised
        watched(world, patience=patience),
        locked(directory, world),
    ):
        config = restarted(config, world)
        announce(config, world)
        check_training(config, world)
        accept()
        family = read_family(config.model.path, config.model.policy)
        about = facts(config, world)  # after all files of the user's own were run
        newest = newest_intact(directory / "checkpoints") if config.run.resume and world.is_main else None
        if newest is not None:
            check_changes(config, about, newest)  # now, as the weights may take minutes; and again with what is loaded
        # The data is checked before the weights are read, which takes minutes for a large model.
        curriculum_of(config)  # raises if the data have no such order
        if config.evaluation.silent and family.sample_rate is None:
            raise ConfigError(
                f"{config.model.path} takes text only, and evaluation.silent needs sound; set it to false"
            )
        before = [left_out_before(config, about, newest) if newest else None] if world.is_main else []
        examples, held_out, about[LEFT_OUT] = training_examples(config, world, family, exchange_rows(before, world)[0])
        about[CLIPS] = clips_digest(examples, newest)
        if newest is not None:
            check_changes(config, about, newest)  # again, now that the clips are known
        check_order(config, examples)
        if answered:
            check_answers(examples, answered, or_target=not judged)
        check_lengths(config, examples + held_out if judged else held_out)
        policy = make_policy(config, world)
        validate = partial(validation_figures, config, world, policy, held_out) if held_out else None
        with training_loader(config, world, policy, examples) as loader:
            parts = dict(data=loader, validate=validate, describe=described, listen=listening(config, policy))
            trainer = make_trainer(config, world, policy, **parts)
            about[ATTENTION] = policy.attention  # now that it is chosen
            loop.train(trainer, about=about, changes=partial(check_changes, config, about))
            if config.checkpoint.export and world.is_main:
                announce_export(directory / "model")
            if loader.bad:
                say(f"{len(loader.bad)} more bad examples skipped, listed in {bad_log(config).path}")


def restarted(config: Config, world: World) -> Config:
    """The configuration of a run that torchrun has started again (--max-restarts): it resumes.

    torchrun also starts processes again that were refused because the directory holds another run. So the run resumes
    only if earlier processes of the same torchrun were accepted, on any machine.
    """
    again, mark = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), _mark()
    if not reduce_max(bool(again and mark and mark.exists()), world):
        return config
    return replace(config, run=replace(config.run, resume=True))


def accept() -> None:
    """Note that the run directory is that of this torchrun, for the processes that it starts again."""
    if mark := _mark():
        with suppress(OSError):  # these are refused then, and say how to go on
            mark.touch()


def _mark() -> Path | None:
    """A file in the directory that torchrun gives each run; a process's own files are in attempt_N/RANK there."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parents[2] / "accepted" if own else None


def announce(config: Config, world: World) -> None:
    """Check the names of template, rewards and loss, then print what the configuration changes of the defaults."""
    find_template(config.data.template)
    check_rewards(config.reward.weights, config.reward.options, config.reward.only_if, config.reward.schedule)
    find_advantage(config.loss.advantage)
    find_own_loss(config.loss.kind)
    if world.is_main:
        say("settings that differ from the defaults:", *(f"  {line}" for line in differences(config)))


def check_training(config: Config, world: World) -> None:
    """Refuse, before anything is loaded, a configuration that cannot be trained or would overwrite another run."""
    check_run_directory(config)
    check_trackers(config.log.trackers)
    if config.data.train is None:
        raise ConfigError("data.train is missing; training needs a file of examples")
    if config.optim.prompts_per_step % world.size:
        raise ConfigError(
            f"optim.prompts_per_step is {config.optim.prompts_per_step}; "
            f"it must be a multiple of the number of processes, {world.size}"
        )
    if config.model.attention == "flex" and world.device.type != "cuda":
        raise ConfigError(
            "model.attention=flex needs a GPU: FlexAttention has no backward on the CPU; leave it at auto"
        )
    evaluates = config.evaluation.every or config.evaluation.before
    if evaluates and config.data.validation is None and not config.data.held_out:
        raise ConfigError("evaluation.every or evaluation.before is set, but neither data.validation nor data.held_out")
