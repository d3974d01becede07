"""Faults in running trainings: does the same command bring each run back, bit for bit? docs/robustness.md shows it.

    python launch/studies/chaos.py [--trials 200] [--seed 0] [--only KIND ...] [--setups NAME ...]

A trial starts a run with run.resume=true, waits for a moment, and does something to its processes: kill -9 of one, of
all, or of the launcher; SIGTERM, SIGINT, SIGSTOP; a disk that is full. Then the same command is given again, which is
the next trial, until the run is finished. A run came back if it got as far again. It ended right if its exit status is
that of docs/training.md and no traceback came of a signal; this is not looked at while it starts and exports. It is the
same bit for bit if all its checkpoints, its exported model and its metrics are those of a run that nothing was done to.
It can be stopped and started again: finished runs are kept. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hark import UserError
from hark.grpo.instruments.metrics import read_metrics
from hark.launch.common.entry import run
from hark.launch.common.pages import Markers, table
from hark.launch.studies.faults import (
    KINDS,
    SIGNALS,
    STATUSES,
    Target,
    differing,
    finished_equal,
    last_step,
    latest_log,
    of_run,
    start,
)
from hark.launch.studies.kept import DOCS, Kept

GOOD = ("came_back", "ended_right", "same")  # what a trial must be
MARKERS = Markers.of("launch/studies/chaos.py")
STEPS, LIMIT, PATIENCE = 24, 120.0, 15.0  # of a run; seconds until a trial must have ended; of run.patience
SETUPS: dict[str, tuple[int, tuple[str, ...]]] = {  # processes, settings
    "1 rank": (1, ()),
    "2 ranks": (2, ()),
    "3 ranks": (3, ()),
    "adapters": (2, ("lora.rank=4",)),
    "replicas": (2, ("sharding.replicas=2",)),
}


@dataclass
class Trial(Target):
    """A started run, its processes, and what became of it."""

    setup: str
    kind: str
    moment: str
    started: float
    step: int = 0  # the latest that was logged when it happened
    among_steps: bool = False  # whether it had begun, and had further steps to do
    ended_right: bool = True
    came_back: bool | None = None
    seconds: float | None = None  # from what was done until the run was as far again
    same: bool = True
    notes: list[str] = field(default_factory=list)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    project(arguments.root)
    for setup in arguments.setups:
        undisturbed(arguments.root, setup)
    kinds = [name for name in KINDS if name in arguments.only]
    kept, done = Kept(arguments.root / "trials.json"), list[dict[str, Any]]()
    for number in itertools.count():
        if len(done) >= arguments.trials:
            break
        share = -(-(arguments.trials - len(done)) // len(arguments.setups))
        names = {f"{arguments.seed} {setup} {number}": setup for setup in arguments.setups}
        settings = [kinds, STEPS]
        waiting = [name for name in names if not kept.has(name, settings)]
        done += [trial for name in names if name not in waiting for trial in kept.figures(name)["trials"]]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            do = partial(chain, arguments.root, kinds=kinds, limit=share)
            for name, trials in zip(waiting, pool.map(do, [names[name] for name in waiting], waiting), strict=True):
                kept.put(name, settings, {"trials": [row(trial) for trial in trials]})
                done += kept.figures(name)["trials"]
                print(f"{report(done)}\n", flush=True)
    done = done[: arguments.trials]
    if arguments.page is not None:
        arguments.page.write_text(MARKERS.filled(arguments.page.read_text(), report(done)))
    bad = [trial for trial in done if not all(trial[name] for name in GOOD)]
    if bad:
        raise UserError(f"{len(bad)} of {len(done)} runs did not come back as they were: {bad[:3]}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="how often something is done to a run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is done when (%(default)s)")
    parser.add_argument("--root", type=Path, default=Path("runs/studies/chaos"), help="of the runs (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="these alone")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS), metavar="NAME", help="these alone")
    parser.add_argument("--page", type=Path, default=DOCS / "robustness.md", help="the page with the table")
    return parser.parse_args(argv)


# Runs -----------------------------------------------------------------------------------------------------------------


def project(root: Path) -> None:
    """A data set and a small model."""
    if (root / "project" / "model" / "config.json").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    place = root / "project"
    for words in (
        ("init", place),
        ("new-model", "--data", place / "train.jsonl", "--size", "tiny", "--out", place / "model"),
    ):
        subprocess.run([sys.executable, "-m", "hark.launch", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def command(root: Path, directory: Path, setup: str) -> list[str]:
    """The command of a run, which starts it and goes on with it."""
    processes, settings = SETUPS[setup]
    words = [
        str(root / "project" / "train.yaml"), f"model.path={root}/project/model", f"run.directory={directory}",
        "run.resume=true", f"run.patience={PATIENCE}", "run.grace=20", f"optim.steps={STEPS}",
        "optim.prompts_per_step=6", "optim.micro_batch=2", "optim.lr=1e-3", "reward.weights={diversity: 1.0}",
        "rollout.group_size=4", "rollout.max_new_tokens=8", "evaluation.every=5", "checkpoint.every=2",
        "checkpoint.keep=1000", "log.completions=0", *settings,
    ]  # fmt: skip
    several = ["--processes", str(processes)] if processes > 1 else []
    return [sys.executable, "-m", "hark.launch", "train", *several, *words]


def undisturbed(root: Path, setup: str) -> Path:
    """The run that nothing is done to."""
    directory = root / setup.replace(" ", "-") / "undisturbed"
    if not (directory / "model" / "config.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        if status := start(command(root, directory, setup), directory).wait():
            raise UserError(f"the undisturbed run ended with status {status}; see {directory}-000.log")
    return directory


def chain(root: Path, setup: str, seed: str, *, kinds: Sequence[str], limit: int) -> list[Trial]:
    """Trials on one run until it is finished, or until there are `limit` of them."""
    chance = random.Random(seed)
    expected = undisturbed(root, setup)
    directory = expected.with_name(f"disturbed-{chance.randrange(10**6):06}")
    order = chance.sample(kinds, len(kinds))  # each of them is done before any is done again
    trials: list[Trial] = []
    for _ in range(limit + 100):
        kind = order[len(trials) % len(order)] if len(trials) < limit else None
        words = command(root, directory, setup)
        launcher = start(words, directory)
        began = time.monotonic()
        if kind is None:
            follow(trials, directory, launcher, until=lambda: False)
        else:
            trial = Trial(directory, launcher, SETUPS[setup][0], setup, kind, "", began)
            trial.moment = moment = moment_for(kind, last_step(directory), chance)
            follow(trials, directory, launcher, until=partial(is_due, trial, MOMENTS[moment](trial, chance)))
            if launcher.poll() is None:
                trial.step = last_step(directory)
                trial.among_steps = "continuing from" in latest_log(directory) and trial.step < STEPS - 1
                trial.started = time.monotonic()
                KINDS[kind](trial, chance)
                trials.append(trial)
        if not wait_for_end(directory, launcher):
            (trials or [trial])[-1].notes.append(f"not ended after {LIMIT:g} s")
            (trials or [trial])[-1].came_back = False
        elif trials and trials[-1].launcher is launcher:
            check_end(trials[-1], latest_log(directory))
        same(directory, expected, trials)
        if launcher.returncode == 0:  # finished, whatever was done to it
            note_return(trials, STEPS + 1)
            break
    if trials and not finished_equal(directory, expected):
        trials[-1].same = False
        trials[-1].notes.append("the finished run differs")
    for trial in trials:
        trial.came_back = trial.came_back is not False and trial.seconds is not None
    if all(getattr(trial, name) for trial in trials for name in GOOD):
        shutil.rmtree(directory)
    return trials


def is_due(trial: Trial, has_come: Callable[[], bool]) -> bool:
    """Whether the moment has come, and all ranks are there."""
    return len(trial.ranks()) == trial.processes and has_come()


def moment_for(kind: str, step: int, chance: random.Random) -> str:
    """When something is done to a run that goes on from about this step: an export comes at the end only."""
    late = step >= STEPS - 4
    return "a save" if kind == "disk full" else chance.choice([one for one in MOMENTS if (one == "an export") == late])


def follow(before: Sequence[Trial], directory: Path, launcher: subprocess.Popen, *, until: Callable[[], bool]) -> None:
    """Wait until something is true or the run has ended; note when it is farther than it was at earlier trials."""
    deadline, due = time.monotonic() + LIMIT, 0.0
    while launcher.poll() is None and time.monotonic() < deadline and not until():
        if time.monotonic() > due:
            note_return(before, last_step(directory))
            due = time.monotonic() + 0.1
        time.sleep(0.0005)
    note_return(before, last_step(directory))


def note_return(before: Sequence[Trial], step: int) -> None:
    for trial in before:
        if trial.seconds is None and step > trial.step:
            trial.seconds = time.monotonic() - trial.started


def wait_for_end(directory: Path, launcher: subprocess.Popen) -> bool:
    """Wait until no process of a run is left; whether that was so in time. Those that are left are killed."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if launcher.poll() is not None and not of_run(directory):
            return True
        time.sleep(0.05)
    for process in of_run(directory):
        os.kill(process, signal.SIGKILL)
    launcher.wait()
    return False


def check_end(trial: Trial, log: str) -> None:
    """Note an exit status that is not one of what was done, and a traceback after a signal."""
    if not trial.among_steps:
        return
    if trial.launcher.returncode not in STATUSES[trial.kind]:
        trial.notes.append(f"status {trial.launcher.returncode} instead of {STATUSES[trial.kind]}")
    if trial.kind in SIGNALS and "Traceback" in log:
        trial.notes.append("a traceback")
    trial.ended_right = not trial.notes


def same(directory: Path, expected: Path, trials: Sequence[Trial]) -> None:
    """Compare each checkpoint with that of the undisturbed run; the latest trial answers for a difference."""
    if trials and (names := differing(directory, expected)):
        trials[-1].same = False
        trials[-1].notes += [f"{name} differs" for name in names]


# Moments --------------------------------------------------------------------------------------------------------------


def a_step(trial: Trial, chance: random.Random) -> Callable[[], bool]:
    """Some time after some steps."""
    wanted, after, since = chance.randrange(1, 5), chance.uniform(0.0, 0.6), list[float]()

    def passed() -> bool:
        if not since and int(time.monotonic() * 50) % 2:
            if last_step(trial.directory) >= first + wanted:
                since.append(time.monotonic())
        return bool(since) and time.monotonic() > since[0] + after

    first = last_step(trial.directory)
    return passed


def a_save(trial: Trial, chance: random.Random) -> Callable[[], bool]:
    """While a checkpoint is written. What an earlier trial left half written does not count."""
    skipped, seen = chance.randrange(0, 3), set[int]()

    def written() -> set[int]:
        with suppress(FileNotFoundError):
            return {path.stat().st_ino for path in (trial.directory / "checkpoints").glob("*.partial")}
        return set()

    def passed() -> bool:
        seen.update(written() - left)
        return len(seen) > skipped

    left = written()

    return passed


def an_export(trial: Trial, chance: random.Random) -> Callable[[], bool]:
    """While the model is exported."""
    written = trial.directory / "model.partial"
    left = written.stat().st_ino if written.exists() else 0

    def passed() -> bool:
        with suppress(FileNotFoundError):
            return written.stat().st_ino != left
        return False

    return passed


def an_evaluation(trial: Trial, chance: random.Random) -> Callable[[], bool]:
    """While the validation questions are asked."""

    def passed() -> bool:
        if int(time.monotonic() * 100) % 2:
            return False
        try:
            lines = read_metrics(trial.directory)
        except (OSError, ValueError):
            return False
        return bool(lines) and "event" not in lines[-1] and lines[-1]["step"] % 5 == 0

    return passed


def a_start(trial: Trial, chance: random.Random) -> Callable[[], bool]:
    """While its ranks start."""
    after = time.monotonic() + chance.uniform(1.0, 9.0)
    return lambda: time.monotonic() > after


MOMENTS: dict[str, Callable[[Trial, random.Random], Callable[[], bool]]] = {
    "a step": a_step, "a save": a_save, "an evaluation": an_evaluation, "an export": an_export, "the start": a_start,
}  # fmt: skip


# Results --------------------------------------------------------------------------------------------------------------


def report(trials: Sequence[dict[str, Any]]) -> str:
    """A table by what was done."""
    heading = ("", "trials", "came back", "ended right", "bit for bit", "seconds lost, median", "most", "moments")
    lines = [cells(kind, [trial for trial in trials if trial["kind"] == kind]) for kind in KINDS]
    total = cells("all", trials)
    setups = ", ".join(f"{name} {sum(trial['setup'] == name for trial in trials)}" for name in SETUPS)
    return f"{table(heading, [line for line in (*lines, total) if line[1] != '0'])}\n\nTrials by setup: {setups}."


def cells(name: str, trials: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    seconds = [trial["seconds"] for trial in trials if trial["seconds"] is not None]
    moments = Counter(trial["moment"] for trial in trials)
    return (
        name, str(len(trials)), *(str(sum(bool(trial[what]) for trial in trials)) for what in GOOD),
        f"{statistics.median(seconds):.0f}" if seconds else "",
        f"{max(seconds):.0f}" if seconds else "", ", ".join(f"{name} {n}" for name, n in sorted(moments.items())),
    )  # fmt: skip


def row(trial: Trial) -> dict[str, Any]:
    return {
        "setup": trial.setup, "kind": trial.kind, "moment": trial.moment, "step": trial.step,
        **{name: getattr(trial, name) for name in GOOD}, "seconds": trial.seconds, "notes": trial.notes,
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
