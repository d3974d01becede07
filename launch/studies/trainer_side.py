"""A step of the trainer that `hark train` makes of a configuration, for launch/studies/benchmark.py."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import soundfile

from hark.grpo.config import Config
from hark.grpo.instruments.shape import shape_of
from hark.grpo.loop import measured_step
from hark.grpo.runtime.collectives import World
from hark.launch.common.config_file import load_config
from hark.launch.common.planned import Run
from hark.launch.common.planned_speed import HERE, rates_of, seconds_of
from hark.launch.common.policies import make_policy
from hark.launch.common.questions import training_examples, training_loader
from hark.launch.studies.sides import BETA, CLIP, QUESTION, HarkSide, Work
from hark.launch.train import make_trainer
from hark.models.audio_policy import AudioPolicy
from hark.models.policy import Policy

PHASES = {"forward_backward": "score"}  # the trainer's names of phases for which the studies have others
EVER = 10**6  # steps of the run: its schedule does not reach its end


class TrainerSide(HarkSide):
    """Hark's side of a comparison: `step` is that of the trainer; the other phases are those of HarkSide, untimed.

    world: of this process. Questions, clips, configuration and run are written beside the model.
    """

    def __init__(self, directory: Path, work: Work, world: World, settings: Sequence[str] = ()):
        place = directory / f"{work.seconds:g}-seconds-{work.prompts}-prompts"
        config = write_run(place, directory, work, settings)
        self.work, self._done = work, 0
        with redirect_stdout(io.StringIO()):  # what a run says of itself
            self.policy = make_policy(config, world)
            examples = training_examples(config, world, self.policy)[0]
            self._loader = training_loader(config, world, self.policy, examples)
            self.trainer = make_trainer(config, world, self.policy, data=self._loader)
        assert isinstance(self.policy, AudioPolicy) and isinstance(self.trainer.reference.policy, Policy)
        # The audio placeholder is never sampled. As the only stop token, it makes every completion run to the limit.
        self.policy.model.generation_config.eos_token_id = self.policy.audio_id
        self.frozen, self.optimizer = self.trainer.reference.policy, self.trainer.optimizer
        of_step = sorted(self._loader.step(0), key=lambda one: str(one[0].id))
        self.prompts = tuple(prompt for _, prompt, _ in of_step)  # in the order of the waveforms
        self.model, self.reference_model = self.policy.model, self.frozen.model

    def step(self) -> dict[str, float]:
        """Seconds of each phase of the next step, and of the whole."""
        measured_step(self.trainer, self._done)
        self._done += 1
        seconds = {name.removeprefix("seconds/"): value for name, value in self.trainer.clock.seconds().items()}
        return {PHASES.get(name, name): value for name, value in seconds.items()}

    def planned_seconds(self) -> float:
        """Seconds of a step by the model of grpo/instruments/speed.py, with the rates that this machine has now."""
        shape, prompt = shape_of(self.policy), self.prompts[0]
        audio = sum(clip.tokens for clip in prompt.clips)
        planned = Run(self.trainer.config, 1, self.work.seconds, len(prompt.ids) - audio, audio)
        rates = rates_of(HERE, shape, planned)
        return sum(seconds_of(self.policy, shape, planned, rates, self.work.new_tokens).values())

    def close(self) -> None:
        """End the threads of the loader."""
        self._loader.close()


def write_run(place: Path, model: Path, work: Work, settings: Sequence[str]) -> Config:
    """Write the questions of a step with their clips, and a configuration that trains on them.

    With learning rate 0 an update takes the same time, and the weights are the same in all turns.
    """
    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, wave in enumerate(work.waveforms()):
        clip = place / f"{number:04}.wav"
        soundfile.write(clip, wave, 16_000, subtype="FLOAT")
        rows.append({"id": clip.stem, "audio_path": clip.name, "question_text": QUESTION, "answer": "once"})
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "empty.yaml").write_text("{}\n")
    return load_config(
        [
            str(place / "empty.yaml"), f"run.directory={place / 'run'}", f"model.path={model}",
            f"data.train={place / 'questions.jsonl'}", "data.template=open", f"data.max_seconds={work.seconds}",
            f"rollout.group_size={work.group_size}", f"rollout.max_new_tokens={work.new_tokens}",
            f"optim.prompts_per_step={work.prompts}", f"optim.micro_batch={work.micro_batch}", f"optim.steps={EVER}",
            "optim.lr=0", f"loss.clip_low={CLIP}", f"loss.clip_high={CLIP}", f"loss.beta={BETA}",
            *settings,
        ]
    )  # fmt: skip
