"""Measure a step on several ranks, each with the same work (weak scaling), on the CPU.

    torchrun --nproc-per-node 2 launch/studies/weak_scaling.py MODEL --json FILE [--repeat 3] [--seconds 10]
                                [--prompts 1] [--group-size 8] [--new-tokens 24]

Each rank has one thread. The bytes that a rank receives in a step are counted, and are also computed by the formula of
grpo/instruments/communication.py.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch.distributed as dist

from hark.data.json_files import write_json
from hark.grpo.instruments.communication import step_bytes
from hark.grpo.runtime.collectives import GIB, CollectiveMeter, World, joined_world
from hark.grpo.runtime.sharding import device_mesh, shard
from hark.launch.common import run
from hark.launch.studies.sides import BASE, HarkSide, Work, medians, silence


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    silence()
    work = Work(**{field.name: getattr(arguments, field.name) for field in fields(Work)})
    with joined_world(threads=1) as world:
        figures = measure(world, arguments.model, work, arguments.repeat)
        if world.is_main:
            write_json(arguments.json, figures)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint directory")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--repeat", type=int, default=3, help="steps; their median is reported")
    for field in fields(Work):
        default = getattr(BASE, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args(argv)


def measure(world: World, directory: Path, work: Work, repeat: int) -> dict[str, float]:
    """The medians over this rank's steps, with the bytes that it received and those that the formula gives."""
    side = HarkSide(directory, work, shard=partial(shard, mesh=device_mesh(world), meter=world.meter))
    # The first step is left out, because it allocates AdamW's moments and FSDP's buffers.
    steps = [timed_step(side, world.meter) for _ in range(1 + repeat)][1:]
    micro_batches = len(list(work.micro_batches()))
    tokens = world.size * work.prompts * work.group_size * work.new_tokens
    figures = medians(steps)
    return figures | {
        "ranks": world.size,
        "tokens_per_second": tokens / figures["seconds/step"],
        "formula/gib": step_bytes(side.policy, side.frozen, shards=world.size, micro_batches=micro_batches) / GIB,
    }


def timed_step(side: HarkSide, meter: CollectiveMeter) -> dict[str, float]:
    """Seconds of a step that all ranks begin together, and the figures of the meter."""
    dist.barrier()
    meter.start()
    began = time.perf_counter()
    drawn = side.rollout()
    side.score(drawn, side.reference(drawn))
    side.optimizer_step()
    return {"seconds/step": time.perf_counter() - began} | meter.measured()


if __name__ == "__main__":
    run(main)
