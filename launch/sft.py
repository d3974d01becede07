"""Fine-tune a policy on the right answers.

torchrun --nproc-per-node GPUS launch/sft.py CONFIG [section.key=value ...]
python launch/sft.py CONFIG [section.key=value ...]
"""

from functools import partial

from parts import run, train

from data.prompts import target
from grpo.config import Config, load_config
from grpo.sft import SupervisedTrainer
from grpo.sharding import World
from models.policy import Policy


def main(argv: list[str]) -> None:
    train(load_config(argv), make_trainer)


def make_trainer(config: Config, world: World, policy: Policy, **parts) -> SupervisedTrainer:
    answer = partial(target, template=config.data.template)
    return SupervisedTrainer(config, world, policy, target=answer, **parts)


if __name__ == "__main__":
    run(main)
