"""Damaged and hostile files in every reader: each is read, or refused by a sentence. docs/robustness.md shows it.

    python launch/studies/fuzz.py [--inputs 100000] [--seed 0] [--only KIND ...] [--jobs 2]
    python launch/studies/fuzz.py --only "model directories" --number 17       one input again, with its traceback

An input is a set of good files of which one is changed: bits and bytes, lengths in headers, values and keys, cut, lost
and repeated pieces, pipes, links and holes of gigabytes in the place of files. The number of an input says which. It is
read as a command reads it, in a process with bounds of time and memory. It can be stopped and started again: the counts
of finished kinds are kept. Linux only.
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hark import UserError
from hark.data.worker import LateError, Worker, WorkerError
from hark.launch.common.entry import run
from hark.launch.common.pages import Markers, table
from hark.launch.studies.fuzz_attempt import Outcome, attempt
from hark.launch.studies.fuzz_inputs import TARGETS, make_project
from hark.launch.studies.kept import DOCS, Kept

MARKERS = Markers.of("launch/studies/fuzz.py")
LIMIT = 60.0  # seconds of one input; a model's template and tokenizer have 10 s of the processor
GOOD, BAD = ("accepted", "refused"), ("nonsense", "traceback", "hang", "died", "memory")
SHARE = sum(target.inputs for target in TARGETS.values())
VARIABLE = re.compile(r"\S*[/\\]\S*|'[^']*'|\"[^\"]*\"|\d+")  # of a message: paths, quoted texts and numbers


@dataclass
class Tally:
    """What became of the inputs of a target. sentences: those that were said, without what varies in them."""

    kinds: Counter[str] = field(default_factory=Counter)
    sentences: set[str] = field(default_factory=set)
    slowest: float = 0.0
    failures: dict[int, Outcome] = field(default_factory=dict)

    def add(self, number: int, outcome: Outcome) -> None:
        self.kinds[outcome.kind] += 1
        self.slowest = max(self.slowest, outcome.seconds)
        if outcome.kind == "refused":
            self.sentences.add(VARIABLE.sub("*", outcome.text)[:120])
        if outcome.kind in BAD:
            self.failures[number] = outcome

    def counts(self) -> dict[str, Any]:
        kinds = {kind: self.kinds[kind] for kind in (*GOOD, *BAD)}
        return kinds | {"sentences": len(self.sentences), "slowest": self.slowest}


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    root = arguments.root.absolute()
    make_project(root / "project")
    shutil.rmtree(root / "places", ignore_errors=True)
    if arguments.number is not None:
        for name in arguments.only:
            print(*attempt(name, root, arguments.seed, arguments.number), sep="\n")
        return
    kept, counts = Kept(root / "counts.json"), dict[str, dict[str, Any]]()
    for name in arguments.only:
        count = -(-TARGETS[name].inputs * arguments.inputs // SHARE)
        settings = [arguments.seed, count]
        if not kept.has(name, settings):
            tally = tried(name, root, arguments.seed, count, arguments.jobs)
            write_failures(root / "failures", name, tally)
            kept.put(name, settings, tally.counts())
        counts[name] = kept.figures(name)
        print(f"{report({name: counts[name]})}\n", flush=True)
    print(report(counts))
    if arguments.page is not None and list(arguments.only) == list(TARGETS):
        arguments.page.write_text(MARKERS.filled(arguments.page.read_text(), report(counts)))
    shutil.rmtree(root / "places", ignore_errors=True)
    bad = sum(one[kind] for one in counts.values() for kind in BAD)
    if bad:
        raise UserError(f"{bad} inputs were neither read nor refused by a sentence; see {root / 'failures'}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--inputs", type=int, default=SHARE, help="how many inputs of all kinds together (%(default)s)")
    add("--seed", type=int, default=0, help="of the changes (%(default)s)")
    add("--number", type=int, help="try this input alone, in this process")
    add("--root", type=Path, default=Path("runs/studies/fuzz"), help="of the files (%(default)s)")
    add("--jobs", type=int, default=2, help="processes (%(default)s)")
    add("--only", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="KIND", help="these kinds alone")
    add("--page", type=Path, default=DOCS / "robustness.md", help="the page with the table")
    return parser.parse_args(argv)


def tried(name: str, root: Path, seed: int, count: int, jobs: int) -> Tally:
    """Try the inputs of a target, shared by `jobs` processes."""
    tally = Tally()
    with ThreadPoolExecutor(jobs) as pool:
        shares = [range(job, count, jobs) for job in range(jobs)]
        for found in pool.map(functools.partial(outcomes, name, root, seed), shares):
            for number, outcome in found:
                tally.add(number, outcome)
    return tally


def outcomes(name: str, root: Path, seed: int, numbers: Sequence[int]) -> list[tuple[int, Outcome]]:
    """What becomes of some inputs in a process of their own, which is replaced if it hangs or dies."""
    worker = Worker(attempt.__module__, memory=TARGETS[name].memory)
    try:
        return [(number, outcome_in(worker, name, root, seed, number)) for number in numbers]
    finally:
        worker.close()


def outcome_in(worker: Worker, name: str, root: Path, seed: int, number: int) -> Outcome:
    started = time.monotonic()
    try:
        return worker.call(attempt, name, root, seed, number, timeout=LIMIT)
    except LateError as error:
        return Outcome("hang", str(error), time.monotonic() - started)
    except WorkerError as error:
        return Outcome("died", str(error), time.monotonic() - started)


# Results --------------------------------------------------------------------------------------------------------------


def report(counts: dict[str, dict[str, Any]]) -> str:
    heading = ("", "inputs", *GOOD, *BAD, "different sentences", "slowest, s")
    rows = [cells(name, one) for name, one in counts.items()]
    if len(counts) > 1:
        sums = {kind: sum(one[kind] for one in counts.values()) for kind in (*GOOD, *BAD)}
        rows.append(cells("all", sums | {"sentences": "", "slowest": max(one["slowest"] for one in counts.values())}))
    return table(heading, rows)


def cells(name: str, counts: dict[str, Any]) -> list[str]:
    numbers = [counts[kind] for kind in (*GOOD, *BAD)]
    numbers = [f"{number:,}" for number in (sum(numbers), *numbers)]
    return [name, *numbers, str(counts["sentences"]), f"{counts['slowest']:.1f}"]


def write_failures(directory: Path, name: str, tally: Tally) -> None:
    directory.mkdir(exist_ok=True)
    for path in directory.glob(f"{name}-*.txt"):
        path.unlink()
    for number, outcome in tally.failures.items():
        (directory / f"{name}-{number}.txt").write_text(f"{outcome.kind}\n{outcome.text}\n")


if __name__ == "__main__":
    run(main)
