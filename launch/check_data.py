"""Decode every clip of a file of questions and report its figures; fails if any question cannot be used.

What was found in a clip is remembered: until its file changes, neither this program nor training decodes it again to
check it.

    python launch/check_data.py FILE [--audio-root DIRECTORY] [--max-seconds 30] [--benchmark] [--json OUT]
                                [--columns question_text=question ...] [--allow-outside]

FILE has JSON lines, JSON or parquet, or is a directory of parquet files, or a data set hf:OWNER/NAME:SPLIT.
--benchmark accepts what is an error in training data: choices that are equal when normalised, and unknown answers.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from hark.data.benchmarks.baselines import BASELINES
from hark.data.benchmarks.report import NAMES
from hark.data.clips import Rules, clips_in
from hark.data.errors import DataError
from hark.data.examples import load_examples
from hark.data.sources.survey import survey
from hark.launch.common.clips import decoded
from hark.launch.common.entry import run
from hark.shown import LONGEST_NAME, say, shown

SAMPLE_RATE = 16_000  # Hz, of all supported models
SHOWN = 5  # questions that the console names for each fault; the JSON file has all
LONGEST_REASON = 600  # characters of what is wrong with one of them
WIDTH = 27  # characters of a figure's name


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    torch.set_num_threads(1)  # the clips are already decoded in parallel
    examples, bad = load_examples(
        arguments.file,
        audio_root=arguments.audio_root,
        columns=columns_of(arguments.columns),
        skip_bad=True,
        benchmark=arguments.benchmark,
        allow_outside=arguments.allow_outside,
    )
    found = decoded(clips_in(examples), Rules(SAMPLE_RATE, arguments.max_seconds), workers=arguments.workers)
    figures = survey(examples, bad, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(figures, arguments.file)
    unusable = sum(map(len, figures["faults"].values()))
    if unusable:
        count = len(examples) + len(bad)
        raise DataError(
            f"{arguments.file}: {unusable} of {count} questions cannot be used; data.skip_bad=true leaves them out"
        )
    say("all questions can be used")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--audio-root", type=Path, metavar="DIRECTORY", help="directory of relative audio paths (FILE's directory)"
    )
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="KEY=NAME", help="keys that have another name in FILE"
    )
    parser.add_argument("--max-seconds", type=float, default=30.0, help="longest clip that can be used (30)")
    parser.add_argument("--benchmark", action="store_true", help="accept equal choices and unknown answers")
    parser.add_argument("--allow-outside", action="store_true", help="accept clips outside of that directory")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures and all faults to this file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that decode (all cores)")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1 or arguments.max_seconds <= 0:
        parser.error("--workers must be at least 1, and --max-seconds positive")
    return arguments


def columns_of(words: list[str]) -> dict[str, str]:
    """The words of --columns, as data.columns."""
    pairs = [word.partition("=")[::2] for word in words]
    for key, name in pairs:
        if not key or not name:
            raise DataError(f"--columns has {key or name!r}; expected KEY=NAME, such as question_text=question")
    return dict(pairs)


def show(figures: dict, file: str) -> None:
    """Print the figures, one aligned line each."""
    line("questions", f"{figures['questions']} about {figures['clips']} clips, in {file}")
    line("datasets", listed(figures["datasets"]))
    line("tasks", listed(figures["tasks"]))
    if figures["seconds"]:
        length = figures["seconds"]
        spread = (
            f"{length['min']:.2f} to {length['max']:.2f} s, median {length['median']:.2f}, mean {length['mean']:.2f}"
        )
        line("lengths", f"{spread}; {length['total'] / 3600:.2f} h in all")
        for name, count in figures["lengths"].items():
            line("", f"{count:8} {name}")
    line("sample rates", listed(figures["sample_rates"], " Hz"))
    line("channels", listed(figures["channels"]))
    if figures["choices"]:
        line("choices", listed(figures["choices"]))
        line("position of the answer", listed(figures["answers"]))
    if figures["open"]:
        line("open questions", str(figures["open"]))
    if figures["unanswered"]:
        line("no answer", str(figures["unanswered"]))
    if figures["extra"]:
        line("other keys, for rewards", listed(figures["extra"]))
    for name in BASELINES:
        if name in figures:
            line(NAMES[name], f"{100 * figures[name]:.1f} %")
    for name, faults in figures["faults"].items():
        line(name, str(len(faults)))
        for fault in faults[:SHOWN]:
            say(f"  {shown(fault['file'], LONGEST_NAME)}: {shown(fault['reason'], LONGEST_REASON)}")
        if len(faults) > SHOWN:
            say(f"  and {len(faults) - SHOWN} more")


def line(name: str, text: str) -> None:
    say(f"{name:{WIDTH}}{text}")


def listed(counts: dict[str, int], unit: str = "") -> str:
    """The counts on one line: "16000 Hz: 12, 44100 Hz: 3"."""
    return ", ".join(
        f"{shown(name or 'none', LONGEST_NAME)}{unit if name else ''}: {count}" for name, count in counts.items()
    )


if __name__ == "__main__":
    run(main)
