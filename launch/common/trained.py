"""The models that a run trained: the checkpoint after a step, with the run's own configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hark.data.json_files import read_object
from hark.grpo.config import Config, ConfigError
from hark.grpo.instruments.metrics import read_metrics
from hark.grpo.runtime.checkpoint import CheckpointError, checkpoints, load_weights, step_of
from hark.grpo.runtime.collectives import World, exchange_rows
from hark.grpo.runtime.export import damage_of
from hark.launch.common.config_file import load_config
from hark.launch.common.policies import make_policy
from hark.models.policy import Policy
from hark.shown import say

CHOSEN = "chosen"  # the directory in a run's for what is written about its best model


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, ask or export: `config.model.path`, with the weights of a run's checkpoint if there is one.

    run, step: the directory and the finished steps of the run that trained it; None for the model of a configuration.
    spare: for the exported model of a run the model.path and the checkpoint that have the same weights, if there are.
    """

    config: Config
    name: str
    run: Path | None = None
    step: int | None = None
    checkpoint: Path | None = None
    spare: tuple[str, Path] | None = None

    def intact(self, world: World) -> Subject:
        """The same, or its spare where files of an exported model are damaged, which is said.

        Rank 0 reads them. Raises CheckpointError if there is no spare.
        """
        if self.run is None or self.checkpoint is not None:
            return self
        exported = Path(self.config.model.path)
        damage = exchange_rows([damage_of(exported)] if world.is_main else [], world)[0]
        if not damage:
            return self
        if self.spare is None:
            raise CheckpointError(f"{exported} is damaged: {damage}; copy it again; the run has no checkpoint to use")
        path, checkpoint = self.spare
        if world.is_main:
            say(
                f"warning: {exported} is damaged: {damage}; {checkpoint} is used; to write the model anew: "
                f"hark export {self.run} --to {exported}"
            )
        config = replace(self.config, model=replace(self.config.model, path=path))
        return replace(self, config=config, checkpoint=checkpoint, spare=None)

    def load(self, world: World) -> Policy:
        """The policy, sharded over the world."""
        policy = make_policy(self.config, world, train=self.checkpoint is not None)  # only trained weights are loaded
        if self.checkpoint is not None:
            load_weights(self.checkpoint, policy, world)
            if world.is_main:
                say(f"now with the weights of {self.name}")
        return policy


def of_run(directory: Path, config: Config, step: int, checkpoint: Path | None) -> Subject:
    """The model of a run after a step; without a checkpoint, its exported model, which `config.model.path` names."""
    return Subject(config, f"step {step} of {directory}", directory, step, checkpoint)


def is_run(word: str) -> bool:
    """Whether a word of the command line is the directory of a run and not a configuration or a model."""
    return (Path(word) / "config.yaml").is_file()


def check_run(directory: Path) -> None:
    """Raise ConfigError if a directory is not that of a run."""
    if not is_run(str(directory)):
        what = "no such directory" if not directory.exists() else "holds no config.yaml"
        raise ConfigError(f"{directory}: {what}; expected the run.directory of `hark train` or `hark sft`")


def read_run(directory: Path, overrides: list[str]) -> Config:
    """The configuration of a run, with overrides. Its directory may have been moved, and the number of ranks differ."""
    check_run(directory)
    config = directory / "config.yaml"
    return load_config([str(config), f"run.directory={directory}", "sharding.replicas=1", *overrides])


def saved(directory: Path) -> dict[int, Path]:
    """The checkpoints of a run by their steps, oldest first. Raises CheckpointError if there are none."""
    found = {step_of(checkpoint): checkpoint for checkpoint in checkpoints(directory / "checkpoints")}
    if not found:
        raise CheckpointError(f"{directory}: the run has no checkpoints; train with checkpoint.every above 0")
    return found


def find_trained(directory: Path, overrides: list[str], *, step: int | None = None, best: bool = False) -> Subject:
    """A model of a run: that after `step`, or the best on the validation questions, or the last.

    What is written about a model that is not the last goes to a directory of its own inside the run's.
    """
    place = directory / (CHOSEN if best else "" if step is None else f"step-{step:06d}")
    config = read_run(directory, [f"run.directory={place}", *overrides])
    exported = directory / "model"
    if step is None and not best and _is_last(exported, config):
        kept = checkpoints(directory / "checkpoints")
        spare = (config.model.path, kept[-1]) if kept else None
        model = replace(config.model, path=str(exported))
        config = replace(config, model=model, lora=replace(config.lora, rank=0, path=None))
        return replace(of_run(directory, config, config.optim.steps, None), spare=spare)
    found = saved(directory)
    step = best_step(directory) if best else max(found) if step is None else step
    if best and step not in found:
        raise CheckpointError(
            f"{directory}: the checkpoint of its best step, {step}, was deleted; checkpoint.weights=true keeps them all"
        )
    if step not in found:
        raise CheckpointError(f"{directory}: no checkpoint after step {step}; the run has {', '.join(map(str, found))}")
    return of_run(directory, config, step, found[step])


def _is_last(exported: Path, config: Config) -> bool:
    """Whether an exported model is that after the run's last step, and equal to it.

    Then nothing else of the run is needed. With adapters it differs from the model that was trained by rounding.
    """
    written = exported / "config.json"
    found = checkpoints(exported.parent / "checkpoints")
    if not written.exists() or not found:
        return written.exists()
    trained_last = step_of(found[-1]) == config.optim.steps
    newer = written.stat().st_mtime >= (found[-1] / "hark.json").stat().st_mtime
    return trained_last and newer and not config.lora.rank and config.lora.path is None


def best_step(directory: Path) -> int:
    """The step that `hark choose` selected, or else that of the best validation accuracy in the run's metrics."""
    if (directory / "choice.json").exists():
        step = read_object(directory / "choice.json").get("step")
        if type(step) is not int:
            raise ConfigError(f"{directory / 'choice.json'}: names no step; `hark choose {directory}` writes it")
        return step
    lines = [line for line in read_metrics(directory) if line.get("event") == "evaluation" and line["step"]]
    accuracy = {line["step"]: line["accuracy"] for line in lines if line.get("accuracy") is not None}
    if not accuracy:
        raise ConfigError(f"{directory}: the run has no validation accuracies; `hark choose {directory}` measures them")
    return highest(accuracy)


def highest(accuracy: dict[int, float]) -> int:
    """The step with the highest accuracy, the earliest of equals."""
    return max(accuracy, key=lambda step: (accuracy[step], -step))
