"""The questions that a configuration names, as prompts for training and evaluation, and the rewards."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from hark.data.audio import load_waveform
from hark.data.benchmarks.report import accuracies, answer_shares, row_of
from hark.data.chat import Chat
from hark.data.choices import choice_of
from hark.data.clip import Clip
from hark.data.clips import Finding, Rules, clips_in, usable
from hark.data.difficulty import in_band
from hark.data.errors import DataError
from hark.data.examples import BadExample, Example, is_right, joined, load_questions
from hark.data.loader import BadLog, Loader, evaluation_batches
from hark.data.order import Curriculum, hold_out, order_of
from hark.data.prompts import render, right_answer
from hark.data.rewards.judging import Judge
from hark.grpo.config import Config, ConfigError, Files
from hark.grpo.evaluate import evaluate
from hark.grpo.runtime.collectives import World, exchange_rows
from hark.grpo.shared_data import check_lost
from hark.launch.common.clips import decoded
from hark.models.loading import FAMILIES, load_tokenizer
from hark.models.policy import Policy, Prompt, completion_lengths
from hark.shown import say

# How many times evaluation.batch prompts the sampler gets in one call; as answers end, it starts the next prompts.
ROUNDS = 4
# The questions are read before the policy is built; its class tells what they need.
AnyPolicy: TypeAlias = "Policy | type[Policy]"


class TrainingExamples(NamedTuple):
    """The examples to train on, those to validate on, and the ids of those of data.train whose clips cannot be used."""

    training: list[Example]
    held_out: list[Example]
    left_out: list[str]


def training_examples(
    config: Config, world: World, policy: AnyPolicy, left_out: Collection[str] | None = None
) -> TrainingExamples:
    """The examples of data.train, and those to validate on: data.validation, or held out of data.train.

    left_out: the ids that the run left out when it began; None for a run that begins.
    """
    assert config.data.train is not None  # by `check_training`
    examples, unusable = checked_examples(config, world, policy, weighted(config.data.train)[0], left_out)
    training, held_out = _split_examples(config, world, policy, examples)
    if config.data.band is not None:
        training = in_band(training, config.data.band, config.data.order_by)
    return TrainingExamples(training, held_out, [one.id for one in unusable])


def _split_examples(
    config: Config, world: World, policy: AnyPolicy, examples: list[Example]
) -> tuple[list[Example], list[Example]]:
    """The examples without those held out, and the examples to validate on."""
    if config.data.validation is not None:
        files, weights = weighted(config.data.validation)
        if weights:
            raise ConfigError("data.validation has weights; all of its questions are asked: remove the weights")
        return examples, checked_examples(config, world, policy, files)[0]
    return hold_out(examples, config.data.held_out, config.run.seed) if config.data.held_out else (examples, [])


def weighted(files: Files) -> tuple[list[str], list[float]]:
    """The names of files, and their weights if they have any: `[a.jsonl:0.7, b.jsonl:0.3]`. Raises ConfigError."""
    words = [files] if isinstance(files, str) else files
    found = [None if Path(word).exists() else re.fullmatch(r"(.+):(\d*\.?\d+)", word) for word in words]
    names = [match[1] if match else word for match, word in zip(found, words, strict=True)]
    if not any(found):
        return names, []
    for match, word in zip(found, words, strict=True):
        if match is None or float(match[2]) == 0:
            raise ConfigError(
                f"{word!r} has no weight above 0, and other files have one; expected a weight for each, as in "
                f"{names[words.index(word)]}:0.5, or for none"
            )
    return names, [float(match[2]) for match in found if match]


def check_answers(examples: Sequence[Example], why: str, *, or_target: bool = False) -> None:
    """Raise ConfigError if an example has no answer, nor, with `or_target`, a completion to learn."""
    without = [example for example in examples if not (example.has_answer or or_target and example.target)]
    if without:
        raise ConfigError(
            f"{len(without)} of {len(examples)} questions have no answer, first {without[0].line}, and {why} needs "
            "one; give each an answer, or leave those out"
        )


def check_lengths(config: Config, examples: Sequence[Example]) -> None:
    """Raise ConfigError if rollout.max_new_tokens is too small for a right answer, which could then never be given."""
    too_long = long_answers(config, examples)
    if too_long:
        raise ConfigError(too_long)


def long_answers(config: Config, examples: Sequence[Example]) -> str:
    """A sentence about the right answers that do not fit in rollout.max_new_tokens; "" if all of them fit.

    The model's weights are not needed.
    """
    limit, template = config.rollout.max_new_tokens, config.data.template
    answers = {example: right_answer(example, template) for example in examples if example.has_answer}
    lengths = completion_lengths(load_tokenizer(config.model.path), answers.values())
    long = [example for example, text in answers.items() if lengths[text] > limit]
    if not long:
        return ""
    longest = max(long, key=lambda example: lengths[answers[example]])
    tokens = lengths[answers[longest]]
    return (
        f"{len(long)} of {len(examples)} right answers are longer than rollout.max_new_tokens={limit} and could never "
        f"be given; the longest, {answers[longest]!r} of {longest.line}, has {tokens} tokens with its stop token: set "
        f"rollout.max_new_tokens to {tokens} or more"
    )


def training_loader(config: Config, world: World, policy: Policy, examples: Sequence[Example]) -> Loader:
    """The loader, which prepares the prompts of each step."""
    return Loader(
        examples,
        prepare_of(policy, config.rollout.max_new_tokens),
        seed=config.run.seed,
        prompts_per_step=config.optim.prompts_per_step,
        rank=world.rank,
        world=world.size,
        template=config.data.template,
        shuffle_choices=config.data.shuffle_choices,
        waveform=waveform_of(config, policy),
        skip_bad=config.data.skip_bad,
        workers=config.data.workers,
        weights=weighted(config.data.train or [])[1],
        curriculum=curriculum_of(config),
        silent_share=config.data.silent_share,
        on_bad=bad_log(config).add,
    )


def curriculum_of(config: Config) -> Curriculum:
    """The order in which the examples are drawn. Raises ConfigError for one that cannot be had."""
    data, prompts = config.data, config.optim.steps * config.optim.prompts_per_step
    if data.order == "staged" and weighted(data.train or [])[1]:
        raise ConfigError(
            "data.order=staged divides one set of examples, and data.train has weights; remove the weights, or use "
            "data.order=sorted, which sorts each file of the mixture"
        )
    return Curriculum(data.order, data.order_by, data.stages, prompts)


def check_order(config: Config, examples: Sequence[Example]) -> None:
    """Raise DataError if the examples cannot be put in the order of the configuration."""
    order_of(
        examples,
        seed=config.run.seed,
        weights=weighted(config.data.train or [])[1],
        curriculum=curriculum_of(config),
    )


def validation_figures(config: Config, world: World, policy: Policy, examples: Sequence[Example]) -> dict[str, float]:
    """Greedy accuracy on the examples, over all and by task, and `answer_shares`; empty on all ranks but 0.

    With evaluation.silent also `silent_accuracy`, that without sound.
    """
    rows = validation_rows(config, world, policy, examples)
    silent = validation_rows(config, world, policy, examples, sound=False) if config.evaluation.silent else None
    if rows is None:
        return {}
    control = {"silent_accuracy": accuracies(silent, "task")["accuracy"]} if silent is not None else {}
    return accuracies(rows, "task") | answer_shares(rows) | control | {"questions": len(rows)}


def validation_rows(
    config: Config, world: World, policy: Policy, examples: Sequence[Example], *, sound: bool = True
) -> list[dict] | None:
    """Greedy answers to the first evaluation.limit examples, graded: one row each on rank 0, None on the others.

    sound: whether the clips have their sound, or zeros instead. Those that broke since they were checked are left out;
    of more than data.max_lost allows, all ranks raise UserError.
    """
    load, examples = waveform_of(config, policy), examples[: config.evaluation.limit]
    bad: list[BadExample] = []
    batches = rank_batches(
        config, world, policy, examples, waveform=load if sound else silenced(load), on_bad=bad.append
    )

    def to_row(example: Example, completion: str, stopped: bool, confidence: float) -> dict:
        choice = choice_of(completion, example.choices)
        correct = is_right(example, completion)
        return row_of(example, prediction=completion, correct=correct, stopped=stopped, choice=choice)

    rows = evaluate(policy, batches, to_row, world, **evaluation_settings(config))
    if lost := exchange_rows(bad, world):
        list_bad(config, world, "validation", lost, f"of {len(examples)} questions became bad during the run")
        check_lost(len(lost), len(examples), config.data.max_lost, lost[-1])
    return rows


def rank_batches(
    config: Config,
    world: World,
    policy: Policy,
    examples: Sequence[Example],
    *,
    waveform: Callable[[Clip], np.ndarray],
    on_bad: Callable[[BadExample], None],
) -> Iterator[Sequence[tuple[Example, Prompt]]]:
    """This rank's share of the examples, in batches; on_bad gets each one that cannot be used and is left out."""
    return evaluation_batches(
        examples[world.rank :: world.size],
        prepare_of(policy, config.rollout.max_new_tokens),
        template=config.data.template,
        waveform=waveform,
        batch=ROUNDS * config.evaluation.batch,
        workers=config.data.workers,
        skip_bad=config.data.skip_bad,
        on_bad=on_bad,
    )


def evaluation_settings(config: Config) -> dict[str, Any]:
    """The settings of `evaluate`."""
    rollout = config.rollout
    return dict(max_new_tokens=rollout.max_new_tokens, batch=config.evaluation.batch, graphs=rollout.cuda_graphs)


def checked_examples(
    config: Config,
    world: World,
    policy: AnyPolicy,
    files: Sequence[str],
    left_out: Collection[str] | None = None,
) -> tuple[list[Example], list[BadExample]]:
    """The examples of files whose clips can be used, see `usable`, and the others, listed in the run directory."""
    questions = [read_questions(config, policy, file) for file in files]
    examples = joined([[question for question in part if isinstance(question, Example)] for part in questions])
    bad = [question for part in questions for question in part if isinstance(question, BadExample)]
    examples, unusable = check_clips(config, world, policy, examples, left_out)
    list_bad(config, world, ", ".join(files), bad + unusable, "bad examples skipped")
    return examples, unusable


def checked_questions(
    config: Config, world: World, policy: AnyPolicy
) -> tuple[list[Example | BadExample], list[Example]]:
    """The first evaluation.limit questions of data.test in file order, and those of them that can be asked."""
    assert config.data.test is not None
    questions = read_questions(config, policy, config.data.test, benchmark=True)[: config.evaluation.limit]
    usable, unusable = check_clips(config, world, policy, [q for q in questions if isinstance(q, Example)])
    bad = [question for question in questions if isinstance(question, BadExample)]
    list_bad(config, world, config.data.test, bad + unusable, "questions cannot be asked and count as wrong")
    # No error: a benchmark's figures count every question, and the rules of some accept a part of an answer.
    too_long = long_answers(config, usable)
    if too_long and world.is_main:
        say(f"warning: {too_long}")
    return questions, usable


def read_questions(
    config: Config, policy: AnyPolicy, file: str, *, benchmark: bool = False
) -> list[Example | BadExample]:
    """The questions of a file in its order, and its rows that are skipped by data.skip_bad."""
    questions = load_questions(
        file,
        audio_root=config.data.audio_root,
        columns=config.data.columns,
        require_audio=policy.sample_rate is not None and config.data.require_audio,
        skip_bad=config.data.skip_bad,
        benchmark=benchmark,
        allow_outside=config.data.allow_outside,
    )
    examples = [question for question in questions if isinstance(question, Example)]
    with_clip = next((example for example in examples if example.clips), None)
    if policy.sample_rate is None and with_clip:
        raise ConfigError(
            f"model.path={config.model.path} is a model that takes text only, and {with_clip.line} has a clip; "
            f"set model.path to a model that takes audio (model type {', '.join(sorted(FAMILIES))})"
        )
    for example in [example for example in examples if not example.choices][:1]:
        render(example, config.data.template)  # raises if the template has no prompt for open questions
    return questions


def check_clips(
    config: Config,
    world: World,
    policy: AnyPolicy,
    examples: Sequence[Example],
    left_out: Collection[str] | None = None,
) -> tuple[list[Example], list[BadExample]]:
    """The examples whose clips can be used, and the others, see `usable`; the same on all ranks."""
    found, data = found_in_clips(config, world, policy, examples), config.data
    return usable(examples, found, long_clips=data.long_clips, skip_bad=data.skip_bad, left_out=left_out)


def found_in_clips(config: Config, world: World, policy: AnyPolicy, examples: Sequence[Example]) -> dict[Clip, Finding]:
    """What decoding finds in each clip; each rank decodes its share of those that its user's memory does not know."""
    clips = clips_in(examples)
    if policy.sample_rate is None or not clips:
        return {}
    rules = Rules(policy.sample_rate, config.data.max_seconds, crop=config.data.long_clips == "crop")
    workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    share = "clips checked" if world.size == 1 else f"clips of the share of rank 0 checked ({len(clips)} in all)"
    mine = decoded(clips[world.rank :: world.size], rules, workers=workers, what=share, show=world.is_main)
    return dict(exchange_rows(list(mine.items()), world))


def list_bad(config: Config, world: World, path: str, bad: Sequence[BadExample], what: str) -> None:
    """Add examples to the list of bad ones, on rank 0, and print how many."""
    if world.is_main and bad:
        log = bad_log(config)
        for example in bad:
            log.add(example)
        say(f"{path}: {len(bad)} {what}, listed in {log.path}")


def bad_log(config: Config) -> BadLog:
    """The list of skipped examples."""
    return BadLog(Path(config.run.directory) / "bad.jsonl")


def prepare_of(policy: Policy, longest: int) -> Callable[..., Prompt]:
    """`policy.prepare`, with DataError for a prompt that leaves no positions of the model for `longest` new tokens."""
    positions = policy.positions

    def prepare(chat: Chat, *waveforms: np.ndarray) -> Prompt:
        prompt = policy.prepare(chat, *waveforms)
        if positions is not None and len(prompt.ids) + longest > positions:
            raise DataError(
                f"its prompt has {len(prompt.ids)} tokens and its answer may have {longest} "
                f"(rollout.max_new_tokens), and the model has {positions} positions; shorten the text, the clip or "
                "rollout.max_new_tokens"
            )
        return prompt

    return prepare


def waveform_of(config: Config, policy: Policy) -> Callable[[Clip], np.ndarray]:
    """A function from a clip to its waveform at the policy's sample rate."""
    data, rate = config.data, policy.sample_rate

    def waveform(clip: Clip) -> np.ndarray:
        assert rate is not None  # by `read_questions`
        return load_waveform(clip, sample_rate=rate, max_seconds=data.max_seconds, long_clips=data.long_clips)

    return waveform


def listening(config: Config, policy: Policy) -> Callable[[Example], list[tuple[np.ndarray, int]]]:
    """A function from an example to its clips as waveforms with their sample rate."""
    load, rate = waveform_of(config, policy), policy.sample_rate
    return lambda example: [(load(clip), rate) for clip in example.clips] if rate else []


def silenced(load: Callable[[Clip], np.ndarray]) -> Callable[[Clip], np.ndarray]:
    """A function from a clip to zeros, as many as the waveform has that `load` returns."""
    return lambda clip: np.zeros_like(load(clip))


def rewards_of(config: Config) -> Judge:
    """The rewards of a configuration, as the trainer calls them."""
    reward = config.reward
    return Judge(
        list(reward.weights), config.data.template, options=reward.options, only_if=reward.only_if,
        on_error=reward.on_error, timeout=reward.timeout, workers=reward.workers,
        max_new_tokens=config.rollout.max_new_tokens,
    )  # fmt: skip


def controls_of(config: Config, policy: Policy) -> Callable[[Sequence[Example], int], dict[str, list[Prompt]]]:
    """A function from the examples of a step, and a number, to the prompts of two controls for so many of the first.

    "silent": without sound. "shuffled_audio": with the clips of another example of the step that has as many; absent
    if there is none. A text-only policy has no controls.
    """
    load = waveform_of(config, policy)

    def prompt(example: Example, clips: Sequence[Clip], loudness: float) -> Prompt:
        return policy.prepare(render(example, config.data.template), *(loudness * load(clip) for clip in clips))

    def controls(examples: Sequence[Example], count: int) -> dict[str, list[Prompt]]:
        first = examples[:count]
        if not all(example.clips for example in first):
            return {}
        silent = [prompt(example, example.clips, 0.0) for example in first]
        others = [_other_clips(example, examples) for example in first]
        shuffled = [prompt(example, clips, 1.0) for example, clips in zip(first, others, strict=True) if clips]
        return {"silent": silent} | ({"shuffled_audio": shuffled} if all(others) else {})

    return controls


def _other_clips(example: Example, examples: Sequence[Example]) -> tuple[Clip, ...]:
    """The clips of another example that has as many; none if all have the same or another number."""
    alike = (one.clips for one in examples if len(one.clips) == len(example.clips) and one.clips != example.clips)
    return next(alike, ())
