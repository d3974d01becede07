"""The log of a run: metrics.jsonl, a console line with the remaining time, TensorBoard.

Steps count from 1. An evaluation before the first step is logged as step 0.
"""

import json
import math
import os
import resource
import shutil
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

PLAIN_INTERVAL = 5.0  # seconds between lines where stdout is not a terminal
PACE_STEPS = 20  # the pace, and with it the time left, is the mean over this many steps
BAR_WIDTH = 10  # characters


class Metrics:
    """The log of one run in `directory`. Rank 0 writes it; on other ranks each method does nothing.

    show: names of the values on the console line, in order; a name that a step does not have is left out.
    """

    def __init__(self, directory: str | Path, *, rank: int, total_steps: int, show: tuple[str, ...] = ()):
        self._writes = rank == 0
        self._path = Path(directory) / "metrics.jsonl"
        self._step = 0
        self._board: Any = None
        self._console = _Console(total_steps, show)
        if self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def truncate(self, step: int) -> None:
        """Drop every line of a step >= `step`, the first step of a resumed run; truncate(0) drops all.

        An incomplete last line, left by a crash, is dropped too. Must be called before the first log. The time per step
        is measured from this call on.
        """
        if not self._writes:
            return
        self._console.start()
        self._step = max(step - 1, 0)
        self._board = _open_board(self._path.parent, purge_step=step)
        if not self._path.exists():
            return
        kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step_of(line) < step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)  # atomic: a crash here loses no history

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record one finished step (1 .. total_steps); a non-finite value is null in the file."""
        if not self._writes:
            return
        self._step = step
        values = {name: float(value) for name, value in values.items()}
        self._append({"step": step, **values})
        self._to_board(step, values)
        self._console.step(step, values)

    def log_event(self, name: str, values: dict[str, Any]) -> None:
        """Record an event, such as an evaluation, at values["step"] or else at the last logged step."""
        if not self._writes:
            return
        values = {"step": self._step, **values}
        self._append({"event": name, **values})
        shown = {key: value for key, value in values.items() if _is_number(value) and key != "step"}
        self._to_board(values["step"], {f"{name}/{key}": value for key, value in shown.items()})
        self._console.event(name, values["step"], shown)

    def close(self) -> None:
        """Print the last step if it is not printed yet, and close TensorBoard's file."""
        if self._writes:
            self._console.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def _append(self, record: dict[str, Any]) -> None:
        # Opened and closed for each line, so that a later crash does not lose it.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

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


class _Console:
    """On a terminal one line that is overwritten; elsewhere a new line every few seconds, and for the last step."""

    def __init__(self, total_steps: int, show: tuple[str, ...]):
        self._total = total_steps
        self._show = show
        self._is_terminal = sys.stdout.isatty()
        self._times = deque([time.monotonic()], maxlen=PACE_STEPS + 1)  # when each of the latest steps ended
        self._printed = -math.inf  # when the latest plain line was printed
        self._pending: str | None = None  # not yet printed (plain), or printed without newline (terminal)

    def start(self) -> None:
        self._times.clear()
        self._times.append(time.monotonic())

    def step(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        self._times.append(now)
        self._pending = self._line(step, values)
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be overwritten
            print(f"\r\x1b[K{self._pending[:width]}", end="", flush=True)
        elif now - self._printed >= PLAIN_INTERVAL or step >= self._total:
            self._flush()
            self._printed = now

    def event(self, name: str, step: int, values: dict[str, float]) -> None:
        self._flush()
        print("  ".join([f"{name} at step {step}", *_named(values)]), flush=True)

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            print("" if self._is_terminal else self._pending, flush=True)
        self._pending = None

    def _line(self, step: int, values: dict[str, float]) -> str:
        pace = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        done = min(BAR_WIDTH, BAR_WIDTH * step // max(self._total, 1))
        head = f"step {step}/{self._total} [{'#' * done}{'.' * (BAR_WIDTH - done)}]"
        shown = _named({name: values[name] for name in self._show if name in values})
        left = _clock(pace * max(self._total - step, 0))
        return "  ".join([head, *shown, f"{_number(pace)} s/step", f"left {left}"])


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


def _step_of(line: str) -> float:
    """The step of a line; infinite for an incomplete line, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _finite(value: Any) -> Any:
    """The value with None for every non-finite float, at any depth, because JSON cannot hold them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(values: dict[str, float]) -> list[str]:
    return [f"{name} {_number(value)}" for name, value in values.items()]


def _number(value: float) -> str:
    """Three digits, without an exponent where the number is readable without one."""
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from one hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
