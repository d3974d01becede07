"""Measure what checkpoints cost: the wait of training, the writing thread, and the digests, as shares of a step.

    python launch/studies/saving.py [--steps 60]

Trains the demo's warm model (`make demo` leaves it in runs/mini) with checkpoint.every=2, so that steps beside a
writing thread and others alternate; once with checkpoint.background and once without. Then it loads a checkpoint, and
computes its digests alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from hark.grpo.instruments.flops import best_matmul_rate
from hark.grpo.instruments.metrics import read_metrics
from hark.grpo.runtime.checkpoint import checkpoints, load_checkpoint
from hark.grpo.runtime.collectives import joined_world
from hark.grpo.runtime.manifest import Manifest, sha256_of
from hark.launch import train
from hark.launch.common.config_file import load_config
from hark.launch.common.entry import run
from hark.launch.common.policies import make_policy

QUIET = ("evaluation.every=0", "checkpoint.export=false", "log.completions=0", "record.last=0")
WARM = 6  # steps that are not counted
REPEATS = 5  # of reading a checkpoint


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as directory:
        for background in (True, False):
            saved(Path(directory), background=background, steps=arguments.steps)
        read(Path(directory))
    torch.set_num_threads(1)
    rate = best_matmul_rate(torch.device("cpu"), torch.float32)
    print(f"on one core; its best rate of matrix products is {rate / 1e9:.1f} G multiply-adds/s")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of each of the two runs (%(default)s)")
    return parser.parse_args(argv)


def words(directory: Path, background: bool) -> list[str]:
    place = directory / ("background" if background else "at-once")
    return ["mini", f"run.directory={place}", f"checkpoint.background={str(background).lower()}", *QUIET]


def saved(directory: Path, *, background: bool, steps: int) -> None:
    """Train with checkpoints and print what they cost."""
    train.main([*words(directory, background), f"optim.steps={steps}", "checkpoint.every=2"])
    place = directory / ("background" if background else "at-once")
    lines = [line for line in read_metrics(place) if "seconds/step" in line][WARM:]
    # A checkpoint after an even step: the next step runs beside the thread, and the one after it has the figures.
    beside, alone = ([line["seconds/step"] for line in lines if line["step"] % 2 == odd] for odd in (1, 0))
    waits: dict[int, float] = {}
    for line in lines:
        waits[line["step"] // 2] = waits.get(line["step"] // 2, 0.0) + line.get("seconds/checkpoint", 0.0)
    step, wait = median(alone), median(list(waits.values())[1:-1])
    written = median(line["seconds/checkpoint_written"] for line in lines if "seconds/checkpoint_written" in line)
    files = Manifest.read(checkpoints(place / "checkpoints")[-1]).files
    size = sum(file.size for file in files.values())
    print(
        f"\nbackground={str(background).lower()}: checkpoints of {size / 2**20:.0f} MiB, steps of {step:.2f} s\n"
        f"  training waits {wait:.3f} s, {100 * wait / step:.0f} % of a step, or {wait / step:.2f} % of a run with "
        "checkpoint.every=100\n"
        f"  writing takes {written:.3f} s; a step beside it takes {median(beside) / step:.2f} times as long",
        flush=True,
    )


def read(directory: Path) -> None:
    """Print what digests cost in reading a checkpoint."""
    config = load_config(words(directory, True))
    place = directory / "background" / "checkpoints"
    with joined_world(threads=config.run.threads) as world:
        policy = make_policy(config, world)
        optimizer = torch.optim.AdamW([weight for weight in policy.parameters() if weight.requires_grad])
        files = [checkpoints(place)[-1] / name for name in Manifest.read(checkpoints(place)[-1]).files]
        whole, digests = [], []
        for _ in range(REPEATS):
            began = time.perf_counter()
            load_checkpoint(place, policy, optimizer, world)
            whole.append(time.perf_counter() - began)
            began = time.perf_counter()
            for path in files:
                sha256_of(path)
            digests.append(time.perf_counter() - began)
    size = sum(path.stat().st_size for path in files)
    print(
        f"reading a checkpoint takes {median(whole):.3f} s; the digests alone would take {median(digests):.3f} s, "
        f"{size / median(digests) / 2**30:.2f} GiB/s, and are computed meanwhile by a thread"
    )


if __name__ == "__main__":
    run(main)
