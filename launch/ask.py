"""Ask a model about a clip: its answer, the probability of each choice, and sampled answers.

    python launch/ask.py MODEL_OR_RUN CLIP "Which sound is this?" [--choices rain bell dog] [--samples 8] [--silent]

MODEL_OR_RUN is the run.directory of a training run, whose trained model is asked with the run's own settings, or a
Hugging Face directory, or a hub name. For a model that takes text only, CLIP is "-".
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hark.data.audio import load_waveform
from hark.data.clip import Clip
from hark.data.examples import Example
from hark.data.prompts import render, target
from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import joined_world
from hark.grpo.runtime.sharding import gathered
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.launch.common.config_file import config_of
from hark.launch.common.entry import run
from hark.launch.common.questions import prepare_of
from hark.launch.common.trained import Subject, find_trained, is_run
from hark.models.loading import read_family
from hark.models.policy import Policy, Prompt
from hark.shown import say, say_text

NO_CLIP = "-"
WIDTH, COLUMN = 32, 16  # characters of a name, and of a column of figures


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    subject = subject_of(arguments)
    template = arguments.template or subject.config.data.template
    example = Example(
        id="question",
        clips=() if arguments.clip == NO_CLIP else (Clip(Path(arguments.clip)),),
        question=arguments.question,
        choices=tuple(arguments.choices),
    )
    with joined_world(threads=subject.config.run.threads) as world:
        subject = subject.intact(world)
        config, waveform = subject.config, waveform_of(example, subject)
        policy = subject.load(world)
        # A model that was not trained here may know no template: a question without choices is asked as it stands.
        in_template = example.choices or subject.run or arguments.template
        text = render(example, template) if in_template else example.question
        waveforms = [] if waveform is None else [waveform]
        sounds = {"with sound" if arguments.silent else "": waveforms}
        if arguments.silent:
            if not waveforms:
                raise ConfigError("--silent needs a clip")
            sounds["without sound"] = [np.zeros_like(waveform) for waveform in waveforms]
        limit = arguments.max_new_tokens or config.rollout.max_new_tokens
        prepare = prepare_of(policy, limit)
        prompts = {name: prepare(text, *sound) for name, sound in sounds.items()}
        temperature = arguments.temperature or config.rollout.temperature
        for name, prompt in prompts.items():
            first, *rest = drawn(policy, prompt, limit=limit)[0].split("\n")
            say(f"{'answer ' + name:{WIDTH}}{first}", *(f"{'':{WIDTH}}{line}" for line in rest))
        if example.choices:
            columns = {name: probabilities(policy, p, example, template) for name, p in prompts.items()}
            say_text(choice_table(example.choices, columns))
        for name, prompt in prompts.items():
            if arguments.samples:
                texts = drawn(policy, prompt, limit=limit, count=arguments.samples, temperature=temperature)
                say(*sample_lines(texts, f"{len(texts)} samples {name}".rstrip()))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL_OR_RUN")
    add("clip", metavar="CLIP", help="a wav, flac, ogg or mp3 file")
    add("question", metavar="QUESTION")
    add("--choices", nargs="+", default=[], metavar="CHOICE", help="the answers to choose from")
    add("--samples", type=int, default=0, metavar="N", help="also draw N answers")
    add("--silent", action="store_true", help="ask again with silence instead of the clip")
    add("--step", type=int, metavar="N", help="the run's model after step N; the last if left out")
    add("--template", metavar="NAME", help="the prompt template; that of the run, or answer, if left out")
    add("--temperature", type=float, metavar="T", help="of the samples; that of the run, or 1, if left out")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer; that of the run, or 256, if left out")
    add("--set", nargs="+", default=[], metavar="section.key=value", help="other options, such as model.dtype=bfloat16")
    arguments = parser.parse_args(argv)
    if arguments.samples < 0 or arguments.temperature is not None and arguments.temperature <= 0:
        parser.error("--samples must be at least 0, and --temperature positive")
    if len(arguments.choices) == 1 or len(set(arguments.choices)) < len(arguments.choices):
        parser.error("--choices needs at least two, all of them different")
    return arguments


def subject_of(arguments: argparse.Namespace) -> Subject:
    """The model to ask, with the settings of its run or with the defaults."""
    if is_run(arguments.model):
        return find_trained(Path(arguments.model), arguments.set, step=arguments.step)
    if arguments.step is not None:
        raise ConfigError(f"--step needs the run.directory of a run, and {arguments.model} is none")
    config = config_of([f"model.path={arguments.model}", "run.directory=.", *arguments.set])
    return Subject(config, arguments.model)


def waveform_of(example: Example, subject: Subject) -> np.ndarray | None:
    """The clip at the model's sample rate; None for a model that takes text only. The weights are not read for it."""
    data, rate = subject.config.data, read_family(subject.config.model.path, subject.config.model.policy).sample_rate
    if bool(example.clips) != (rate is not None):
        expected = "text only, so CLIP must be -" if rate is None else "audio, so CLIP must be a file"
        raise ConfigError(f"{subject.name} takes {expected}")
    if rate is None:
        return None
    return load_waveform(example.clips[0], sample_rate=rate, max_seconds=data.max_seconds, long_clips=data.long_clips)


def drawn(policy: Policy, prompt: Prompt, *, limit: int, count: int = 1, temperature: float = 0.0) -> list[str]:
    """Completions of a prompt, the most likely tokens at temperature 0."""
    with gathered(policy):
        rollout = sample(
            policy, [prompt], group_size=count, max_new_tokens=limit, temperature=temperature, keys=[(0, 0)]
        )
    return policy.completion_texts(rollout.tokens, rollout.mask)


@torch.no_grad()
def probabilities(policy: Policy, prompt: Prompt, example: Example, template: str) -> torch.Tensor:
    """The probability (C,) of each choice, written as the template's target with its stop token.

    The choices are the branches of one group, so the prompt is computed once.
    """
    targets = [target(replace(example, answer=choice), template) for choice in range(len(example.choices))]
    tokens, mask = policy.completions(targets)  # (C, T)
    logprobs, _ = score(policy, [prompt], tokens, mask, group_size=len(targets))
    return logprobs.double().sum(dim=1).exp()


def choice_table(choices: tuple[str, ...], columns: dict[str, torch.Tensor]) -> str:
    """The probability of each choice among the choices, and of all of them among all texts, in percent."""
    cells = [[f"{100 * value:.1f}" for value in (*column / column.sum(), column.sum())] for column in columns.values()]
    lines = [f"{'probability of a choice, %':{WIDTH}}" + "".join(f"{name:>{COLUMN}}" for name in columns)]
    for name, values in zip((*choices, "(all of them, of all texts)"), zip(*cells, strict=True), strict=True):
        lines.append(f"  {name:{WIDTH - 2}}" + "".join(f"{value:>{COLUMN}}" for value in values))
    return "\n".join(["", *lines])


def sample_lines(texts: list[str], title: str) -> list[str]:
    """How often each text occurs, the most frequent first, under a title."""
    return ["", title, *(f"  {count:4} x {text}" for text, count in Counter(texts).most_common())]


if __name__ == "__main__":
    run(main)
