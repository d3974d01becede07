"""Compare evaluations of the same questions: differences with intervals, over all questions and by task.

    python launch/compare.py RUN RUN [RUN ...] [--json OUT]

RUN is a directory with an evaluation.json, or such a file. Each is compared with the first. The interval of a
difference is that of paired answers, by Newcombe's method 10; p is that of McNemar's exact test.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hark.data.benchmarks.paired import Paired, by_column, paired, pairs_of
from hark.data.errors import DataError
from hark.data.json_files import write_json
from hark.grpo.runtime.checkpoint import checkpoints, step_of
from hark.launch.common.entry import run
from hark.launch.common.evaluation_file import NAME, read_evaluation
from hark.shown import say, shown

SETTINGS = ("rollout.max_new_tokens", "data.template", "data.max_seconds")  # that change answers
WIDTH = 22  # of the column of names
LONGEST = 60  # characters of a task's or a model's name


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    first, *others = map(read, arguments.runs)
    records = [compared(first, other) for other in others]
    if arguments.json:
        write_json(arguments.json, {"first": str(arguments.runs[0]), "compared": records})


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) < 2:
        parser.error("at least two evaluations are needed")
    return arguments


def read(path: Path) -> dict:
    """The evaluation of a directory or file, with its own path as "path"."""
    file = path / NAME if path.is_dir() else path
    evaluation = read_evaluation(file)
    newest = max(map(step_of, checkpoints(file.parent / "checkpoints")), default=None)
    if newest is not None and newest != evaluation.get("step"):
        say(f"note: {file} is that of step {evaluation.get('step')}, and the run has step {newest} by now")
    return evaluation | {"path": str(path)}


def compared(first: dict, second: dict) -> dict:
    """Print the comparison of two evaluations; returns its figures."""
    names = f"{first['path']} and {second['path']}"
    if first["benchmark"] != second["benchmark"]:
        raise DataError(
            f"{names} are graded by the rules of {shown(first['benchmark'], LONGEST)} and "
            f"{shown(second['benchmark'], LONGEST)}"
        )
    pairs = pairs_of(first["rows"], second["rows"])
    if not pairs:
        raise DataError(f"{names} have no graded question in common; compare evaluations of one data.test")
    say(f"A: {title(first)}", f"B: {title(second)}")
    for name in SETTINGS:
        section, _, key = name.partition(".")
        values = [(evaluation.get("config") or {}).get(section, {}).get(key) for evaluation in (first, second)]
        if values[0] != values[1]:
            one, other = (shown(value, LONGEST) for value in values)
            say(f"note: they were asked with another {name}: {one} and {other}")
    alone = max(len(first["rows"]), len(second["rows"])) - len(pairs)
    if alone:
        say(f"{alone} questions are not graded in both and are left out")
    say(heading())
    parts = {"all": paired(pairs)} | {f"  {task}": part for task, part in by_column(pairs, "task").items()}
    for name, part in parts.items():
        say(line(name, part))
    both, first_only, second_only, neither = parts["all"]
    say(f"right in both {both}, only in A {first_only}, only in B {second_only}, in neither {neither}", "")
    return {"second": second["path"]} | {name.strip(): figures(part) for name, part in parts.items()}


def title(evaluation: dict) -> str:
    return f"{shown(evaluation.get('model') or '', 2 * LONGEST)}, in {evaluation['path']}".removeprefix(", in ")


def heading() -> str:
    return f"{'':{WIDTH}}{'questions':>9}{'A, %':>8}{'B, %':>8}{'B - A':>8}{'95 % interval':>17}{'p':>8}"


def line(name: str, part: Paired) -> str:
    low, high = part.interval
    figures = f"{sum(part):9}{100 * (part.first.accuracy or 0):8.1f}{100 * (part.second.accuracy or 0):8.1f}"
    limits = f"{100 * low:+.1f} to {100 * high:+.1f}"
    return f"{shown(name, LONGEST):{WIDTH}}{figures}{100 * part.difference:+8.1f}{limits:>17}{part.p_value:8.2g}"


def figures(part: Paired) -> dict[str, float | Sequence[float] | None]:
    return part._asdict() | {
        "first_accuracy": part.first.accuracy,
        "second_accuracy": part.second.accuracy,
        "difference": part.difference,
        "difference_interval": part.interval,
        "p_value": part.p_value,
    }


if __name__ == "__main__":
    run(main)
