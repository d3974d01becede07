"""Trackers: the metrics and completions of a run, also for TensorBoard, Weights & Biases and trackio.

Their packages are optional. All names are those of metrics.jsonl; `evaluation/accuracy` is that of an evaluation.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from hark.grpo.config import ConfigError

Audio: TypeAlias = "tuple[np.ndarray, int]"  # a waveform, -1 to 1, and its sample rate
PROJECT = "hark"  # of Weights & Biases and trackio; the variables WANDB_PROJECT and TRACKIO_PROJECT replace it


class Tracker(Protocol):
    """Where a run is logged. Steps count from 1."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of a step."""

    def completions(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        """Log completions of a step as a table."""

    def clips(self, step: int, clips: dict[str, Audio]) -> None:
        """Log the clips of these completions."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard:
    """Curves, texts and clips in `tensorboard/` of the run. A resumed run hides what it does again."""

    def __init__(self, directory: Path, config: dict[str, Any], start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start)
        self._writer.add_text("config", "```\n" + json.dumps(config, indent=2) + "\n```", start)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def completions(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        table = [columns, ["---"] * len(columns), *([_plain(cell) for cell in row] for row in rows)]
        self._writer.add_text("completions", "\n".join("| " + " | ".join(row) + " |" for row in table), step)

    def clips(self, step: int, clips: dict[str, Audio]) -> None:
        for name, (waveform, rate) in clips.items():
            self._writer.add_audio(name, waveform[None], step, sample_rate=rate)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases with `step` as its x-axis; resumed under its id, which `wandb/hark-id` holds.

    Steps that a resumed run does again stand twice in it. A table has the step in its name, because the page of a run
    shows the last table of each name only.
    """

    def __init__(self, directory: Path, config: dict[str, Any], start: int):
        import wandb

        self._wandb = wandb
        file = directory / "wandb" / "hark-id"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not start or not file.exists():
            file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=directory.as_posix(), dir=str(directory),
            id=file.read_text(encoding="utf-8"), resume="allow", config=config,
            settings=wandb.Settings(console="off"),  # the console line would be captured once per step
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def completions(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({"step": step, f"completions/step-{step:06}": table})

    def clips(self, step: int, clips: dict[str, Audio]) -> None:
        audio = {name: self._wandb.Audio(waveform, sample_rate=rate) for name, (waveform, rate) in clips.items()}
        self._run.log({"step": step, **audio})

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # waits until its process has written all; ours may end without functions of atexit


class Trackio:
    """A run of trackio, named after the run's directory; a resumed run continues it.

    Steps that a resumed run does again stand twice in it.
    """

    def __init__(self, directory: Path, config: dict[str, Any], start: int):
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=re.sub(r"[^\w.]+", "-", directory.as_posix()),
            resume="allow" if start else "never", config=config, embed=False, auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def completions(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        table = self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({"completions": table}, step=step)

    def clips(self, step: int, clips: dict[str, Audio]) -> None:
        audio = {
            name: self._trackio.Audio(_pcm(waveform), sample_rate=rate) for name, (waveform, rate) in clips.items()
        }
        self._run.log(audio, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a tracker is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"log.trackers names {name}, which is not installed; run: pip install {name}")


def open_trackers(names: Sequence[str], directory: Path, config: dict[str, Any], start: int) -> list[Tracker]:
    """The trackers of a run. start: the first step of a resumed run; 0 for a new one."""
    return [TRACKERS[name](directory, config, start) for name in names]


def _plain(cell: str | float) -> str:
    """A cell of a table in Markdown: everything but letters, digits and spaces as numbers, so that it stays text."""
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return re.sub(r"[^\w ]|_", lambda match: f"&#{ord(match[0])};", text)


def _pcm(waveform: np.ndarray) -> np.ndarray:
    """A waveform as 16-bit integers."""
    return (np.clip(waveform, -1, 1) * 32767).astype(np.int16)
