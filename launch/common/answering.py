"""Answers the questions of data.test, once unchanged and once for each control, and writes the results."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hark.data.benchmarks.answer_files import BENCHMARKS, graded, official_share, write_answers
from hark.data.benchmarks.report import NAMES, Share, answer_shares, blank_row, figures, row_of, share, table
from hark.data.choices import choice_of
from hark.data.clip import Clip
from hark.data.examples import BadExample, Example
from hark.data.json_files import write_json
from hark.data.order import shuffle_choices
from hark.grpo.config import Config, ConfigError
from hark.grpo.evaluate import evaluate
from hark.grpo.runtime.collectives import World, exchange_rows, joined_world
from hark.launch.common.config_file import load_config
from hark.launch.common.evaluation_file import NAME, read_evaluation
from hark.launch.common.progress import counted
from hark.launch.common.questions import (
    bad_log,
    checked_questions,
    evaluation_settings,
    rank_batches,
    silenced,
    waveform_of,
)
from hark.launch.common.run_directory import changed
from hark.launch.common.trained import Subject, find_trained, is_run
from hark.launch.common.training import announce
from hark.models.loading import read_family
from hark.models.policy import Policy
from hark.shown import say, say_text

Question = Example | BadExample


def subject_of(words: list[str], *, step: int | None, best: bool) -> Subject:
    """The model that `RUN [section.key=value ...]` or `CONFIG [section.key=value ...]` names."""
    if not words or not is_run(words[0]):
        if step is not None or best:
            raise ConfigError("--step and --best need the run.directory of a training run as the first argument")
        config = load_config(words)
        return Subject(config, config.model.path)
    return find_trained(Path(words[0]), words[1:], step=step, best=best)


def answer_benchmark(subject: Subject, *, silent: bool, audio: bool, choices: bool) -> None:
    """Answer data.test, and again for each control: without sound, with other sound, with choices in another order."""
    if subject.config.data.test is None:
        raise ConfigError("data.test is missing; it names the file of the questions to answer: data.test=FILE")
    refuse_another(subject)
    with joined_world(threads=subject.config.run.threads) as world:
        subject = subject.intact(world)
        config = subject.config
        announce(config, world)
        family = read_family(config.model.path, config.model.policy)
        if (silent or audio) and family.sample_rate is None:
            raise ConfigError(f"{config.model.path} takes text only; --silent and --shuffled-audio need sound")
        asked = checked_questions(config, world, family)
        policy = subject.load(world)
        answer_test(subject, world, policy, *asked, silent=silent, audio=audio, choices=choices)


def refuse_another(subject: Subject) -> None:
    """Raise ConfigError if run.directory holds a run of another model, or an evaluation of another model or test."""
    config = subject.config
    directory = Path(config.run.directory)
    if (directory / "metrics.jsonl").exists() and not (subject.run and directory.samefile(subject.run)):
        raise ConfigError(
            f"{directory} holds a training run, and {subject.name} is not its trained model; `hark evaluate "
            f"{directory}` evaluates that; for {subject.name} choose another run.directory"
        )
    path = directory / NAME
    if not path.exists():
        return
    before = read_evaluation(path).get("config") or {}
    keys = [("data", "test")] if subject.run else [("model", "path"), ("lora", "path"), ("data", "test")]
    for name, old, new in changed(before, config, keys):
        raise ConfigError(f"{path} is the evaluation of {name}={old}, not {new}; choose another run.directory")


def answer_test(
    subject: Subject,
    world: World,
    policy: Policy,
    questions: Sequence[Question],
    usable: list[Example],
    *,
    silent: bool = False,
    audio: bool = False,
    choices: bool = False,
) -> None:
    """Answer the usable questions of data.test with a loaded policy and write the report."""
    config = subject.config
    ask = partial(answers, config, world, policy, questions)
    load, log, bad = waveform_of(config, policy), bad_log(config), []

    def leave_out(example: BadExample) -> None:
        log.add(example)
        bad.append(example.id)

    rows = ask(usable, load, "questions", on_bad=leave_out)
    # Controls leave out clips that could not be decoded, so that they differ from the main pass in one respect only.
    bad = exchange_rows(bad, world)
    usable = [example for example in usable if example.id not in bad]
    controls: dict[str, list[dict] | None] = {}
    if silent:
        controls["silent"] = ask(usable, silenced(load), "questions without sound")
    if audio:
        controls["shuffled_audio"] = ask(
            with_shuffled_audio(usable, seed=config.run.seed), load, "questions with other sound"
        )
    if choices:
        reordered = [shuffle_choices(example, seed=config.run.seed, step=0) for example in usable]
        controls["shuffled_choices"] = ask(reordered, load, "questions with other order")
    if rows is not None:
        report(subject, questions, rows, controls)


def answers(
    config: Config,
    world: World,
    policy: Policy,
    questions: Sequence[Question],
    examples: Sequence[Example],
    waveform: Callable[[Clip], np.ndarray],
    what: str,
    *,
    on_bad: Callable[[BadExample], None] = lambda bad: None,
) -> list[dict] | None:
    """Answer the examples, whose ids are those of questions: on rank 0 one row per question, in their order.

    what: the name of the examples for the lines that say how many are answered.

    A question that is not among the examples, or whose clip cannot be used, has an empty prediction, which is wrong.
    """
    benchmark = BENCHMARKS[config.evaluation.benchmark]
    batches = rank_batches(config, world, policy, examples, waveform=waveform, on_bad=on_bad)
    count = len(examples[world.rank :: world.size])
    answered_on = "answered" if world.size == 1 else "answered on rank 0"
    shown = counted(batches, count, f"{what} {answered_on}", show=world.is_main, size=len)

    def to_row(example: Example, completion: str, stopped: bool, confidence: float) -> dict:
        correct = graded(example, completion, benchmark)
        choice = choice_of(completion, example.choices)
        row = row_of(example, prediction=completion, correct=correct, stopped=stopped, choice=choice)
        return row | {"confidence": confidence}

    rows = evaluate(policy, shown, to_row, world, **evaluation_settings(config))
    if rows is None:
        return None
    answered = {row["id"]: row for row in rows}
    # A line that cannot be read (BadExample) may have the id of a question that was answered.
    return [isinstance(q, Example) and answered.get(q.id) or blank_row(q) for q in questions]


def with_shuffled_audio(examples: Sequence[Example], *, seed: int) -> list[Example]:
    """Each example with the clips of another: a permutation of the clips, a function of the seed and the ids.

    Clips go to examples that have as many. No example keeps its clips unless more than half of these share them; then
    as few as possible keep them.
    """
    numbers = {len(example.clips) for example in examples}
    alike = [[example for example in examples if len(example.clips) == number] for number in numbers]
    clips = {example.id: clips for part in alike for example, clips in _exchanged(part, seed)}
    # A clip that was checked takes its digest along.
    digest = {clip: one for example in examples for clip, one in zip(example.clips, example.digests, strict=False)}
    return [
        dataclasses.replace(example, clips=given, digests=tuple(digest.get(clip, "") for clip in given))
        for example in examples
        for given in [clips[example.id]]
    ]


def _exchanged(examples: Sequence[Example], seed: int) -> Iterator[tuple[Example, tuple[Clip, ...]]]:
    """Each example, all of which have equally many clips, and the clips of another."""

    def key(example: Example) -> bytes:
        return hashlib.sha256(f"{seed}/audio/{example.id}".encode()).digest()

    clips: dict[tuple[Clip, ...], list[Example]] = {}
    for example in sorted(examples, key=key):
        clips.setdefault(example.clips, []).append(example)
    # Examples of one clip are adjacent in `ordered`. Each gets the clip of the example `shift` places later, which is
    # outside of its group, because no group is larger than `shift`.
    ordered = [example for members in clips.values() for example in members]
    shift = max(map(len, clips.values()), default=0)
    for index, example in enumerate(ordered):
        yield example, ordered[(index + shift) % len(ordered)].clips


def report(
    subject: Subject, questions: Sequence[Question], rows: list[dict], controls: dict[str, list[dict] | None]
) -> None:
    """Print the table; write all figures, the configuration and the rows, and the benchmark's answer file."""
    config = subject.config
    directory, name = Path(config.run.directory), config.evaluation.benchmark
    examples = [question for question in questions if isinstance(question, Example)]
    pairs = [(q, row["prediction"]) for q, row in zip(questions, rows, strict=True) if isinstance(q, Example)]
    again = {control: answered for control, answered in controls.items() if answered is not None}
    others: dict[str, Share] = {}
    if name != "strict":
        others = {"official": official_share(pairs, BENCHMARKS[name]), "strict": strict_share(questions, rows)}
    others |= {control: share(answered) for control, answered in again.items()}
    result: dict[str, Any] = {
        "model": subject.name,
        "step": subject.step,
        "benchmark": name,
    }
    result |= figures(rows, examples, others)
    result |= {f"{control}_{key}": value for control, r in again.items() for key, value in answer_shares(r).items()}
    record = result | {"config": dataclasses.asdict(config), "rows": with_controls(rows, again)}
    write_json(directory / "evaluation.json", record)
    path = write_answers(directory / "answers", pairs, BENCHMARKS[name])
    say(f"{subject.name} on {len(rows)} questions of {config.data.test}, by the rule of {name}:")
    unknown, blank = (sum(row[key] is None for row in rows) for key in ("correct", "stopped"))
    if blank:
        say(f"{blank} could not be asked; their predictions are empty and count as wrong")
    if unknown < len(rows):
        say_text(table(rows, examples, others))
        for line in below_chance(result, again):
            say(line)
    if unknown:
        say(f"{unknown} of {len(rows)} questions have no known answer and are not graded; they are in the answer file")
    say(f"answers in {path}, all figures in {directory / 'evaluation.json'}")


def with_controls(rows: Sequence[dict], controls: dict[str, list[dict]]) -> list[dict]:
    """The rows, each with its answers under the controls: {"silent": {"prediction": ..., "correct": ...}, ...}."""
    keys = ("prediction", "correct", "stopped", "choice")
    return [
        row | {control: {key: answered[n][key] for key in keys} for control, answered in controls.items()}
        for n, row in enumerate(rows)
    ]


def below_chance(result: dict, controls: dict[str, list[dict]]) -> Iterator[str]:
    """Explains each control whose accuracy is below chance: some of its answers are none of the choices."""
    for control in controls:
        accuracy, share = result[f"{control}_accuracy"], result.get(f"{control}_no_choice_share")
        if accuracy is not None and share and accuracy < result.get("chance", 0):
            yield (
                f"{NAMES[control]}: {100 * share:.1f} % of these answers are none of the choices and cannot be right, "
                "so this control can lie below chance"
            )


def strict_share(questions: Sequence[Question], rows: Sequence[dict]) -> Share:
    """The share of right answers by the rule of the accuracy reward."""
    right = [
        graded(question, row["prediction"], BENCHMARKS["strict"]) if isinstance(question, Example) else row["correct"]
        for question, row in zip(questions, rows, strict=True)
    ]
    return share([{"correct": correct} for correct in right])
