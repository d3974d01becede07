"""Train with every combination of some settings, and compare the runs in one table.

    python launch/sweep.py CONFIG run.seed=0,1,2 optim.lr=1e-4,3e-4 [section.key=value ...] --out DIR

Each combination is a run in DIR, named from its values. The same command again skips finished runs, and continues the
others from their newest checkpoint. With data.test each run answers it; without, the accuracy on the validation
questions counts. DIR/sweep.json and DIR/sweep.csv hold the table: for each setting the mean over run.seed, with a 95 %
interval by Student's t from two seeds on. A comma between [], {} or quotes does not separate values. The status is 1 if
a run failed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hark.data.json_files import write_json
from hark.grpo.config import Config, ConfigError
from hark.grpo.instruments.metrics import read_metrics
from hark.launch.common.config_file import load_config
from hark.launch.common.entry import run
from hark.launch.common.evaluation_file import read_evaluation
from hark.launch.common.intervals import mean_interval
from hark.launch.common.plain_yaml import read_options
from hark.launch.common.run_directory import changed
from hark.launch.common.torchrun import environment
from hark.shown import say, say_text

SEED = "run.seed"


@dataclass(frozen=True)
class Run:
    """One combination: the values that differ between runs by their names, and all words of its command line."""

    directory: Path
    values: dict[str, str]
    words: tuple[str, ...]
    config: Config

    @property
    def setting(self) -> str:
        """What runs that differ by their seeds only have in common."""
        return " ".join(f"{name}={value}" for name, value in self.values.items() if name != SEED) or "all runs"

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in read_metrics(self.directory) if "loss" in line), default=0)

    @property
    def is_trained(self) -> bool:
        exported = not self.config.checkpoint.export or (self.directory / "model" / "config.json").exists()
        return exported and self.last_step >= self.config.optim.steps

    @property
    def evaluation(self) -> Path | None:
        """The file of its test results, if it is to be tested."""
        return None if self.config.data.test is None else self.directory / "evaluation.json"


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    runs = combinations(arguments.words, arguments.out)
    for one in runs:
        check(one)
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = do_all(runs, arguments)
    say_text(save(runs, arguments.out))
    if failed:
        raise SystemExit(f"error: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "words",
        nargs="+",
        metavar="CONFIG section.key=VALUE,VALUE,...",
        help="as for launch/train.py, with alternatives",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the directory of the runs and the table")
    add("--sft", action="store_true", help="train by launch/sft.py instead of launch/train.py")
    add("--processes", type=_count, default=1, metavar="N", help="processes of each run (1)")
    add("--at-once", type=_count, default=1, metavar="K", help="runs side by side (1)")
    return parser.parse_intermixed_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text}")
    return int(text)


# The runs -------------------------------------------------------------------------------------------------------------


def alternatives(text: str) -> list[str]:
    """The values between the commas of a text that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += 0 if quote else (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def combinations(words: Sequence[str], out: Path) -> list[Run]:
    """Every combination of the values, as runs in `out`; ConfigError where one is not a configuration."""
    config, *overrides = words
    choices: dict[str, list[str]] = {}
    for word in overrides:
        name, _, text = word.partition("=")
        if name in ("run.directory", "run.resume"):
            raise ConfigError(f"{word}: a sweep sets {name} itself; leave it out, and name its directory with --out")
        choices[name] = alternatives(text)
        if "" in choices[name] or len(set(choices[name])) < len(choices[name]):
            raise ConfigError(f"{word}: a value is empty or given twice; the values are {choices[name]}")
    runs = []
    for values in itertools.product(*choices.values()):
        pairs = dict(zip(choices, values, strict=True))
        varied = {name: value for name, value in pairs.items() if len(choices[name]) > 1}
        directory = out / name_of(varied)
        chosen = (config, *(f"{name}={value}" for name, value in pairs.items()))
        runs.append(Run(directory, varied, chosen, load_config([*chosen, f"run.directory={directory}"])))
    twice = [path.name for path, count in Counter(one.directory for one in runs).items() if count > 1]
    if twice:
        raise ConfigError(f"two combinations would have the directory {twice[0]}; sweep over simpler values")
    return runs


def name_of(values: dict[str, str]) -> str:
    """A directory's name such as `seed=0,lr=1e-4`."""
    keys = Counter(name.partition(".")[2] for name in values)
    short = {name: name.partition(".")[2] if keys[name.partition(".")[2]] == 1 else name for name in values}
    return ",".join(re.sub(r"[^\w.=+-]+", "-", f"{short[name]}={value}") for name, value in values.items()) or "run"


def check(one: Run) -> None:
    """Refuse a run that cannot be tested, or whose directory holds a run with other settings."""
    checkpoint = one.config.checkpoint
    if one.evaluation and not (checkpoint.export or checkpoint.every):
        raise ConfigError("data.test is set; testing a run needs checkpoint.export=true or checkpoint.every above 0")
    path = one.directory / "config.yaml"
    before = read_options(path)
    keys = [(section.name, f.name) for section in fields(one.config) for f in fields(getattr(one.config, section.name))]
    keys = [key for key in keys if key not in (("run", "directory"), ("run", "resume"))]
    for name, old, new in changed(before, one.config, keys):
        raise ConfigError(f"{one.directory}: was run with {name}={old}, not {new}; choose another directory by --out")


# Running --------------------------------------------------------------------------------------------------------------


def do_all(runs: Sequence[Run], arguments: argparse.Namespace) -> list[str]:
    """Train and test what is not done yet, `--at-once` runs at a time; returns the names of the runs that failed."""
    waiting, failed = list(runs), []
    working: list[tuple[Run, subprocess.Popen]] = []
    try:
        while waiting or working:
            while waiting and len(working) < arguments.at_once:
                start_next(waiting.pop(0), working, arguments)
            ended = [(one, child) for one, child in working if child.poll() is not None]
            for one, child in ended:
                working.remove((one, child))
                if child.returncode:
                    failed.append(one.directory.name)
                    say(f"{one.directory.name}: failed: {last_line(log_of(one))} (all of it in {log_of(one)})")
                else:
                    start_next(one, working, arguments)
            if ended:
                save(runs, arguments.out)
            elif working:
                time.sleep(0.1)
    finally:
        for _, child in working:
            child.terminate()
        for _, child in working:
            child.wait()
    return failed


def start_next(one: Run, working: list[tuple[Run, subprocess.Popen]], arguments: argparse.Namespace) -> None:
    """Start the next program of a run, if it has one left: training, then its test."""
    words = next_command(one, sft=arguments.sft)
    if words is None:
        say(f"{one.directory.name}: done")
        return
    command, *rest = words
    parallel = ["--processes", str(arguments.processes)] if arguments.processes > 1 else []
    say(f"{one.directory.name}: {command}")
    with log_of(one).open("a", encoding="utf-8") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "hark.launch", command, *parallel, *rest],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
    working.append((one, child))


def next_command(one: Run, *, sft: bool) -> list[str] | None:
    """The words of the program of a run that has to run next."""
    directory = one.directory
    if not one.is_trained:
        return ["sft" if sft else "train", *one.words, f"run.directory={directory}", "run.resume=true"]
    if one.evaluation and not one.evaluation.exists():
        return ["evaluate", str(directory)]
    return None


def log_of(one: Run) -> Path:
    """The output of a run's programs."""
    return one.directory.with_name(one.directory.name + ".log")


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")


# The table ------------------------------------------------------------------------------------------------------------


def figures(one: Run) -> dict[str, float]:
    """The accuracies of a finished run: on the test questions, or the last and the best on the validation questions."""
    if not one.is_trained:
        return {}
    if one.evaluation:
        if not one.evaluation.exists():
            return {}
        accuracy = read_evaluation(one.evaluation).get("accuracy")
        return {} if accuracy is None else {"test": accuracy}
    measured = [
        line["accuracy"]
        for line in read_metrics(one.directory)
        if line.get("event") == "evaluation" and "accuracy" in line
    ]
    return {"validation, last": measured[-1], "validation, best": max(measured)} if measured else {}


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each setting and figure: each seed's value, their mean, and its interval or None."""
    rows = []
    for setting in dict.fromkeys(one.setting for one in runs):
        found = [(one, figures(one)) for one in runs if one.setting == setting]
        for name in dict.fromkeys(name for _, values in found for name in values):
            seeds = {one.config.run.seed: values[name] for one, values in found if name in values}
            mean, interval = mean_interval(list(seeds.values()))
            rows.append({"setting": setting, "accuracy": name, "mean": mean, "interval": interval, "seeds": seeds})
    return rows


def save(runs: Sequence[Run], out: Path) -> str:
    """Write sweep.json and sweep.csv, and return the table as text."""
    rows = table(runs)
    write_json(out / "sweep.json", {"settings": rows})
    with (out / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "accuracy", "seeds", "mean", "low", "high", "values"])
        for row in rows:
            values = " ".join(f"{seed}:{value:.6f}" for seed, value in row["seeds"].items())
            low, high = row["interval"] or ("", "")
            writer.writerow([row["setting"], row["accuracy"], len(row["seeds"]), row["mean"], low, high, values])
    return as_text(rows) if rows else "no run has an accuracy yet; set data.test, or evaluation.every and data.held_out"


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    width = max(len(row["setting"]) for row in rows)
    lines = [f"\n{'accuracy, %':{width}}  {'':16}   mean  95 % interval  each seed"]
    for row in rows:
        between = "{:.1f} to {:.1f}".format(*(100 * end for end in row["interval"])) if row["interval"] else ""
        seeds = "  ".join(f"{seed}: {100 * value:.1f}" for seed, value in row["seeds"].items())
        lines.append(f"{row['setting']:{width}}  {row['accuracy']:16} {100 * row['mean']:6.1f}  {between:13}  {seeds}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
