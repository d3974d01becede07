"""Write one page about runs: curves, recorded steps with their sounds, evaluations, what the configurations differ in.

    hark report RUN [RUN ...] [--out report.html]

The page needs no network and opens from the disk. Beside it is its JSON twin, report.json, which holds the same data
but the sounds. A page has bounds; it says what was left out. docs/report.md describes the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from hark.data.errors import DataError
from hark.launch.common.entry import run
from hark.launch.page.collect import Bounds, Collection, all_parts
from hark.launch.page.document import as_json, document
from hark.shown import say

MIB = 2**20


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    torch.set_num_threads(1)  # a clip is too short for several
    bounds = Bounds(arguments.steps, arguments.groups, arguments.clips, arguments.questions)
    main, parts = all_parts(Collection(arguments.runs, bounds), bounds)
    write(arguments.out, document(main, parts))
    twin = arguments.out.with_suffix(".json")
    write(twin, as_json(twin_of(main, parts)) + "\n")
    for line in main["left_out"]:
        say(f"left out: {line}")
    size = arguments.out.stat().st_size / MIB
    say(f"{arguments.out} ({size:.1f} MiB) opens in a browser; {twin} holds its data")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the run.directory of a training run")
    parser.add_argument("--out", type=page_name, default=Path("report.html"), metavar="FILE.html", help="(%(default)s)")
    add_bounds(parser)
    return parser.parse_args(argv)


def add_bounds(parser: argparse.ArgumentParser) -> None:
    """The options that bound a page."""
    helps = {
        "steps": "recorded steps of each run, evenly spread",
        "groups": "questions of each recorded step",
        "clips": "clips that can be heard",
        "questions": "questions of each evaluation",
    }
    for name, text in helps.items():
        parser.add_argument(f"--{name}", type=count, default=getattr(Bounds, name), help=f"{text} (%(default)s)")


def count(word: str) -> int:
    number = int(word)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{word}: expected 0 or more")
    return number


def page_name(word: str) -> Path:
    if Path(word).suffix != ".html":
        raise argparse.ArgumentTypeError(f"{word}: expected a name that ends in .html; the twin ends in .json")
    return Path(word)


def twin_of(main: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """All data of a page but the sounds and spectrograms."""
    heavy = ("sound", "levels")
    return {"main": main} | {
        name: {key: value for key, value in part.items() if key not in heavy} for name, part in parts.items()
    }


def write(path: Path, text: str) -> None:
    """Write a file; DataError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from error


if __name__ == "__main__":
    run(main)
