"""Compute recorded steps again and compare: what differs, where it is first, and by how much.

    python launch/replay.py RUN STEP                       from the record alone: rewards, advantages, weights, loss
    python launch/replay.py RUN 1:100 --model              also completions, logprobs, gradients and the update
    python launch/replay.py RUN STEP --set loss.clip_high=0.28
    python launch/replay.py RUN --from OTHER_RUN           the first step and quantity at which two runs part

RUN is the run.directory of `hark train` with record.every above 0, STEP a recorded step or a range of them. --model
begins at the newest checkpoint before the first step, or at the model that the run began with; every step from there on
must be recorded. The exit status is 1 if a quantity differs by more than rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from hark.data.described import example_of
from hark.data.rewards.judging import Judge
from hark.grpo.config import Config, ConfigError
from hark.grpo.instruments.record import RecordError, StepRecord, read_step, recorded_steps
from hark.grpo.instruments.replay import ORDER, RECOMPUTED, Difference, differences, first_difference, recomputed
from hark.grpo.objective import Objective
from hark.grpo.rewards import weights_at
from hark.grpo.runtime.collectives import joined_world
from hark.launch.common.entry import run
from hark.launch.common.questions import rewards_of
from hark.launch.common.rerun import prepared_trainer, rerun, restore
from hark.launch.common.trained import read_run
from hark.models.policy import completion_ids
from hark.shown import say, say_text

SETTABLE = ("loss.", "reward.")  # settings that a record alone can be computed with again


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.other:
        parted = compare_runs(arguments.other, arguments.run)
    elif arguments.set:
        config = read_run(arguments.run, checked(arguments.set))
        for step in steps_of(arguments):
            before = read_run(arguments.run, [])
            say_text(side_by_side(read_step(arguments.run, step), before, config, arguments.set))
        return
    elif arguments.model:
        parted = rerun_steps(arguments.run, steps_of(arguments))
    else:
        config = read_run(arguments.run, [])
        parted = report(arguments.run, "from the record alone", alone(arguments.run, steps_of(arguments), config))
    if parted:
        sys.exit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("steps", metavar="STEP", nargs="?", help="a step, FIRST:LAST, or all that are recorded")
    parser.add_argument("--model", action="store_true", help="run the steps again, with the model")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="what the step would have been")
    parser.add_argument("--from", dest="other", type=Path, metavar="OTHER_RUN", help="compare with another run")
    arguments = parser.parse_args(argv)
    if arguments.model + bool(arguments.set) + bool(arguments.other) > 1:
        parser.error("--model, --set and --from exclude one another")
    return arguments


def steps_of(arguments: argparse.Namespace) -> list[int]:
    """The steps that the arguments name. Raises RecordError if one is not recorded."""
    recorded = recorded_steps(arguments.run)
    if not recorded:
        raise RecordError(f"{arguments.run} has no recorded steps; train with record.every above 0")
    first, _, last = (arguments.steps or f"{recorded[0]}:{recorded[-1]}").partition(":")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise ConfigError(f"STEP is {arguments.steps!r}; expected a number, such as 10, or a range, such as 1:100")
    return [step for step in recorded if int(first) <= step <= int(last or first)] or [int(first)]


def alone(directory: Path, steps: Sequence[int], config: Config) -> Iterator[tuple[StepRecord, list[Difference]]]:
    with rewards_of(config) as rewards:
        for step in steps:
            record = read_step(directory, step)
            yield record, differences(record, again(record, config, rewards), among=RECOMPUTED)


def again(record: StepRecord, config: Config, rewards: Judge) -> StepRecord:
    """The record with its rewards, advantages, weights and loss computed again, by the settings of a configuration."""
    if "rewards" not in record.tensors or "logprobs" not in record.tensors:
        raise RecordError(f"step {record.step} has no rewards and logprobs: it is not of GRPO, or an error ended it")
    return recomputed(
        record, columns=reward_columns(record, rewards),
        reward_weights=weights_at(config.reward.weights, config.reward.schedule, record.step - 1),
        objective=Objective(config.loss, max_new_tokens=config.rollout.max_new_tokens), beta=beta_of(record, config),
    )  # fmt: skip


def beta_of(record: StepRecord, config: Config) -> float:
    """The KL weight of a recorded step: the one that it had if the configuration adapts it."""
    return config.loss.beta if config.loss.kl_target is None else record.values["beta"]


def reward_columns(record: StepRecord, rewards: Judge) -> torch.Tensor:
    """The rewards (B, K) of a recorded step, computed again."""
    examples = [example_of(prompt) for prompt in record.values["prompts"]]
    texts = [completion["text"] for completion in record.values["completions"]]
    ids = completion_ids(record.tensors["tokens"], record.tensors["mask"])
    return rewards(examples, texts, ids, record.tensors["stopped"].tolist(), record.step - 1).columns


def rerun_steps(directory: Path, steps: Sequence[int]) -> bool:
    """Run steps again with the model, and those between its checkpoint and the first; whether they differ."""
    config = read_run(directory, ["record.every=1", "data.workers=1"])
    parted = False
    with joined_world(threads=config.run.threads) as world, prepared_trainer(config, world) as trainer:
        start = restore(trainer, directory, steps[0])
        needed = range(start + 1, steps[-1] + 1)
        if missing := {*needed} - {*recorded_steps(directory)}:
            raise RecordError(
                f"{directory}: step {min(missing)} is not recorded; the steps from {start + 1}, after the newest "
                f"checkpoint before step {steps[0]}, to {steps[-1]} are needed; train with record.every=1"
            )
        records = (read_step(directory, step) for step in needed)
        pairs = ((record, rerun(trainer, record)) for record in records)
        found = (
            (record, differences(record, new, dtype=config.model.dtype, among=comparable(record, world.size, start)))
            for record, new in pairs
            if new is not None
        )
        if world.is_main:
            kind = f"with the model after {start} steps, on {world.size} of {{ranks}} ranks"
            parted = report(directory, kind, found)
        else:
            for _ in pairs:
                pass
    return parted


def comparable(record: StepRecord, ranks: int, start: int) -> list[str]:
    """The quantities of a step that is run again on so many ranks, from the weights after `start` steps.

    Another number of ranks adds gradients up in another order. Then digests of the weights agree only at the beginning.
    """
    same = ranks == record.values["ranks"]
    known = {"weights_before": same or record.step == start + 1, "weights_after": same}
    return [name for part in ORDER for name in part if known.get(name, True)]


def compare_runs(first: Path, second: Path) -> bool:
    """Print the first step and quantity at which two runs part; whether they do."""
    shared = sorted({*recorded_steps(first)} & {*recorded_steps(second)})
    if not shared:
        raise RecordError(f"{first} and {second} have no recorded step in common")
    for step in shared:
        one, other = read_step(first, step), read_step(second, step)
        found = differences(one, other, dtype=one.values["config"]["model"]["dtype"])
        parted = first_difference(found)
        if parted is not None:
            say(f"{first} and {second} part at step {step}, in {parted.quantity}: {explained(parted)}")
            return True
    say(f"{first} and {second} are equal, to rounding, in {len(shared)} recorded steps, {shared[0]} to {shared[-1]}")
    return False


def report(directory: Path, kind: str, found: Iterator[tuple[StepRecord, list[Difference]]]) -> bool:
    """Print for each quantity where it first differs, or its largest rounding; whether one is more than rounding."""
    shown: dict[str, tuple[int, Difference]] = {}
    first, steps = None, []
    for record, compared in found:
        steps.append(record.step)
        kind = kind.format(ranks=record.values["ranks"])
        parted = first_difference(compared)
        first = first or (parted and f"{parted.quantity}, at step {record.step}")
        for one in compared:
            before = shown.get(one.quantity)
            if before is None or _excess(before[1]) <= 1 and _excess(one) > _excess(before[1]):
                shown[one.quantity] = record.step, one
    say(f"{numbered(steps[0], steps[-1])} of {directory}, {kind}")
    say(f"{'quantity':20}{'values':>8}  difference")
    for quantity, (step, one) in shown.items():
        where = f" (step {step})" if one.largest and len(steps) > 1 else ""
        say(f"{quantity:20}{one.values:8}  {explained(one)}{where}")
    equal, rounded = (sum(getattr(one, kind) for _, one in shown.values()) for kind in ("is_equal", "is_rounding"))
    agree = "the record agrees" if len(steps) == 1 else f"all {len(steps)} records agree"
    differing = len(shown) - equal - rounded
    say(
        f"{differing} quantities differ; the first is {first}"
        if first
        else f"{agree}: {equal} quantities are equal, {rounded} differ by rounding"
    )
    return first is not None


def numbered(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _excess(one: Difference) -> float:
    """The largest difference in relation to what is rounding; above 1 it is more."""
    return 0.0 if one.is_equal else one.largest / one.limit if one.limit else float("inf")


def explained(one: Difference) -> str:
    """A difference in words."""
    if one.is_equal:
        return "0"
    if one.is_rounding:
        return f"{one.largest:.1e}, rounding"
    size = "" if one.largest == float("inf") else f"{one.largest:.2e}; "
    return f"DIFFERS: {size}first at {one.place}: {one.first!r} in the record, {one.second!r} now"


def checked(overrides: Sequence[str]) -> list[str]:
    """The overrides, if a record alone can be computed with them again."""
    for override in overrides:
        if not override.startswith(SETTABLE):
            raise ConfigError(f"--set {override}: expected settings that begin with {' or '.join(SETTABLE)}")
    return list(overrides)


def side_by_side(record: StepRecord, before: Config, after: Config, words: Sequence[str]) -> str:
    """The terms of a step as they were and as they would have been."""
    columns = []
    for config in (before, after):
        with rewards_of(config) as rewards:
            columns.append(terms(again(record, config, rewards), config))
    lines = [f"step {record.step}{'':23}{'recorded':>14}  {' '.join(words)}"]
    lines += [f"{name:30}{columns[0][name]:14.6g}{columns[1][name]:14.6g}" for name in columns[0]]
    return "\n".join(lines)


def terms(record: StepRecord, config: Config) -> dict[str, float]:
    """What the loss of a step is made of; of several updates the last."""
    values = record.tensors
    weights, last = values["weights"], {name: values[name][..., -1] for name in ("ratio", "clipped", "loss")}
    beta = beta_of(record, config) if config.loss.kl_in == "loss" else 0.0
    kl = values["kl"][..., -1] if beta else torch.zeros_like(weights)
    if beta and config.loss.kl_gradient == "ratio":
        kl = kl * (values["logprobs"][..., -1] - values.get("scored_logprobs", values["old_logprobs"])).exp()
    penalty = float(beta * (weights * kl).sum())
    bonus = float(config.loss.entropy * (weights * values["entropy"][..., -1]).sum())
    loss = float(last["loss"].sum())
    return {
        "reward": float(values["reward"].mean()),
        "advantages, mean size": float(values["advantages"].abs().mean()),
        "completions with advantage": float(values["advantages"].ne(0).sum()),
        "weights, sum": float(weights.sum()),
        "ratio, largest": float(last["ratio"].max()),
        "tokens clipped": float(last["clipped"].sum()),
        "surrogate": penalty - bonus - loss,
        "beta * KL": penalty,
        "entropy bonus": bonus,
        "loss": loss,
    }


if __name__ == "__main__":
    run(main)
