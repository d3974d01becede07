"""Answer the questions of data.validation greedily and write `evaluation.json` in run.directory.

    torchrun --nproc-per-node GPUS launch/evaluate.py CONFIG [section.key=value ...]
    python launch/evaluate.py CONFIG [section.key=value ...]

evaluation.silent=true asks every question again with its clip replaced by silence: does the model listen?
"""

import dataclasses
import json
from pathlib import Path

from parts import announce, checked_examples, judge, make_policy, run, validation_batches

from data.examples import Example
from grpo.config import Config, ConfigError, load_config
from grpo.evaluate import accuracies, evaluate
from grpo.sharding import World, joined_world
from models.policy import Policy


def main(argv: list[str]) -> None:
    config = load_config(argv)
    if config.data.validation is None:
        raise ConfigError("data.validation is missing; it names the JSONL file of the questions to answer")
    with joined_world(threads=config.run.threads) as world:
        announce(config, world)
        policy = make_policy(config, world)
        examples = checked_examples(config, world, policy, config.data.validation)
        rows = answers(config, world, policy, examples, silent=False)
        silent = answers(config, world, policy, examples, silent=True) if config.evaluation.silent else None
        if world.is_main:
            chances = [1 / len(example.choices) for example in examples[: config.evaluation.limit]]
            result = accuracies(rows, "task", "category") | {"chance": sum(chances) / len(chances)}
            if silent is not None:
                result["silent_accuracy"] = accuracies(silent)["accuracy"]
            write(config, result, rows)


def answers(config: Config, world: World, policy: Policy, examples: list[Example], *, silent: bool):
    batches = validation_batches(config, world, policy, examples, silent=silent)
    return evaluate(policy, batches, judge, world, max_new_tokens=config.rollout.max_new_tokens)


def write(config: Config, result: dict[str, float], rows: list[dict]) -> None:
    directory = Path(config.run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    record = result | {"config": dataclasses.asdict(config), "rows": rows}
    (directory / "evaluation.json").write_text(json.dumps(record, indent=1))
    print(f"{config.model.path} on {len(rows)} questions of {config.data.validation}:")
    for name, value in result.items():
        print(f"  {name:32} {100 * value:5.1f} %")


if __name__ == "__main__":
    run(main)
