"""Runs of a study: each is done once and its figures are kept, so that a study that is started again goes on.

A run is a program of launch/ in a process of its own, on one thread. When it has ended well, `finished.json` in its
directory says with which arguments; until then the run counts as not begun. A case of a study is one or several runs in
a row. The figures of a case are kept in a JSON file beside the study's page; such a case is not done again even where
its directory is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from hark import UserError
from hark.data.json_files import write_json
from hark.grpo.instruments.metrics import read_metrics
from hark.launch.common.torchrun import environment

LAUNCH = Path(__file__).parents[1]
DOCS = LAUNCH.parent / "docs"
FINISHED = "finished.json"
Case: TypeAlias = "tuple[Any, ...]"


@dataclass(frozen=True)
class Run:
    """A program of launch/ with its words; it writes to `directory`, which the words name too."""

    directory: Path
    program: str
    words: tuple[str, ...]

    @property
    def is_finished(self) -> bool:
        """Whether the run was done with these words."""
        path = self.directory / FINISHED
        return path.is_file() and json.loads(path.read_text())["words"] == [self.program, *self.words]

    def do(self) -> None:
        """Do the run from its beginning; its output is kept in output.txt. Raises UserError if it fails."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        command = [sys.executable, str(LAUNCH / self.program), *self.words]
        with (self.directory / "output.txt").open("w") as output:
            one_thread = environment() | {"OMP_NUM_THREADS": "1"}
            with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=one_thread) as process:
                _, code, usage = os.wait4(process.pid, 0)
                process.returncode = status = os.waitstatus_to_exitcode(code)
        if status:
            raise UserError(f"{' '.join(command)} ended with status {status}; see {self.directory / 'output.txt'}")
        seconds = round(usage.ru_utime + usage.ru_stime, 1)  # of the processor, as other runs may have shared it
        write_json(self.directory / FINISHED, {"words": [self.program, *self.words], "seconds": seconds})

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.directory)

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of the evaluations during training."""
        return [line for line in self.metrics() if line.get("event") == "evaluation"]


class Kept:
    """The figures of finished cases by name, in a JSON file: {"settings": what the case was, "figures": ...}."""

    def __init__(self, path: Path):
        self._path = path
        self._cases: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def has(self, name: str, settings: Any) -> bool:
        """Whether the case was done with these settings."""
        return name in self._cases and self._cases[name]["settings"] == settings

    def put(self, name: str, settings: Any, figures: dict[str, Any]) -> None:
        """Keep the figures of a case; the file is written at once."""
        self._cases[name] = {"settings": settings, "figures": figures}
        write_json(self._path, dict(sorted(self._cases.items())))

    def figures(self, name: str) -> dict[str, Any]:
        return self._cases[name]["figures"]


def do_all(cases: Mapping[str, Sequence[Run]], *, jobs: int = 1) -> Iterator[str]:
    """Do the runs of each case that are not finished, in order, `jobs` cases at a time; yields each finished case."""
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(do, runs): name for name, runs in cases.items()}
        try:
            for number, future in enumerate(as_completed(started), 1):
                future.result()
                print(f"{started[future]}: {number} of {len(cases)} finished", flush=True)
                yield started[future]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def missing(
    kept: Kept,
    cases: Mapping[str, Case],
    *,
    settings_of: Callable[..., Any],
    prepare: Callable[[Iterable[Case]], None],
    runs_of: Callable[..., Sequence[Run]],
    figures_of: Callable[[Sequence[Run]], dict[str, Any]],
    jobs: int,
) -> Iterator[str]:
    """Do the cases that are not kept, each a tuple of arguments of the functions, and keep them; yields their names.

    prepare: makes what these cases begin with; it is called only if a case is missing.
    """
    waiting = {name: case for name, case in cases.items() if not kept.has(name, settings_of(*case))}
    if waiting:
        prepare(waiting.values())
    runs = {name: runs_of(*case) for name, case in waiting.items()}
    for name in do_all(runs, jobs=jobs):
        kept.put(name, settings_of(*waiting[name]), figures_of(runs[name]))
        yield name


def options(text: str | None, name: str, *, seeds: str) -> argparse.ArgumentParser:
    """The options that every study has. name: of its runs and of its files in docs. seeds: what has so many runs."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path("runs/studies") / name
    parser.add_argument("--root", type=Path, default=root, help="of the runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help=f"runs of {seeds} (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, each on one thread (%(default)s)")
    parser.add_argument("--json", type=Path, default=DOCS / f"{name}.json", help="where the figures are written")
    parser.add_argument("--page", type=Path, default=DOCS / f"{name}.md", help="the page with the table")
    return parser


def do(runs: Sequence[Run]) -> None:
    """Do the runs of a case that are not finished."""
    for one in runs:
        if not one.is_finished:
            one.do()


def answered(directory: Path) -> list[dict[str, Any]]:
    """The rows of data.test of an evaluation, each with what was answered: prediction, correct, choice, ..."""
    evaluation = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
    with open(evaluation["config"]["data"]["test"], encoding="utf-8") as file:
        asked = {row["id"]: row for row in map(json.loads, file)}
    return [asked[row["id"]] | row for row in evaluation["rows"]]


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation; 0 for one value."""
    numbers = list(values)
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def percent(values: Iterable[float]) -> str:
    """Shares as "45.2 ± 1.3", in percent: their mean and spread; one share as "45.2"."""
    numbers = list(values)
    mean, spread = mean_and_spread(numbers)
    return f"{100 * mean:.1f} ± {100 * spread:.1f}" if len(numbers) > 1 else f"{100 * mean:.1f}"
