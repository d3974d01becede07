"""Measure how often a model answers each training question right, and keep right answers to learn from.

    python launch/pass_rate.py CONFIG [section.key=value ...] --out FILE [--samples G] [--keep FILE [--most N]]
    python launch/pass_rate.py RUN [section.key=value ...] --out FILE ...
    torchrun --nproc-per-node GPUS launch/pass_rate.py ...

Draws G answers to each question of data.train with the settings of rollout, and writes the questions to FILE, in a form
that data.train reads, with their pass_rate. CONFIG names the model as model.path; RUN is the run.directory of a
training run, whose trained model answers.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hark.data.described import row_in
from hark.data.examples import Example
from hark.grpo.config import Config, ConfigError
from hark.grpo.runtime.collectives import World, exchange_rows, joined_world
from hark.grpo.runtime.interrupt import interruptible
from hark.grpo.runtime.lock import locked_file
from hark.launch.common import row_file
from hark.launch.common.answering import subject_of
from hark.launch.common.entry import run
from hark.launch.common.graded_samples import Drawn, answers, graded_by, kept, measured
from hark.launch.common.progress import counted
from hark.launch.common.questions import check_answers, check_lengths, checked_examples, weighted
from hark.launch.common.trained import Subject
from hark.launch.common.training import announce
from hark.models.loading import read_family
from hark.shown import say, say_text

BAND = (0.375, 0.75)  # 3 to 6 of 8 right, which data.band usually keeps
WIDTH = 40  # characters of the longest bar


def main(argv: list[str]) -> None:
    options = parse(argv)
    subject = subject_of(options.words, step=options.step, best=options.best)
    if options.samples is not None:
        rollout = dataclasses.replace(subject.config.rollout, group_size=options.samples)
        subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, rollout=rollout))
    measure(subject, options)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description=__doc__,
        epilog="""What is written is not lost if the command is interrupted: the same command goes on. The rows are the
same on every number of processes.""",
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="RUN | CONFIG [section.key=value ...]")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the run's model after step N; the last if left out")
    which.add_argument("--best", action="store_true", help="the run's model with the best validation accuracy")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines, with the questions and their pass rates")
    add("--samples", type=int, metavar="G", help="answers per question; rollout.group_size if left out")
    add("--reward", default="accuracy", metavar="NAME", help="what says that an answer is right: 0.5 or more")
    add("--keep", type=Path, metavar="FILE", help="JSON lines, with right answers as targets for `hark sft`")
    add("--most", type=int, default=4, metavar="N", help="most answers to keep of a question, all different; 4")
    options = parser.parse_intermixed_args(argv)
    for name in ("samples", "most"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.keep and options.keep.absolute() == options.out.absolute():
        parser.error("--keep and --out name the same file")
    return options


def measure(subject: Subject, options: argparse.Namespace) -> None:
    """Measure the pass rates of all questions of data.train that are not measured yet, and print the figures."""
    files = subject.config.data.train
    if files is None:
        raise ConfigError("data.train is missing; it names the questions to answer: data.train=FILE")
    with joined_world(threads=subject.config.run.threads) as world, ExitStack() as stack:
        for path in filter(None, (options.out, options.keep)):
            stack.enter_context(locked_file(path, world))
        subject = subject.intact(world)
        config = graded_by(subject.config, options.reward)
        announce(config, world)
        family = read_family(config.model.path, config.model.policy)
        examples = checked_examples(config, world, family, weighted(files)[0])[0]
        check(config, examples, options.reward)
        done = begun(subject, options, world)
        left = [example for example in examples if example.id not in done]
        if left:
            policy, by_id = subject.load(world), {example.id: example for example in left}
            found = answers(config, world, policy, left, options.reward)
            with interruptible(lambda: f"interrupted; the same command goes on from {options.out}"):
                for drawn in counted(found, len(left), "questions answered", show=world.is_main, size=len):
                    if world.is_main:
                        write(config, options, by_id, drawn)
        if world.is_main:
            rates = [row["pass_rate"] for row in rows_of(subject, options)]
            say_text(report(rates, config))
            say(f"written to {options.out}" + (f" and {options.keep}" if options.keep else ""))


def check(config: Config, examples: Sequence[Example], reward: str) -> None:
    """Refuse questions that cannot be graded, or cannot be written as JSON lines."""
    if reward == "accuracy":
        check_answers(examples, "a pass rate")
        check_lengths(config, examples)
    for example in examples:
        if any(not isinstance(clip.source, Path) for clip in example.clips):
            raise ConfigError(
                f"{example.line}: its clip is in a table; a pass rate is written to JSON lines, which "
                "name files; write the clips to files first"
            )


def begun(subject: Subject, options: argparse.Namespace, world: World) -> set[str]:
    """The ids that are measured already; the same on all ranks."""
    done: list[str] = []
    if world.is_main:
        if options.keep and options.keep.exists() and not options.out.exists():
            raise ConfigError(f"{options.keep} is there already, and {options.out} is not; choose another file to keep")
        done = [row["id"] for row in rows_of(subject, options)]
        if options.keep:
            row_file.drop(options.keep, key="answer_to", known=set(done))
    return set(exchange_rows(done, world))


def rows_of(subject: Subject, options: argparse.Namespace) -> list[dict]:
    """The rows that are measured already."""
    return row_file.begin(options.out, settings_of(subject, options), is_measured)


def is_measured(row: dict[str, Any]) -> bool:
    """Whether a row has an id and a pass rate."""
    rate = row.get("pass_rate")
    if not isinstance(rate, (int, float)) or isinstance(rate, bool):
        return False
    return isinstance(row.get("id"), str) and 0 <= rate <= 1


def settings_of(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """What must not differ between the parts of one file."""
    config = subject.config
    data, rollout = config.data, config.rollout
    return {
        "model": subject.name,
        "lora.path": config.lora.path,
        "run.seed": config.run.seed,
        "data.train": data.train,
        "data.template": data.template,
        "data.shuffle_choices": data.shuffle_choices,
        "rollout.max_new_tokens": rollout.max_new_tokens,
        "rollout.temperature": rollout.temperature,
        "--samples": rollout.group_size,
        "--reward": options.reward,
        "--keep": str(options.keep or ""),
        "--most": options.most,
    }


def write(config: Config, options: argparse.Namespace, examples: dict[str, Example], drawn: Sequence[Drawn]) -> None:
    """Append the rows of questions to the files.

    The answers to keep are written before the pass rates. If the run ends between the two, `begun` drops the answers to
    questions that have no pass rate yet.
    """

    def row(one: Drawn, file: Path) -> dict[str, Any]:
        return row_in(examples[one.id], Path(config.data.audio_root or file.parent))

    if options.keep:
        keep = [rows for one in drawn for rows in kept(row(one, options.keep), one, options.most)]
        row_file.append(options.keep, keep)
    row_file.append(options.out, [measured(row(one, options.out), one) for one in drawn])


def report(rates: Sequence[float], config: Config) -> str:
    """A histogram of how many of G answers are right, and what a band keeps."""
    size, data = config.rollout.group_size, config.data
    counts = Counter(round(rate * size) for rate in rates)
    most = max(counts.values(), default=1)
    lines = [f"right of {size}  questions"]
    lines += [
        f"{n:{len(lines[0]) - 11}}  {counts[n]:9}  {'#' * round(WIDTH * counts[n] / most)}" for n in range(size + 1)
    ]
    low, high = data.band if data.band and data.order_by == "pass_rate" else BAND
    mixed, inside = (sum(test(rate) for rate in rates) for test in (lambda r: 0 < r < 1, lambda r: low <= r <= high))
    return "\n".join(
        [
            *lines,
            f"mean pass rate {sum(rates) / max(len(rates), 1):.3f}; {mixed} of {len(rates)} questions have right and "
            "wrong answers, the others teach nothing",
            f"data.order_by=pass_rate data.band=[{low:g}, {high:g}] keeps {inside} of {len(rates)}",
        ]
    )


if __name__ == "__main__":
    run(main)
