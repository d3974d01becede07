"""The log of a run: metrics.jsonl, completions.jsonl, the console, trackers.

Steps count from 1. An evaluation before the first step is logged as step 0.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from hark.files import write_whole
from hark.grpo.instruments.console import Completion, Console
from hark.grpo.instruments.diagnosis import Diagnosis
from hark.grpo.instruments.log_file import LogError, LogFile
from hark.grpo.instruments.trackers import Audio, Tracker
from hark.grpo.runtime.collectives import Progress
from hark.limits import is_plain

LARGEST_LOG = 1 << 30  # bytes of a metrics.jsonl that is read; a step has about 2 KB
LARGEST_VALUE = 1e100  # of a figure; the squares of larger ones would overflow
MOST_SPANS = 10  # of steps without a line, in a message
MEASURED = ("accuracy", "silent_accuracy", "questions")  # what others read of an evaluation


class Metrics:
    """The log of one run in `directory`. Rank 0 writes it; on other ranks each method does nothing.

    show: names of the values on the console line, the most important first; one that a step does not have is left out.
    dtype: that of the computation, on which a rule of the diagnosis depends. required: whether a line that cannot be
    written ends the run; else it is kept until it can be. trackers: opens the trackers, given the
    first step of a resumed run, or 0.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        rank: int,
        total_steps: int,
        show: tuple[str, ...] = (),
        dtype: str = "float32",
        required: bool = True,
        trackers: Callable[[int], list[Tracker]] = lambda start: [],
    ):
        self._writes = rank == 0
        self._path = Path(directory) / "metrics.jsonl"
        self._file = LogFile(self._path, required=required)
        self._completions = LogFile(Path(directory) / "completions.jsonl", required=required)
        self.step = 0  # the latest that is logged
        self._diagnosis = Diagnosis(dtype)
        self._open_trackers = trackers
        self._trackers: list[Tracker] = []
        self._console = Console(total_steps, show)
        if self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def truncate(self, step: int) -> None:
        """Drop every line of a step >= `step`, the first step of a resumed run; truncate(0) drops all.

        An incomplete last line, left by a crash, and damaged lines are dropped too; the steps that remain without a
        line are printed. Must be called before the first log: it opens the trackers, and the diagnosis reads the lines
        that remain. The time per step is measured from this call on.
        """
        self.step = max(step - 1, 0)
        if not self._writes:
            return
        self._console.start()
        self._trackers = self._open_trackers(step)
        for path in (self._path, self._completions.path):
            if path.exists():
                _truncate(path, step)
        lines = read_metrics(self._path.parent)
        for line in lines:
            self._diagnosis.add(line)
        if missing := sorted({*range(1, step)} - {line["step"] for line in lines if "event" not in line}):
            self._console.print(
                f"warning: {self._path} has no line of step {_spans(missing)}: it was damaged or cut; the run goes on, "
                "and its curves have a gap"
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record one finished step (1 .. total_steps); a non-finite value is null in the file."""
        self.step = step
        if not self._writes:
            return
        values = {name: float(value) for name, value in values.items()}
        line = self._append({"step": step, **values})
        self._track(step, values)
        self._console.step(step, values)
        self._warn(line)

    def log_event(self, name: str, values: dict[str, Any]) -> None:
        """Record an event, such as an evaluation, at values["step"] or else at the last logged step."""
        if not self._writes:
            return
        values = {"step": self.step, **values}
        line = self._append({"event": name, **values})
        shown = {key: value for key, value in values.items() if _is_number(value) and key != "step"}
        self._track(values["step"], {f"{name}/{key}": value for key, value in shown.items()})
        self._console.event(name, values["step"], shown)
        self._warn(line)

    def sync(self) -> None:
        """Have on the disk what is logged, as a checkpoint is: after a crash of the machine its steps are there."""
        if not self._writes:
            return
        for file in (self._file, self._completions):
            file.sync()

    def has_event(self, name: str, step: int) -> bool:
        """Whether an event of a step is logged; on other ranks than 0, False."""
        lines = read_metrics(self._path.parent) if self._writes else []
        return any(line.get("event") == name and line["step"] == step for line in lines)

    def show_completions(
        self, step: int, completions: Sequence[Completion], clips: Callable[[], dict[str, Audio]] = dict
    ) -> None:
        """Print completions of a step, and add them to completions.jsonl and the trackers.

        clips: returns the clips of their questions, for the trackers.
        """
        if not self._writes or not completions:
            return
        self._console.completions(step, completions)
        for one in completions:
            self._append({"step": step, **one._asdict()}, self._completions)
        if self._trackers:
            heard, rows = clips(), [_flat(one._asdict()) for one in completions]
            for tracker in self._trackers:
                tracker.completions(step, list(rows[0]), [list(row.values()) for row in rows])
                tracker.clips(step, heard)

    def close(self) -> None:
        """Print the last step if it is not printed yet, and close the trackers."""
        if self._writes:
            self._console.flush()
            self._file.close()
            self._completions.close()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def _append(self, record: dict[str, Any], file: LogFile | None = None) -> dict[str, Any]:
        """Add a line to a file, metrics.jsonl by default; returns what the file holds."""
        record = finite(record)
        (file or self._file).append(record)
        return record

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def _warn(self, line: dict[str, Any]) -> None:
        """Print and record what is found after a line, as events."""
        for name, text in self._diagnosis.add(line):
            self._append({"event": "warning", "step": line["step"], "name": name, "text": text})
            self._console.print(f"warning: {name}: {text}")


class Clock:
    """The seconds of each phase of a step on this rank: `lap("rollout")` ends the phase that began at the last lap.

    progress: is told which phase begins: the one that followed the same two phases in an earlier step.
    """

    def __init__(self, device: torch.device, progress: Progress | None = None):
        self._device, self._progress = device, progress
        self._next: dict[tuple[str, ...], str] = {}
        self.start()

    def start(self, step: int = 0) -> None:
        """Start a step, counted from 1."""
        self._step = step
        self._laps: tuple[str, ...] = ("",)
        self._seconds: dict[str, float] = {}
        self._started = self._lapped = time.perf_counter()
        self._mark()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a phase, after the device has finished its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._lapped
        self._lapped = now
        self._next[self._laps[-2:]] = name
        self._laps += (name,)
        self._mark()

    def _mark(self) -> None:
        if self._progress is not None:
            phase = self._next.get(self._laps[-2:], f"after {self._laps[-1]}" if self._laps[-1] else "beginning")
            self._progress.mark(f"{phase} of step {self._step}")

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, and of the step until now."""
        phases = {f"seconds/{name}": value for name, value in self._seconds.items()}
        return phases | {"seconds/step": time.perf_counter() - self._started}


def speed(values: dict[str, float], *, rate: float) -> dict[str, float]:
    """The speed of a step, from its `tokens`, `macs` and `seconds/step`; `rate` is multiply-adds per second."""
    seconds = values["seconds/step"]
    return {
        "speed/tokens_per_second": values["tokens"] / seconds,
        "speed/limit_share": values["macs"] / rate / seconds,
    }


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: tensors on its GPU since `restart_peak`, or the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, else KiB


def restart_peak(device: torch.device) -> None:
    """Reset the peak that `peak_gib` returns, on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of the metrics.jsonl of a run; none if there is no such file. An incomplete last line is left out.

    Raises LogError for a line that no run writes, because a run may come from anywhere.
    """
    path = directory / "metrics.jsonl"
    return [_line(path, number, line) for number, line in enumerate(_pieces(path)[:-1], start=1)]


def _pieces(path: Path) -> list[bytes]:
    """What stands between the ends of lines of a log, none if there is no file; the last is b"" or incomplete.

    Raises LogError for a pipe, a device or a huge file, before it is read.
    """
    try:
        if not path.exists():
            return []
        if not is_plain(path, LARGEST_LOG):
            raise LogError(f"{path}: not a file of at most {LARGEST_LOG >> 20} MB; expected the log of a run")
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise LogError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _line(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
        good = isinstance(line, dict) and "step" in line and isinstance(line.get("event", ""), str)
        figures = {}
        if good and line.get("event", "evaluation") == "evaluation":
            figures = {key: value for key, value in line.items() if "event" not in line or key in MEASURED}
        good = good and type(line["step"]) is int and all(map(_is_figure, (line["step"], *figures.values())))
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of too many digits
        good = False
    if not good:
        raise LogError(f"{path}:{number}: is not a line that a run writes; delete it, or copy the file again")
    return line


def _spans(steps: Sequence[int]) -> str:
    """Ascending steps as "2 to 5, 7"."""
    spans = [[step for _, step in span] for _, span in groupby(enumerate(steps), lambda pair: pair[1] - pair[0])]
    words = [f"{span[0]} to {span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans]
    return ", ".join(words[:MOST_SPANS]) + (", ..." if len(words) > MOST_SPANS else "")


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and abs(value) <= LARGEST_VALUE)


def _truncate(path: Path, step: int) -> None:
    kept = [line for line in _pieces(path) if _step_of(line) < step]
    write_whole(path, b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for an incomplete or damaged line, so that it is dropped."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else math.inf
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def finite(value: Any) -> Any:
    """The value with None for every non-finite float, at any depth, because JSON cannot hold them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """The record with "rewards": {"accuracy": 1.0} as "reward/accuracy": 1.0, the name of the metric."""
    rewards = {f"reward/{name}": value for name, value in record["rewards"].items()}
    return {name: value for name, value in record.items() if name != "rewards"} | rewards


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
