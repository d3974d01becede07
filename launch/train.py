"""Train a policy by GRPO.

    torchrun --nproc-per-node GPUS launch/train.py CONFIG [section.key=value ...]
    python launch/train.py CONFIG [section.key=value ...]
"""

from parts import (
    announce,
    checked_examples,
    judge,
    make_policy,
    make_reference,
    report_skipped,
    rewards_of,
    run,
    training_loader,
    validation_batches,
)

from grpo.config import ConfigError, load_config
from grpo.sharding import joined_world
from grpo.trainer import Trainer


def main(argv: list[str]) -> None:
    config = load_config(argv)
    if config.rollout.group_size < 2:
        raise ConfigError("rollout.group_size must be at least 2: an advantage is relative to siblings")
    with joined_world(threads=config.run.threads) as world:
        announce(config, world)
        policy = make_policy(config, world)
        held_out = config.data.validation and checked_examples(config, world, policy, config.data.validation)
        with training_loader(config, world, policy) as loader:
            trainer = Trainer(
                config,
                world,
                policy,
                reference=make_reference(config, world),
                data=loader,
                rewards=rewards_of(config),
                validation=held_out and (lambda: validation_batches(config, world, policy, held_out)),
                judge=judge,
            )
            trainer.train()
            report_skipped(config, world, loader)


if __name__ == "__main__":
    run(main)
