"""What a run prints: a line per step that fits the terminal, events, warnings and completions."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Sequence
from itertools import starmap
from typing import NamedTuple

from hark.shown import LONGEST_NAME, say, shown

PLAIN_INTERVAL = 5.0  # seconds between lines where stdout is not a terminal
PACE_STEPS = 20  # the pace, and with it the time left, is the mean over this many steps
BAR_WIDTH = 8  # characters
LONGEST_QUESTION, LONGEST_COMPLETION = 100, 400  # characters that are printed of each
INDENT = "    "
PACE = "s/step"  # the name of the pace among the values of a line
LABELS = {  # of names on the line, short so that all fit in 160 columns
    "reward/accuracy": "acc",
    "equal_reward_share": "equal",
    "reward/format": "format",
    "completion_tokens": "len",
    "grad_norm": "grad",
    "sampler_gap": "gap",
}


class Completion(NamedTuple):
    """A sampled answer to a question, what each reward gave it, and its advantage in its group."""

    id: str
    question: str
    text: str
    rewards: dict[str, float]
    reward: float
    advantage: float


class Console:
    """On a terminal one line that is overwritten; elsewhere a new line every few seconds, and for the last step.

    show: names of the values on the line, the most important first. A terminal gets as many as fit in its width.
    """

    def __init__(self, total_steps: int, show: tuple[str, ...]):
        self._total = total_steps
        self._show = show
        self._is_terminal = sys.stdout.isatty()
        self._times = deque([time.monotonic()], maxlen=PACE_STEPS + 1)  # when each of the latest steps ended
        self._printed = -math.inf  # when the latest plain line was printed
        self._pending: str | None = None  # not yet printed (plain), or printed without newline (terminal)

    def start(self) -> None:
        """Measure the time per step from now on."""
        self._times.clear()
        self._times.append(time.monotonic())

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show the values of a finished step."""
        now = time.monotonic()
        self._times.append(now)
        self._pending = self._line(step, values)
        if self._is_terminal:
            print(f"\r\x1b[K{self._pending}", end="", flush=True)
        elif now - self._printed >= PLAIN_INTERVAL or step >= self._total:
            self.flush()
            self._printed = now

    def event(self, name: str, step: int, values: dict[str, float]) -> None:
        """Print a line of its own with all values."""
        self.print("  ".join([f"{name} at step {step}", *starmap(_field, values.items())]))

    def completions(self, step: int, shown: Sequence[Completion]) -> None:
        """Print completions below their questions, with their rewards and advantages."""
        columns = ("advantage", "reward", *shown[0].rewards) if shown else ()
        self.print(f"completions of step {step}: {', '.join(columns)}")
        for before, one in zip([None, *shown], shown, strict=False):
            if before is None or before.id != one.id:
                say("  " + excerpt(one.question, min(LONGEST_QUESTION, self._width() - 2)))
            numbers = (one.advantage, one.reward, *one.rewards.values())
            head = INDENT + " ".join(f"{_number(number):>5}" for number in numbers) + "  "
            text = excerpt(one.text, LONGEST_COMPLETION) or "(empty)"
            say(*textwrap.wrap(text, self._width(), initial_indent=head, subsequent_indent=" " * len(head)))

    def print(self, text: str) -> None:
        """Print a line of its own, after the line of the latest step."""
        self.flush()
        say(text)

    def flush(self) -> None:
        """Print the line of the latest step if it is not printed yet, and end it."""
        if self._pending is not None:
            say("" if self._is_terminal else self._pending)
        self._pending = None

    def _width(self) -> int:
        """Characters of a line: a terminal's columns but one, because a line that wraps could not be overwritten."""
        return shutil.get_terminal_size().columns - 1 if self._is_terminal else sys.maxsize

    def _line(self, step: int, values: dict[str, float]) -> str:
        pace = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        done = min(BAR_WIDTH, BAR_WIDTH * step // max(self._total, 1))
        line = f"step {step}/{self._total} [{'#' * done}{'.' * (BAR_WIDTH - done)}]"
        values = values | {PACE: pace}
        fields = [f"left {_clock(pace * max(self._total - step, 0))}"]
        fields += [_field(LABELS.get(name, name), values[name]) for name in self._show if name in values]
        for field in fields:
            if len(line) + 1 + len(field) > self._width():
                break
            line += f" {field}"
        return line


def excerpt(text: str, longest: int) -> str:
    """A text on one line, its middle left out if it is longer.

    Control characters are escaped, because they could steer a terminal, and what stdout's encoding lacks.
    """
    encoding = sys.stdout.encoding or "utf-8"
    return shown(shown(text.strip(), longest).encode(encoding, "backslashreplace").decode(encoding), longest)


def _field(label: str, value: float) -> str:
    return f"{shown(label, LONGEST_NAME)} {_number(value)}"


def _number(value: float) -> str:
    """At most three digits, with an exponent only where the number is not readable without one."""
    size = abs(value)
    if 1e3 <= size < 1e7:
        return f"{value:.0f}"
    return f"{value:.0e}" if 0 < size < 1e-3 else f"{round(value, 3):.3g}"


def _clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from one hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
