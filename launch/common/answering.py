"""Answers the questions of data.test, once unchanged and once for each control, and writes the results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hark.data.benchmarks.answer_files import BENCHMARKS, graded, official_share, write_answers
from hark.data.benchmarks.report import Share, blank_row, figures, row_of, share, table
from hark.data.examples import BadExample, Example
from hark.data.json_files import write_json
from hark.data.order import shuffle_choices
from hark.grpo.config import Config, ConfigError
from hark.grpo.evaluate import evaluate
from hark.grpo.runtime.collectives import World, exchange_rows, joined_world
from hark.launch.common.config_file import load_config
from hark.launch.common.policies import make_policy
from hark.launch.common.questions import bad_log, checked_questions, evaluation_settings, rank_batches, waveform_of
from hark.launch.common.run_directory import changed
from hark.launch.common.training import announce
from hark.models.loading import read_family
from hark.models.policy import Policy

Question = Example | BadExample


def answer_benchmark(argv: list[str], *, silent: bool, audio: bool, choices: bool) -> None:
    """Answer data.test, and again for each control: without sound, with other sound, with choices in another order."""
    config = load_config(argv)
    if config.data.test is None:
        raise ConfigError("data.test is missing; it names the JSONL file of the questions to answer")
    refuse_another(config)
    with joined_world(threads=config.run.threads) as world:
        announce(config, world)
        family = read_family(config.model.path)
        if (silent or audio) and family.sample_rate is None:
            raise ConfigError(f"{config.model.path} takes text only; --silent and --shuffled-audio need sound")
        asked = checked_questions(config, world, family)
        policy = make_policy(config, world, train=False)
        answer_test(config, world, policy, *asked, name=config.model.path, silent=silent, audio=audio, choices=choices)


def refuse_another(config: Config) -> None:
    """Raise ConfigError if run.directory holds the evaluation of another model or of another test."""
    path = Path(config.run.directory) / "evaluation.json"
    if not path.exists():
        return
    before = json.loads(path.read_text())["config"]
    for name, old, new in changed(before, config, (("model", "path"), ("lora", "path"), ("data", "test"))):
        raise ConfigError(f"{path} is the evaluation of {name}={old}, not {new}; choose another run.directory")


def answer_test(
    config: Config,
    world: World,
    policy: Policy,
    questions: Sequence[Question],
    usable: list[Example],
    *,
    name: str,
    silent: bool = False,
    audio: bool = False,
    choices: bool = False,
) -> None:
    """Answer the usable questions of data.test and write the report, which calls the policy `name`."""
    ask = partial(answers, config, world, policy, questions)
    load, log, bad = waveform_of(config, policy), bad_log(config), []

    def leave_out(example: BadExample) -> None:
        log.add(example)
        bad.append(example.id)

    rows = ask(usable, load, on_bad=leave_out)
    # Controls leave out clips that could not be decoded, so that they differ from the main pass in one respect only.
    bad = exchange_rows(bad, world)
    usable = [example for example in usable if example.id not in bad]
    controls: dict[str, list[dict] | None] = {}
    if silent:
        controls["silent"] = ask(usable, lambda example: np.zeros_like(load(example)))
    if audio:
        controls["shuffled_audio"] = ask(with_shuffled_audio(usable, seed=config.run.seed), load)
    if choices:
        reordered = [shuffle_choices(example, seed=config.run.seed, step=0) for example in usable]
        controls["shuffled_choices"] = ask(reordered, load)
    if rows is not None:
        report(config, name, questions, rows, controls)


def answers(
    config: Config,
    world: World,
    policy: Policy,
    questions: Sequence[Question],
    examples: Sequence[Example],
    waveform: Callable[[Example], np.ndarray],
    *,
    on_bad: Callable[[BadExample], None] = lambda bad: None,
) -> list[dict] | None:
    """Answer the examples, whose ids are those of questions: on rank 0 one row per question, in their order.

    A question that is not among the examples, or whose clip cannot be used, has an empty prediction, which is wrong.
    """
    benchmark = BENCHMARKS[config.evaluation.benchmark]
    batches = rank_batches(config, world, policy, examples, waveform=waveform, on_bad=on_bad)

    def to_row(example: Example, completion: str, stopped: bool) -> dict:
        return row_of(example, prediction=completion, correct=graded(example, completion, benchmark), stopped=stopped)

    rows = evaluate(policy, batches, to_row, world, **evaluation_settings(config))
    if rows is None:
        return None
    answered = {row["id"]: row for row in rows}
    # A line that cannot be read (BadExample) may have the id of a question that was answered.
    return [isinstance(q, Example) and answered.get(q.id) or blank_row(q) for q in questions]


def with_shuffled_audio(examples: Sequence[Example], *, seed: int) -> list[Example]:
    """Each example with the clip of another: a permutation of the clips, a function of the seed and the ids.

    No example keeps its clip unless more than half of them share one; then as few as possible keep it.
    """

    def key(example: Example) -> bytes:
        return hashlib.sha256(f"{seed}/audio/{example.id}".encode()).digest()

    clips: dict[Path | None, list[Example]] = {}
    for example in sorted(examples, key=key):
        clips.setdefault(example.audio_path, []).append(example)
    # Examples of one clip are adjacent in `ordered`. Each gets the clip of the example `shift` places later, which is
    # outside of its group, because no group is larger than `shift`.
    ordered = [example for members in clips.values() for example in members]
    shift = max(map(len, clips.values()), default=0)
    paths = {e.id: ordered[(index + shift) % len(ordered)].audio_path for index, e in enumerate(ordered)}
    return [dataclasses.replace(example, audio_path=paths[example.id]) for example in examples]


def report(
    config: Config, model: str, questions: Sequence[Question], rows: list[dict], controls: dict[str, list[dict] | None]
) -> None:
    """Print the table; write all figures, the configuration and the rows, and the benchmark's answer file."""
    directory, name = Path(config.run.directory), config.evaluation.benchmark
    examples = [question for question in questions if isinstance(question, Example)]
    pairs = [(q, row["prediction"]) for q, row in zip(questions, rows, strict=True) if isinstance(q, Example)]
    others: dict[str, Share] = {}
    if name != "strict":
        others = {"official": official_share(pairs, BENCHMARKS[name]), "strict": strict_share(questions, rows)}
    others |= {control: share(again) for control, again in controls.items() if again is not None}
    result = {"benchmark": name} | figures(rows, examples, others)
    write_json(directory / "evaluation.json", result | {"config": dataclasses.asdict(config), "rows": rows})
    path = write_answers(directory / "answers", pairs, BENCHMARKS[name])
    print(f"{model} on {len(rows)} questions of {config.data.test}, by the rule of {name}:")
    unknown, blank = (sum(row[key] is None for row in rows) for key in ("correct", "stopped"))
    if blank:
        print(f"{blank} could not be asked; their predictions are empty and count as wrong")
    if unknown < len(rows):
        print(table(rows, examples, others))
    if unknown:
        print(
            f"{unknown} of {len(rows)} questions have no known answer and are not graded; they are in the answer file"
        )
    print(f"answers in {path}, all figures in {directory / 'evaluation.json'}", flush=True)


def strict_share(questions: Sequence[Question], rows: Sequence[dict]) -> Share:
    """The share of right answers by the rule of the accuracy reward."""
    right = [
        graded(question, row["prediction"], BENCHMARKS["strict"]) if isinstance(question, Example) else row["correct"]
        for question, row in zip(questions, rows, strict=True)
    ]
    return share([{"correct": correct} for correct in right])
