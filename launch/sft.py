"""Fine-tune a policy on the right answers.

torchrun --nproc-per-node GPUS launch/sft.py CONFIG [section.key=value ...]
python launch/sft.py CONFIG [section.key=value ...]
"""

from functools import partial
from typing import Any

from hark.data.prompts import target
from hark.grpo.config import Config
from hark.grpo.runtime.collectives import World
from hark.grpo.sft import SupervisedTrainer
from hark.launch.common.config_file import help_if_asked, load_config
from hark.launch.common.entry import run
from hark.launch.common.training import train
from hark.models.policy import Policy


def main(argv: list[str]) -> None:
    help_if_asked(argv, __doc__)
    train(load_config(argv), make_trainer, judged=False, answered="fine-tuning")


def make_trainer(config: Config, world: World, policy: Policy, **parts: Any) -> SupervisedTrainer:
    answer = partial(target, template=config.data.template)
    return SupervisedTrainer(config, world, policy, target=answer, **parts)


if __name__ == "__main__":
    run(main)
