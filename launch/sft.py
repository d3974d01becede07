"""Fine-tune a policy on the right answers.

    torchrun --nproc-per-node GPUS launch/sft.py CONFIG [section.key=value ...]
    python launch/sft.py CONFIG [section.key=value ...]
"""

from parts import (
    announce,
    checked_examples,
    judge,
    make_policy,
    report_skipped,
    run,
    training_loader,
    validation_batches,
)

from data.prompts import target
from grpo.config import load_config
from grpo.sft import SupervisedTrainer
from grpo.sharding import joined_world


def main(argv: list[str]) -> None:
    config = load_config(argv)
    with joined_world(threads=config.run.threads) as world:
        announce(config, world)
        policy = make_policy(config, world)
        held_out = config.data.validation and checked_examples(config, world, policy, config.data.validation)
        with training_loader(config, world, policy) as loader:
            trainer = SupervisedTrainer(
                config,
                world,
                policy,
                data=loader,
                target=lambda example: target(example, config.data.template),
                validation=held_out and (lambda: validation_batches(config, world, policy, held_out)),
                judge=judge,
            )
            trainer.train()
            report_skipped(config, world, loader)


if __name__ == "__main__":
    run(main)
