"""An hour of the demo's GRPO with faults: memory, descriptors and threads stay, and the weights are those without.

    python launch/studies/soak.py [--minutes 60] [--every 3] [--seed 0] [--steps N]

Two runs of the same settings train side by side, each on two ranks. To one of them something is done every few minutes:
kill -9, SIGTERM, SIGINT or SIGSTOP of ranks or launcher, or a disk that is full. torchrun starts the ranks again; where
the launcher has ended too, the same command is given again. In both, a reward of the user's own hangs, dies or raises
now and then. Every few seconds all processes of both are looked at; samples.jsonl in the directory of the runs has what
was found. docs/robustness.md shows the result. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hark import UserError
from hark.grpo.instruments.metrics import read_metrics
from hark.launch import demo
from hark.launch.common.entry import run
from hark.launch.common.pages import Markers, table
from hark.launch.common.torchrun import torchrun
from hark.launch.studies import unreliable_reward
from hark.launch.studies.faults import KINDS, Target, differing, finished_equal, last_step, of_run, sent, start
from hark.launch.studies.kept import DOCS, LAUNCH

MARKERS = Markers.of("launch/studies/soak.py")
RANKS, INTERVAL, LIMIT = 2, 5.0, 120.0  # INTERVAL: seconds between samples; LIMIT: until an ended run has left
PAUSE, PAUSED = "pause of one rank, 5 s", 5.0
OF_TORCH = ("torchelastic_", "torchinductor_")
# Most that the last quarter may have above the first. Memory of a process that leaks nothing still wavers by a few
# percent, as the allocator keeps what it had. What is opened or started once per checkpoint, evaluation or failed
# reward, and stays, is far above two in an hour.
BOUNDS = {"memory": 0.05, "handles": 2, "threads": 2}  # memory: as a share of the first quarter


@dataclass
class Fault:
    """What was done to the run, and how it came back."""

    kind: str
    step: int  # the latest that was logged then
    when: float
    launcher: int
    ranks: list[int]
    way: str = ""
    seconds: float | None = None  # until the run was farther


class Growth(NamedTuple):
    """Medians of the first and of the last quarter of samples."""

    first: float
    last: float

    def is_flat(self, name: str) -> bool:
        bound = BOUNDS[name] * (self.first if name == "memory" else 1)
        return self.last - self.first <= bound


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    root = arguments.root
    if not (root / "warm" / "model" / "config.json").exists():
        demo.start(root, "qwen2_audio")
    steps = arguments.steps or steps_in(root, 60 * arguments.minutes)
    place = root / "runs"
    shutil.rmtree(place, ignore_errors=True)
    (place / "tmp").mkdir(parents=True)
    shared = set(os.listdir("/dev/shm"))
    chance = random.Random(arguments.seed)
    soak = Soak(root, place, steps=steps, every=60 * arguments.every, chance=chance)
    soak.run()
    left = leftovers(place, shared)
    text, fine = report(soak, left)
    (place / "report.md").write_text(text + "\n")
    print(text)
    page = arguments.page.read_text() if arguments.page.is_file() else ""
    if MARKERS.are_in(page):
        arguments.page.write_text(MARKERS.filled(page, text))
    if not fine:
        raise UserError("the runs are not equal, something grew, or something was left; see the table")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="of training without what faults cost (%(default)s)")
    parser.add_argument("--every", type=float, default=3, help="minutes between faults, on average (%(default)s)")
    parser.add_argument("--steps", type=int, help="of the runs; without it, as many as fill the minutes")
    parser.add_argument("--seed", type=int, default=0, help="of what is done when (%(default)s)")
    parser.add_argument("--root", type=Path, default=Path("runs/studies/soak"), help="of the runs (%(default)s)")
    parser.add_argument("--page", type=Path, default=DOCS / "robustness.md", help="the page with the table")
    return parser.parse_args(argv)


# Runs -----------------------------------------------------------------------------------------------------------------


def command(root: Path, directory: Path, steps: int) -> list[str]:
    """The command of a run, which starts it and goes on with it."""
    return [
        *torchrun(RANKS), "--max-restarts", "1000", str(LAUNCH / "train.py"), str(demo.GRPO_CONFIG),
        *demo.data_under(root), f"model.path={root}/warm/model", f"run.directory={directory}", f"optim.steps={steps}",
        "run.resume=true", "run.patience=30", "run.grace=20", "checkpoint.every=10", "reward.on_error=none",
        "reward.timeout=5",
        f"reward.weights={{accuracy: 1.0, format: 1.0, '{unreliable_reward.__file__}:unreliable': 0.0}}",
    ]  # fmt: skip


def started(root: Path, directory: Path, steps: int) -> Target:
    temporary = directory.parent / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    environ = {"TMPDIR": str(temporary.absolute())}
    return Target(directory, start(command(root, directory, steps), directory, environ=environ), RANKS)


def steps_in(root: Path, seconds: float, trial: int = 12) -> int:
    """How many steps fill this time, by a short trial of two runs side by side."""
    place = root / "timed"
    shutil.rmtree(place, ignore_errors=True)
    runs = [started(root, place / name, trial) for name in ("a", "b")]
    if any([one.launcher.wait() for one in runs]):
        raise UserError(f"a short run failed; see {place}")
    lines = [line for one in runs for line in read_metrics(one.directory) if line.get("step", 0) > trial // 2]
    step = statistics.fmean(line["seconds/step"] for line in lines if "seconds/step" in line)
    steps = max(trial, int(seconds / step))
    print(f"a step takes {step:.2f} s while both runs train; {steps} steps", flush=True)
    return steps


class Soak:
    """Both runs, what is done to one of them, and what is seen of their processes."""

    def __init__(self, root: Path, place: Path, *, steps: int, every: float, chance: random.Random):
        self.root, self.place, self.steps, self.every, self.chance = root, place, steps, every, chance
        self.plain, self.disturbed = (started(root, place / name, steps) for name in ("undisturbed", "disturbed"))
        self.faults: list[Fault] = []
        self.samples: list[dict[str, Any]] = []
        self.began = time.monotonic()
        self.minutes = 0.0
        self.launches = 2
        self.late = 0  # processes that had not left LIMIT seconds after their launcher
        self._kinds: list[str] = []
        self._due = self._next()
        self._failures = 0

    def run(self) -> None:
        """Until both runs have finished."""
        sampled = 0.0
        try:
            while self.plain.launcher.poll() is None or self.disturbed.launcher.poll() != 0:
                if self.plain.launcher.poll():
                    raise UserError(f"the undisturbed run failed; see {self.place}/undisturbed-000.log")
                if time.monotonic() - sampled > INTERVAL:
                    sampled = time.monotonic()
                    self._sample()
                self._look()
                time.sleep(0.2)
        finally:
            for one in (self.plain, self.disturbed):
                if one.launcher.poll() is None:
                    end(one.directory)
        self._note_return(self.steps + 1)
        self.minutes = (time.monotonic() - self.began) / 60

    def _look(self) -> None:
        """See what became of the disturbed run; start it again where it ended, or do the next thing to it."""
        status = self.disturbed.launcher.poll()
        self._note_return(last_step(self.disturbed.directory))
        if status is not None and status != 0:
            self._again()
        elif status is None and time.monotonic() > self._due and self._is_back():
            self._disturb()

    def _is_back(self) -> bool:
        return all(fault.seconds is not None for fault in self.faults) and len(self.disturbed.ranks()) == RANKS

    def _disturb(self) -> None:
        if not self._kinds:  # each kind once before any comes twice
            self._kinds = [*KINDS, PAUSE]
            self.chance.shuffle(self._kinds)
        kind, one = self._kinds.pop(), self.disturbed
        self.faults.append(Fault(kind, last_step(one.directory), time.monotonic(), one.launcher.pid, one.ranks()))
        print(f"{(time.monotonic() - self.began) / 60:.1f} min, step {self.faults[-1].step}: {kind}", flush=True)
        pause(one, self.chance) if kind == PAUSE else KINDS[kind](one, self.chance)
        self._due, self._failures = self._next(), 0

    def _next(self) -> float:
        return time.monotonic() + self.every * self.chance.uniform(0.5, 1.5)

    def _again(self) -> None:
        """Give the same command again, once all processes have left."""
        self._failures += 1
        if self._failures > 3:
            raise UserError(f"the disturbed run does not come back; see {self.place}/disturbed-*.log")
        until = time.monotonic() + LIMIT
        while (left := of_run(self.disturbed.directory)) and time.monotonic() < until:
            time.sleep(0.2)
        self.late += len(left)
        end(self.disturbed.directory)
        self.disturbed = started(self.root, self.disturbed.directory, self.steps)
        self.launches += 1

    def _note_return(self, step: int) -> None:
        """The run is back once new ranks are farther than the old ones came; after a pause, once it is farther."""
        status, ranks, now = self.disturbed.launcher.poll(), self.disturbed.ranks(), time.monotonic()
        for fault in (fault for fault in self.faults if fault.seconds is None):
            paused = fault.kind == PAUSE
            old = status not in (None, 0) or (status is None and (not ranks or ranks == fault.ranks))
            if old and not paused:
                fault.step = max(fault.step, step)
            elif step > fault.step:
                fault.seconds = now - fault.when
                same = fault.launcher == self.disturbed.launcher.pid
                fault.way = "no restart" if paused and same else "torchrun" if same else "command"

    def _sample(self) -> None:
        with (self.place / "samples.jsonl").open("a") as file:
            for one in (self.plain, self.disturbed):
                for line in seen(one.directory):
                    line = {"time": round(time.monotonic() - self.began, 1), "run": one.directory.name} | line
                    self.samples.append(line)
                    file.write(json.dumps(line) + "\n")


def pause(target: Target, chance: random.Random) -> None:
    """A rank that stands still for less than run.patience."""
    process = chance.choice(target.ranks())
    sent(process, signal.SIGSTOP)
    time.sleep(PAUSED)
    sent(process, signal.SIGCONT)


# Processes ------------------------------------------------------------------------------------------------------------


def end(directory: Path) -> None:
    for process in of_run(directory):
        sent(process, signal.SIGKILL)


def seen(directory: Path) -> list[dict[str, Any]]:
    """What each process of a run has now."""
    lines = []
    for process in of_run(directory):
        with suppress(OSError, KeyError):  # it has ended meanwhile
            lines.append(sample(process))
    return lines


def sample(process: int | str) -> dict[str, Any]:
    """Memory in MiB, open descriptors, threads and children of a process, and what it is."""
    place = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    rollup = (place / "smaps_rollup").read_text().splitlines()
    pss = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    born = int((place / "stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    up = float(Path("/proc/uptime").read_text().split()[0])
    return {
        "process": process, "born": born, "age": round(up - born, 1), "role": role(place),
        "memory": round(int(status["VmRSS"].split()[0]) / 1024, 1), "pss": round(pss / 1024, 1),
        "handles": len(os.listdir(place / "fd")), "threads": int(status["Threads"]),
        "children": len((place / "task" / status["Pid"].strip() / "children").read_text().split()),
    }  # fmt: skip


def role(place: Path) -> str:
    words = (place / "cmdline").read_bytes().decode().split("\0")
    if "hark.data.worker" in words:
        return "process of rewards"
    if "torch.distributed.run" in words:
        return "launcher"
    environ = dict(word.partition("=")[::2] for word in (place / "environ").read_bytes().decode().split("\0"))
    return f"rank {environ['RANK']}" if "RANK" in environ else "other"


def leftovers(place: Path, shared: set[str]) -> dict[str, list[str]]:
    """What the runs have left. Each torchrun leaves a directory of its errors, and torch one for compiled code."""
    processes = [pid for name in ("undisturbed", "disturbed") for pid in of_run(place / name)]
    temporary = sorted(os.listdir(place / "tmp"))
    return {
        "processes": list(map(str, processes)),
        "files in /dev/shm": sorted(set(os.listdir("/dev/shm")) - shared),
        "temporary files": [name for name in temporary if not name.startswith(OF_TORCH)],
        "directories of torch": [name for name in temporary if name.startswith(OF_TORCH)],
        "half-written files": [str(path) for path in place.glob("*disturbed/**/*.partial")],
    }


# Results --------------------------------------------------------------------------------------------------------------


def growth(samples: Iterable[dict[str, Any]], name: str) -> Growth:
    """The median of a figure in the first and in the last quarter of the time of some samples."""
    lines = sorted(samples, key=lambda line: line["time"])
    begin, stop = lines[0]["time"], lines[-1]["time"]
    first = [line[name] for line in lines if line["time"] <= begin + (stop - begin) / 4]
    last = [line[name] for line in lines if line["time"] >= stop - (stop - begin) / 4]
    return Growth(statistics.median(first), statistics.median(last))


def judged(samples: Sequence[dict[str, Any]], *, minutes: float) -> list[tuple[str, str, dict[str, Growth]]]:
    """Of each role in each run: its name, its lifetimes, and its growth over the whole time after the warm-up.

    The warm-up of a process is its first 2 minutes, or a tenth of the time where that is less: it then imports, reads
    the model, and meets its longest step.
    """
    warm, found = warm_up(minutes), []
    for name in sorted({(line["run"], line["role"]) for line in samples}, reverse=True):
        own = [line for line in samples if (line["run"], line["role"]) == name]
        lives = len({(line["process"], line["born"]) for line in own})
        # Of several lifetimes those parts are compared in which the processes have the same age. The process of rewards
        # is ended often, and has the same at all ages.
        since, until = (2.0, math.inf) if "rewards" in name[1] else (warm / 2, warm) if lives > 1 else (warm, math.inf)
        old = [line for line in own if since < line["age"] <= until]
        if len(old) >= 8:
            figures = {figure: growth(old, figure) for figure in BOUNDS}
            found.append((f"{name[0]}, {name[1]}", str(lives), figures))
    return found


def warm_up(minutes: float) -> float:
    return min(120.0, 6 * minutes)


def longest(samples: Sequence[dict[str, Any]], *, minutes: float) -> list[tuple[str, str, dict[str, Growth]]]:
    """The same of each process that was there for a sixth of the time after its warm-up: name, minutes, growth."""
    lives: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in samples:
        if line["age"] > warm_up(minutes):
            lives.setdefault((line["run"], line["role"], line["process"], line["born"]), []).append(line)
    found = []
    for (name, what, *_), lines in lives.items():
        span = (lines[-1]["time"] - lines[0]["time"]) / 60
        if span >= minutes / 6 and len(lines) >= 8:
            found.append((f"{name}, {what}", f"{span:.0f}", {figure: growth(lines, figure) for figure in BOUNDS}))
    return found


def report(soak: Soak, left: dict[str, list[str]]) -> tuple[str, bool]:
    """The tables, and whether all is as it should be."""
    plain, disturbed = soak.plain.directory, soak.disturbed.directory
    different = differing(disturbed, plain)
    equal = not different and finished_equal(disturbed, plain)
    whole = judged(soak.samples, minutes=soak.minutes)
    lives = longest(soak.samples, minutes=soak.minutes)
    flat = all(one.is_flat(name) for *_, figures in (*whole, *lives) for name, one in figures.items())
    clean = not soak.late and len(left["directories of torch"]) <= soak.launches + 1
    clean = clean and not any(names for name, names in left.items() if name != "directories of torch")
    back = all(fault.seconds is not None for fault in soak.faults)
    failures = [int(sum(line.get("reward_failures", 0) for line in read_metrics(one))) for one in (plain, disturbed)]
    text = [
        f"{soak.minutes:.0f} minutes, {soak.steps} steps on {RANKS} ranks, {len(soak.faults)} faults. Checkpoints, "
        f"exported model and metrics are {'equal bit for bit' if equal else 'NOT EQUAL'} to those of the undisturbed "
        f"run{''.join(f'; {name} differs' for name in different)}. Calls of rewards that failed: {failures[0]} in the "
        f"undisturbed run, {failures[1]} in the other.",
        of_faults(soak.faults),
        "Over the whole time, all processes of a kind together:",
        of_growth("processes", whole),
        "Of each process that was there for a sixth of the time:",
        of_growth("minutes", lives),
        "Left over: " + ", ".join(f"{name} {len(names)}" for name, names in left.items()) + f" (torchrun was "
        f"started {soak.launches} times); processes that did not end within {LIMIT:g} s of their launcher {soak.late}.",
    ]  # fmt: skip
    return "\n\n".join(text), equal and flat and clean and back and failures[0] == failures[1]


def of_faults(faults: Sequence[Fault]) -> str:
    ways = ("no restart", "torchrun", "command")
    rows = []
    for kind in [*KINDS, PAUSE]:
        own = [fault for fault in faults if fault.kind == kind]
        lost = [fault.seconds for fault in own if fault.seconds is not None]
        if own:
            times = (f"{statistics.median(lost):.0f}", f"{max(lost):.0f}") if lost else ("", "")
            rows.append((kind, str(len(own)), *(str(sum(one.way == way for one in own)) for way in ways), *times))
    heading = ("", "times", "no restart", "restarted by torchrun", "command given again", "seconds, median", "most")
    return table(heading, rows)


def of_growth(counted: str, rows: Sequence[tuple[str, str, dict[str, Growth]]]) -> str:
    heading = ("", counted, "memory, MiB", "handles", "threads", "flat")
    lines = []
    for name, count, figures in rows:
        cells = [f"{one.first:.0f} → {one.last:.0f}" for one in figures.values()]
        flat = all(one.is_flat(figure) for figure, one in figures.items())
        lines.append((name, count, *cells, "yes" if flat else "NO"))
    return table(heading, lines)


if __name__ == "__main__":
    run(main)
