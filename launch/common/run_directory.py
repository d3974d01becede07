"""Checks that a run directory holds no other run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from hark.grpo.config import Config, ConfigError

# Options that must not change when a run is resumed: those of the model, of what is trained, and of the order of the
# data. All others, such as the learning rate and the reward weights, may change.
FIXED = (
    ("run", "seed"),
    ("model", "path"),
    ("model", "reference"),
    ("model", "policy"),
    ("model", "train"),
    ("lora", "rank"),
    ("lora", "alpha"),
    ("lora", "targets"),
    ("lora", "path"),
    ("data", "train"),
    ("data", "order"),
    ("data", "order_by"),
    ("data", "stages"),
    ("data", "band"),
    ("data", "held_out"),
    ("data", "template"),
    ("loss", "reference_every"),  # a checkpoint has the weights of a reference that moves
    ("optim", "prompts_per_step"),
)
OF_STAGES = ("optim", "steps")  # the stages of a curriculum divide the whole run


def check_run_directory(config: Config) -> None:
    """Refuse to overwrite an earlier run, or to resume a run that was started with other settings."""
    directory = Path(config.run.directory)
    if config.run.resume:
        _refuse_another_run(config, directory)
    elif (directory / "metrics.jsonl").exists():
        raise ConfigError(
            f"{directory} already holds a run; continue it with run.resume=true, or choose another run.directory"
        )


def _refuse_another_run(config: Config, directory: Path) -> None:
    path = directory / "config.yaml"
    before = yaml.safe_load(path.read_text()) if path.exists() else {}
    keys = (*FIXED, OF_STAGES) if config.data.order == "staged" else FIXED
    for name, old, new in changed(before, config, keys):
        raise ConfigError(
            f"{name} is {new!r}, but the run in {directory} was started with {old!r}; "
            "resume it with that value, or choose another run.directory"
        )


def changed(before: dict, config: Config, keys: Sequence[tuple[str, str]]) -> Iterator[tuple[str, object, object]]:
    """Of the (section, key) pairs those whose values differ: names, values in the saved configuration, new values.

    An option that the saved configuration lacks, because it is older than the option, counts as equal.
    """
    now = dataclasses.asdict(config)
    for section, key in keys:
        old, new = before.get(section, {}).get(key, now[section][key]), now[section][key]
        if old != new:
            yield f"{section}.{key}", old, new
