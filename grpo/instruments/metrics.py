"""The log of a run: metrics.jsonl, completions.jsonl, the console, TensorBoard.

Steps count from 1. An evaluation before the first step is logged as step 0.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hark.grpo.instruments.console import Completion, Console


class Metrics:
    """The log of one run in `directory`. Rank 0 writes it; on other ranks each method does nothing.

    show: names of the values on the console line, the most important first; one that a step does not have is left out.
    """

    def __init__(self, directory: str | Path, *, rank: int, total_steps: int, show: tuple[str, ...] = ()):
        self._writes = rank == 0
        self._path, self._completions = (Path(directory) / f"{name}.jsonl" for name in ("metrics", "completions"))
        self.step = 0  # the latest that is logged
        self._board: Any = None
        self._console = Console(total_steps, show)
        if self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def truncate(self, step: int) -> None:
        """Drop every line of a step >= `step`, the first step of a resumed run; truncate(0) drops all.

        An incomplete last line, left by a crash, is dropped too. Must be called before the first log. The time per step
        is measured from this call on.
        """
        self.step = max(step - 1, 0)
        if not self._writes:
            return
        self._console.start()
        self._board = _open_board(self._path.parent, purge_step=step)
        for path in (self._path, self._completions):
            if path.exists():
                _truncate(path, step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record one finished step (1 .. total_steps); a non-finite value is null in the file."""
        self.step = step
        if not self._writes:
            return
        values = {name: float(value) for name, value in values.items()}
        self._append({"step": step, **values})
        self._to_board(step, values)
        self._console.step(step, values)

    def log_event(self, name: str, values: dict[str, Any]) -> None:
        """Record an event, such as an evaluation, at values["step"] or else at the last logged step."""
        if not self._writes:
            return
        values = {"step": self.step, **values}
        self._append({"event": name, **values})
        shown = {key: value for key, value in values.items() if _is_number(value) and key != "step"}
        self._to_board(values["step"], {f"{name}/{key}": value for key, value in shown.items()})
        self._console.event(name, values["step"], shown)

    def warn(self, text: str) -> None:
        """Print a warning."""
        if self._writes:
            self._console.print(f"warning: {text}")

    def show_completions(self, step: int, completions: Sequence[Completion]) -> None:
        """Print completions of a step, and add them to completions.jsonl."""
        if self._writes and completions:
            self._console.completions(step, completions)
            for one in completions:
                self._append({"step": step, **one._asdict()}, self._completions)

    def close(self) -> None:
        """Print the last step if it is not printed yet, and close TensorBoard's file."""
        if self._writes:
            self._console.flush()
        if self._board is not None:
            self._board.close()
            self._board = None

    def _append(self, record: dict[str, Any], path: Path | None = None) -> None:
        # Opened and closed for each line, so that a later crash does not lose it.
        with (path or self._path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record), allow_nan=False) + "\n")

    def _to_board(self, step: int, values: dict[str, float]) -> None:
        if self._board is None:
            self._board = _open_board(self._path.parent)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


class Clock:
    """The seconds of each phase of a step on this rank: `lap("rollout")` ends the phase that began at the last lap."""

    def __init__(self, device: torch.device):
        self._device = device
        self.start()

    def start(self) -> None:
        """Start a step."""
        self._seconds: dict[str, float] = {}
        self._started = self._lapped = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a phase, after the device has finished its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._lapped
        self._lapped = now

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
    """The lines of the metrics.jsonl of a run; none if there is no such file. An incomplete last line is left out."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _open_board(directory: Path, purge_step: int | None = None) -> Any:
    """TensorBoard's writer; where the package is not installed, one that writes nothing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return _NoBoard()
    return SummaryWriter(str(directory / "tensorboard"), purge_step=purge_step)


class _NoBoard:
    def add_scalar(self, name: str, value: float, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def _truncate(path: Path, step: int) -> None:
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) < step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)  # atomic: a crash here loses no history


def _step_of(line: str) -> float:
    """The step of a line; infinite for an incomplete line, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def finite(value: Any) -> Any:
    """The value with None for every non-finite float, at any depth, because JSON cannot hold them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
