"""What can be done to a running training, how it is started, and whether it ended as one that nothing was done to.

launch/studies/chaos.py and launch/studies/soak.py use it. Linux only.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hark.grpo.instruments.metrics import read_metrics
from hark.grpo.runtime.checkpoint import checkpoints
from hark.grpo.runtime.manifest import Manifest, name_of, sha256_of
from hark.launch.common.torchrun import environment

# Figures of the machine; and the size of a recorded step, which names the directory of its run.
MEASURED = ("seconds/", "speed/", "memory/", "communication/", "record/mib")
MARK = "HARK_FAULTS"  # the variable by which all processes of a run are found, those too that lost their parent
FULL = 100_000  # bytes of the largest file that a process may write on a "full disk"


@dataclass
class Target:
    """A started run. processes: how many ranks it has."""

    directory: Path
    launcher: subprocess.Popen
    processes: int

    def ranks(self) -> list[int]:
        """The processes of the ranks, in order; none before the launcher has started them."""
        return sorted([self.launcher.pid] if self.processes == 1 else children(self.launcher.pid))


def start(words: Sequence[str], directory: Path, environ: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start a run, in a process group of its own as a terminal does; its output is kept beside its directory.

    environ: further variables of its environment.
    """
    logs = len(list(directory.parent.glob(f"{directory.name}-*.log")))

    with directory.with_name(f"{directory.name}-{logs:03}.log").open("wb") as log:
        return subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env=environment() | {"CUDA_VISIBLE_DEVICES": "", MARK: str(directory)} | dict(environ or {}),
        )  # fmt: skip


def last_step(directory: Path) -> int:
    try:
        return max((line["step"] for line in read_metrics(directory) if "event" not in line), default=0)
    except (OSError, ValueError):  # while it is replaced
        return 0


def latest_log(directory: Path) -> str:
    """The output of the latest start of a run."""
    return max(directory.parent.glob(f"{directory.name}-*.log")).read_text(errors="replace")


def differing(directory: Path, expected: Path) -> list[str]:
    """The checkpoints that differ from those of the undisturbed run.

    A signal in a validation leaves its figures to the next start: one that has none of them does not differ.
    """
    pairs = common(directory, expected)
    return [name_of(one.step) for one, right in pairs if held(one, held(right)[-1]) != held(right)]


def held(manifest: Manifest, validation: Any = None) -> tuple[Any, ...]:
    """What is compared of a checkpoint; `validation` is for one without such figures."""
    return manifest.files, manifest.state, manifest.about.get("validation", validation)


def common(directory: Path, expected: Path) -> Iterator[tuple[Manifest, Manifest]]:
    """The manifests of the checkpoints that both runs have, of each."""
    right = {path.name: path for path in checkpoints(expected / "checkpoints")}
    for path in checkpoints(directory / "checkpoints"):
        if path.name in right:
            yield Manifest.read(path), Manifest.read(right[path.name])


def finished_equal(directory: Path, expected: Path) -> bool:
    """Whether the exported models have the same bytes, the checkpoints the same values, the metrics the same lines."""
    models = [
        sorted((path.name, sha256_of(path)) for path in (one / "model").iterdir()) for one in (directory, expected)
    ]
    saved = all(held(one) == held(right) for one, right in common(directory, expected))
    return saved and models[0] == models[1] and figures(directory) == figures(expected)


def figures(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the figures of the machine, and without warnings, which depend on these."""
    lines = [line for line in read_metrics(directory) if line.get("event") != "warning"]
    return [{name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in lines]


# Processes ------------------------------------------------------------------------------------------------------------


def children(parent: int) -> list[int]:
    """The ranks that a launcher has started; none if it has ended."""
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return []


def of_run(directory: Path) -> list[int]:
    """The living processes that a run has started, whoever their parent is."""
    word, found = f"{MARK}={directory}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if word in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


# What is done ---------------------------------------------------------------------------------------------------------


def kill_one(target: Target, chance: random.Random) -> None:
    sent(chance.choice(target.ranks()), signal.SIGKILL)


def kill_all(target: Target, chance: random.Random) -> None:
    for process in [target.launcher.pid, *of_run(target.directory)]:
        sent(process, signal.SIGKILL)


def kill_launcher(target: Target, chance: random.Random) -> None:
    sent(target.launcher.pid, signal.SIGKILL)


def terminate(target: Target, chance: random.Random) -> None:
    sent(target.launcher.pid, signal.SIGTERM)


def terminate_one(target: Target, chance: random.Random) -> None:
    sent(chance.choice(target.ranks()), signal.SIGTERM)


def interrupt(target: Target, chance: random.Random) -> None:
    """Ctrl-C: the terminal sends it to every process."""
    os.killpg(target.launcher.pid, signal.SIGINT)


def stop_one(target: Target, chance: random.Random) -> None:
    """A rank that hangs. A run of one process has nobody to notice it: it goes on when it is told to."""
    ranks = target.ranks()
    process = chance.choice(ranks)
    sent(process, signal.SIGSTOP)
    if len(ranks) == 1:
        time.sleep(1)
        sent(process, signal.SIGCONT)
        kill_all(target, chance)


def disk_full(target: Target, chance: random.Random) -> None:
    """No file of a rank may become larger than FULL any more, which a checkpoint is; a restarted rank may."""
    for process in target.ranks():
        with suppress(ProcessLookupError):
            resource.prlimit(process, resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))


def sent(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


KINDS: dict[str, Callable[[Target, random.Random], None]] = {
    "kill -9 of one rank": kill_one,
    "kill -9 of all": kill_all,
    "kill -9 of the launcher": kill_launcher,
    "SIGTERM": terminate,
    "SIGTERM of one rank": terminate_one,
    "SIGINT": interrupt,
    "SIGSTOP of one rank": stop_one,
    "disk full": disk_full,
}
SIGNALS = ("SIGTERM", "SIGTERM of one rank", "SIGINT")
# The status with which a run must end that was among its steps (docs/training.md): a negative one is that of a launcher
# which was killed itself. Of ranks that fail together it is that of any. A small checkpoint fits on a full disk.
STATUSES: dict[str, tuple[int, ...]] = {
    "kill -9 of one rank": (-9, 137, 1),
    "kill -9 of all": (-9,),
    "kill -9 of the launcher": (-9,),
    "SIGTERM": (143,),
    "SIGTERM of one rank": (143,),
    "SIGINT": (130,),
    "SIGSTOP of one rank": (-9, 137, 1),
    "disk full": (1, 0),
}
