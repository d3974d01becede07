"""Measure what recording costs: a step that is recorded in relation to one that is not, in the same run.

    python launch/studies/recording.py [--steps 120]

Trains the demo's warm model (`make demo` leaves it in runs/mini) with record.every=2, so that steps with and without a
record alternate, and prints the ratio of the medians of their times; once without the answers to the controls, and once
with them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

import torch

from hark.grpo.instruments.flops import best_matmul_rate
from hark.grpo.instruments.metrics import read_metrics
from hark.launch import train
from hark.launch.common.entry import run

QUIET = ("evaluation.every=0", "checkpoint.every=0", "checkpoint.export=false", "log.completions=0")
WARM = 10  # steps that are not counted


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    figures = {answers: measure(answers, arguments.steps) for answers in (0, 1)}
    torch.set_num_threads(1)
    rate = best_matmul_rate(torch.device("cpu"), torch.float32)
    print(
        f"\n{arguments.steps} steps on one core; its best rate of matrix products is {rate / 1e9:.1f} G multiply-adds/s"
    )
    print(f"{'record.answers':16}{'not recorded':>14}{'recorded':>12}{'ratio':>8}{'MiB':>8}")
    for answers, (plain, recorded, size) in figures.items():
        print(f"{answers:<16}{plain:12.3f} s{recorded:10.3f} s{recorded / plain:8.3f}{size:8.3f}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=120, metavar="N", help="steps of each of the two runs (%(default)s)"
    )
    return parser.parse_args(argv)


def measure(answers: int, steps: int) -> tuple[float, float, float]:
    """Median seconds of a step that is not recorded and of one that is, and the size of a record in MiB."""
    with tempfile.TemporaryDirectory() as directory:
        record = ("record.every=2", "record.keep=2", f"record.answers={answers}")
        train.main(["mini", f"run.directory={directory}/run", f"optim.steps={steps}", *record, *QUIET])
        lines = [line for line in read_metrics(Path(directory) / "run") if "seconds/step" in line][WARM:]
    plain, recorded = ([line for line in lines if ("record/mib" in line) == kept] for kept in (False, True))
    seconds = [median(line["seconds/step"] for line in part) for part in (plain, recorded)]
    return seconds[0], seconds[1], median(line["record/mib"] for line in recorded)


if __name__ == "__main__":
    run(main)
