"""Compare a step of Hark's trainer with the R1-AQA procedure (launch/studies/baseline.py), on the CPU.

    hark benchmark [section.key=value ...] [--shape A|B|both] [--prompts 1 4] [--group 8] [--new-tokens 24]
                   [--threads 1 2] [--repeat 3] [--micro-batch 1] [--busy] [--quick] [--json FILE]

Hark's side is what `hark train` runs: the trainer of a configuration, with its loader, rewards, reference and log
of phases. The model is a Qwen2-Audio with 42 M random float32 weights. Clips last 10 s (shape A) or 30 s (shape B).
Baseline and Hark run alternately; one step of each is a turn, and the medians over the turns are compared. Both have
the same weights, and score the same tokens before the turns. If a logprob or gradient differs by more than 1e-4, the
program fails. --micro-batch is the number of prompts that both sides score at a time. --busy measures each row once
more beside a process that computes. --quick measures shape A with one prompt in one turn and takes less than a minute.
`planned` is the time of a step that `hark plan CONFIG --speed here` predicts, divided by Hark's.

Memory is the peak of the bytes of all tensors in one step, with weights, reference, gradients and optimizer state but
without temporary buffers inside kernels. It is measured in a separate step before the timed ones.

launch/studies/benchmark_gpu.py compares a step with the limits of a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hark.grpo.instruments.flops import best_matmul_rate, cost_of, macs
from hark.grpo.instruments.memory_tracker import MemoryTracker
from hark.grpo.runtime.collectives import joined_world
from hark.grpo.types import Rollout
from hark.launch.common.entry import run
from hark.launch.studies.sides import (
    SECONDS,
    BaselineSide,
    Size,
    Work,
    build_model,
    machine,
    medians,
    silence,
    timed_passes,
    with_update,
)
from hark.launch.studies.trainer_side import TrainerSide
from hark.models.lora import whole

# Values that Hark should reach; they are printed above the results and not checked.
TARGETS = {
    "A": dict(rollout_speedup=5.0, score_speedup=8.0, step_speedup=7.0, limit_share=0.5, memory_ratio=1 / 3),
    "B": dict(rollout_speedup=5.5, score_speedup=7.5, step_speedup=7.0, limit_share=0.5, memory_ratio=1 / 4),
}
PARITY = 1e-4

BUSY = "while True: pass"  # what a process does that computes


def main(argv: list[str], size: Size | None = None) -> None:
    arguments = parse(argv)
    silence()
    results = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build_model(directory, size or Size())
        print(heading(), flush=True)
        for shape in arguments.shape:
            print(target_line(shape), flush=True)
            for prompts in arguments.prompts:
                sizes = arguments.group, arguments.new_tokens, arguments.micro_batch
                work = Work(SECONDS[shape], prompts, *sizes)
                for result in compare(directory, work, arguments):
                    results.append({"shape": shape} | result)
                    print(result_line(results[-1]), flush=True)
        rates = [result["matmul_gmacs_per_second"] for result in results]
        print(f"{machine()['cpu']}: best rate of matrix products {max(rates):.1f} G multiply-adds/s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    worst = max(result["parity"] for result in results)
    if worst > PARITY:
        print(
            f"the numbers differ by {worst:.1e}, more than {PARITY:.0e}: the speed-ups are not valid", file=sys.stderr
        )
        raise SystemExit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="of the trainer's configuration")
    parser.add_argument("--shape", choices=("A", "B", "both"), default="both")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens of each completion")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3, help="turns; their median is reported")
    parser.add_argument("--micro-batch", type=int, default=1, help="prompts scored at a time")
    parser.add_argument("--busy", action="store_true", help="once more beside a process that computes")
    parser.add_argument("--quick", action="store_true", help="shape A, one prompt, one turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        threads = min(2, os.cpu_count() or 1)
        arguments.shape, arguments.prompts, arguments.threads, arguments.repeat = "A", [1], [threads], 1
    arguments.shape = ["A", "B"] if arguments.shape == "both" else [arguments.shape]
    if min(*arguments.prompts, *arguments.threads, arguments.repeat, arguments.micro_batch, arguments.new_tokens) < 1:
        parser.error("prompts, threads, repeat, micro-batch and new tokens must be at least 1")
    if arguments.group < 2:
        parser.error("--group must be at least 2")
    return arguments


def compare(directory: Path, work: Work, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures of a step for each number of threads; with `busy` also beside a process that computes."""
    threads, busy = arguments.threads, arguments.busy
    torch.set_num_threads(max(threads))
    with joined_world() as world:
        hark = TrainerSide(directory, work, world, arguments.settings)
        sides = {"baseline": BaselineSide(directory, work), "hark": hark}
        drawn = hark.rollout()  # both sides score these completions
        memory = {name: peak_memory(side, drawn) for name, side in sides.items()}
        parity = differences(sides, drawn)
        for count, beside in itertools.product(threads, [False, True] if busy else [False]):
            torch.set_num_threads(count)
            with busy_process() if beside else nullcontext():
                figures = measure(sides, drawn, arguments.repeat)
            yield (
                {"prompts": work.prompts, "threads": count, "busy": beside, "parity": max(parity)}
                | figures
                | {
                    "memory_ratio": memory["hark"] / memory["baseline"],
                    "memory_gib": {name: peak / 2**30 for name, peak in memory.items()},
                    "work": asdict(work),
                }
            )
        hark.close()


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that computes on one core for as long as the block lasts."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def peak_memory(side: Any, drawn: Rollout) -> int:
    """The peak of the bytes of all tensors in a step of a side. This step is also the side's warm-up."""
    with MemoryTracker() as tracker:
        tracker.add([*side.model.parameters(), *side.reference_model.parameters()])
        for parameter in side.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        side.optimizer_step()  # the first step allocates AdamW's moments
        if isinstance(side, TrainerSide):
            side.step()
        else:
            side.rollout()
            side.score(drawn, side.reference(drawn))
            side.optimizer_step()
    return tracker.peak


def measure(sides: dict[str, Any], drawn: Rollout, repeat: int) -> dict[str, Any]:
    """Run the sides in turns, and compare the median times of their phases."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    rate, baseline, hark = 0.0, sides["baseline"], sides["hark"]
    for _ in range(repeat):
        rate = max(rate, best_matmul_rate())
        turns["baseline"].append(with_update(baseline, timed_passes(baseline, drawn)[0]))
        turns["hark"].append(hark.step())
    seconds = {name: medians(taken) for name, taken in turns.items()}
    speedups = {f"{phase}_speedup": seconds["baseline"][phase] / seconds["hark"][phase] for phase in PHASES}
    passes = macs(cost_of(hark.policy), hark.prompts, drawn.mask.sum(dim=1), audio_id=hark.policy.audio_id)
    needed = passes.step(keep_prefill=hark.trainer.config.rollout.keep_prefill)
    return speedups | {
        "limit_share": needed / rate / seconds["hark"]["step"],
        "seconds": seconds,
        "necessary_gmacs": needed / 1e9,
        "matmul_gmacs_per_second": rate / 1e9,
        "prompt_tokens": len(hark.prompts[0].ids),
        "planned_share": hark.planned_seconds() / seconds["hark"]["step"],
    }


def differences(sides: dict[str, Any], drawn: Rollout) -> tuple[float, float]:
    """The largest difference of a logprob, and of a gradient relative to the largest gradient of its tensor."""
    logprobs = {name: side.score(drawn, side.reference(drawn)) for name, side in sides.items()}
    theirs = dict(sides["baseline"].model.named_parameters())
    gradients = []
    for name, parameter in sides["hark"].model.named_parameters():
        if parameter.requires_grad:
            ours, expected = whole(parameter.grad), theirs[name].grad
            gradients.append(((ours - expected).abs().max() / expected.abs().max()).item())
    for side in sides.values():
        side.optimizer_step()  # leaves no gradients behind
    return (logprobs["hark"] - logprobs["baseline"]).abs().max().item(), max(gradients)


PHASES = ("rollout", "reference", "score", "optimizer", "step")
COLUMNS = (
    ("rollout_speedup", "rollout", "{:.2f} x"),
    ("reference_speedup", "reference", "{:.2f} x"),
    ("score_speedup", "score", "{:.2f} x"),
    ("optimizer_speedup", "optimizer", "{:.2f} x"),
    ("step_speedup", "step", "{:.2f} x"),
    ("limit_share", "of limit", "{:.2f}"),
    ("planned_share", "planned", "{:.2f}"),
    ("memory_ratio", "memory", "{:.2f}"),
    ("parity", "parity", "{:.0e}"),
)


def heading() -> str:
    columns = "".join(f"{title:>11}" for _, title, _ in COLUMNS)
    return f"{'shape':7}{'prompts':>8}{'threads':>12}{'baseline':>10}{'hark':>9}{columns}"


def target_line(shape: str) -> str:
    cells = {name: form.format(TARGETS[shape][name]) for name, _, form in COLUMNS if name in TARGETS[shape]}
    return f"{shape:7}{'target':>39}" + "".join(f"{cells.get(name, ''):>11}" for name, _, _ in COLUMNS)


def result_line(result: dict[str, Any]) -> str:
    seconds = "".join(
        f"{result['seconds'][name]['step']:{width}.2f} s" for name, width in (("baseline", 8), ("hark", 7))
    )
    cells = "".join(f"{form.format(result[name]):>11}" for name, _, form in COLUMNS)
    threads = f"{result['threads']}{' + busy' if result['busy'] else ''}"
    return f"{result['shape']:7}{result['prompts']:8}{threads:>12}{seconds}{cells}"


if __name__ == "__main__":
    run(main)
