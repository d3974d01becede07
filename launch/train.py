"""Train a policy by GRPO.

torchrun --nproc-per-node GPUS launch/train.py CONFIG [section.key=value ...]
python launch/train.py CONFIG [section.key=value ...]
"""

from functools import partial
from typing import Any

from hark.data.prompts import target
from hark.grpo.advantage import ADVANTAGES, WITHOUT_GROUP
from hark.grpo.config import Config, ConfigError
from hark.grpo.runtime.collectives import World
from hark.grpo.trainer import Trainer
from hark.launch.common.config_file import help_if_asked, load_config
from hark.launch.common.entry import run
from hark.launch.common.policies import choose_attention, make_reference
from hark.launch.common.questions import controls_of, rewards_of
from hark.launch.common.training import train
from hark.models.policy import Policy


def main(argv: list[str]) -> None:
    help_if_asked(argv, __doc__)
    config = load_config(argv)
    if config.rollout.group_size < 2 and config.loss.advantage in ADVANTAGES.keys() - WITHOUT_GROUP:
        raise ConfigError(
            f"rollout.group_size must be at least 2: loss.advantage={config.loss.advantage} is relative to the group; "
            f"{' and '.join(WITHOUT_GROUP)} are not"
        )
    weights = [config.reward.weights.get("accuracy", 0), *config.reward.schedule.get("accuracy", {}).values()]
    judged = any(weights)
    needing = ["the reward accuracy"] * judged + ["loss.sft"] * (config.loss.sft > 0)
    train(config, make_trainer, judged=judged, answered=" and ".join(needing))


def make_trainer(config: Config, world: World, policy: Policy, **parts: Any) -> Trainer:
    choose_attention(config, world, policy)
    reference = make_reference(config, world, policy)
    rewards, controls = rewards_of(config), controls_of(config, policy)
    right = partial(target, template=config.data.template)
    return Trainer(
        config, world, policy, reference=reference, rewards=rewards, controls=controls, target=right, **parts
    )


if __name__ == "__main__":
    run(main)
