"""Write a checkpoint of a run as a Hugging Face directory with adapters merged, or the adapters alone.

    python launch/export.py RUN [--step N] [--to DIRECTORY] [--dtype float32|bfloat16] [--adapters]
    torchrun --nproc-per-node GPUS launch/export.py RUN ...

RUN is the run.directory of launch/train.py or launch/sft.py. Under torchrun each process holds its share of the model.
"""

import argparse
from pathlib import Path

import torch

from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import joined_world
from hark.grpo.runtime.export import export, export_adapters
from hark.launch.common.entry import run
from hark.launch.common.exports import announce_export
from hark.launch.common.trained import find_trained
from hark.shown import say


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    trained = find_trained(arguments.run, [], step=arguments.step)
    kind = "adapters" if arguments.adapters else "model"
    target = arguments.to or arguments.run / f"{kind}-{trained.step:06d}"
    with joined_world(threads=trained.config.run.threads) as world:
        trained = trained.intact(world)
        if trained.checkpoint is None:
            raise ConfigError(
                f"{arguments.run} kept no checkpoints; its model is in {trained.config.model.path} already"
            )
        policy = trained.load(world)
        if arguments.adapters and policy.lora is None:
            raise ConfigError(f"{arguments.run} trained no adapters; leave --adapters out to export its weights")
        if arguments.adapters:
            export_adapters(policy, target, world)
        else:
            export(policy, target, world, dtype=getattr(torch, arguments.dtype))
        if world.is_main:
            say(f"{trained.checkpoint} -> {target}")
            if not arguments.adapters:
                announce_export(target)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--step", type=int, help="the checkpoint after this step; the newest if left out")
    parser.add_argument("--to", type=Path, metavar="DIRECTORY", help="RUN/model-STEP or RUN/adapters-STEP if left out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the written weights")
    parser.add_argument("--adapters", action="store_true", help="write the adapters in PEFT's format, nothing merged")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
