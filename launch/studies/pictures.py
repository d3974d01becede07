"""Draw the pictures of the documentation, each from what a program computed or wrote.

    python launch/studies/pictures.py tree OUT.svg             the row of a group and its mask
    python launch/studies/pictures.py curves RUNS OUT.svg      the learning curves of the demo, from RUNS (runs/mini)
    python launch/studies/pictures.py speed PAGE OUT.svg       the benchmark's table in PAGE (docs/benchmark.md)

Needs matplotlib: pip install -e ".[plot]"
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from hark.data.errors import DataError
from hark.grpo.instruments.metrics import read_metrics
from hark.grpo.tree import PROMPT, branches_layout, prompt_layout, tree_mask
from hark.launch.common.entry import run

BLUE, ORANGE, GREEN, GREY = "#2166ac", "#d95f02", "#1b7837", "#777777"
SHADES = ("#d9e4f2", "#7fb3d5", "#f3b37a", "#8cc79a")  # of the prompt and of each completion
PROMPT_TOKENS, STEPS, GROUP = 10, 4, 3  # of the row that is drawn
MEAN_OF = 20  # steps; a step has few prompts, so its accuracy varies


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    arguments.draw(arguments)
    print(arguments.out)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pictures = parser.add_subparsers(required=True, metavar="PICTURE")
    for name, draw, source in (
        ("tree", draw_tree, None),
        ("curves", draw_curves, "RUNS"),
        ("speed", draw_speed, "PAGE"),
    ):
        picture = pictures.add_parser(name)
        if source:
            picture.add_argument("source", type=Path, metavar=source)
        picture.add_argument("out", type=Path, metavar="OUT.svg")
        picture.set_defaults(draw=draw)
    if find_spec("matplotlib") is None:
        parser.error("matplotlib is not installed: pip install -e '.[plot]'")
    return parser.parse_args(argv)


@contextmanager
def figure(out: Path, *, width: float, height: float) -> Iterator[Any]:
    """A figure of this size in inches, saved at the end of the block; equal figures give equal files."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "hark", "font.size": 10, "font.family": "sans-serif"}
    with rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        drawn.savefig(out, format=out.suffix[1:], metadata={"Date": None} if out.suffix == ".svg" else None)


# A group is one row ---------------------------------------------------------------------------------------------------


def draw_tree(arguments: argparse.Namespace) -> None:
    """The row of a prompt with three completions, and which token may attend to which."""
    length = torch.tensor([PROMPT_TOKENS])
    row = prompt_layout(length, PROMPT_TOKENS) + branches_layout(length, GROUP, STEPS)
    mask = tree_mask(row, row)[0, 0]  # (L, L)
    branches = (row.branch[0] - PROMPT).tolist()  # 0 for the prompt, then 1 to G
    with figure(arguments.out, width=7.2, height=3.7) as drawn:
        strip, square = drawn.subplots(1, 2, width_ratios=(1.15, 1))
        separate_rows(strip, branches)
        for query, key in mask.nonzero().tolist():
            # The colour of the token that is attended to.
            tile(square, key, query, SHADES[branches[key]])
        square.set(xlim=(0, len(mask)), ylim=(len(mask), 0), aspect="equal", xticks=[], yticks=[])
        square.set(xlabel="key", ylabel="query", title="which token may attend to which")


def separate_rows(axes: Any, branches: list[int]) -> None:
    """Above, the G rows of the usual layout; below, the one row that has the same tokens without repetition."""
    for completion in range(1, GROUP + 1):
        tokens = [0] * PROMPT_TOKENS + [completion] * STEPS
        for place, branch in enumerate(tokens):
            tile(axes, place, 1.6 * completion, SHADES[branch])
    top = 1.6 * GROUP + 4.4
    for place, branch in enumerate(branches):
        tile(axes, place, top, SHADES[branch])
    style: dict[str, Any] = dict(va="bottom", ha="left")
    axes.text(0, 1.3, "elsewhere: each completion repeats its prompt", **style)
    axes.text(0, top - 0.3, "here: a group is one row, the prompt stands once", **style)
    axes.text(PROMPT_TOKENS / 2, top + 1.4, "prompt", va="top", ha="center")
    axes.text(PROMPT_TOKENS + GROUP * STEPS / 2, top + 1.4, f"{GROUP} completions", va="top", ha="center")
    axes.set(xlim=(-0.2, len(branches) + 0.2), ylim=(top + 3, 0), aspect="equal")
    axes.axis("off")


def tile(axes: Any, x: float, y: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1))


# The demo's learning curves -------------------------------------------------------------------------------------------


def draw_curves(arguments: argparse.Namespace) -> None:
    """Accuracy over the steps of GRPO, with the levels of the warm start, of the silent control and of chance."""
    directory = arguments.source
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}); expected the files of `hark demo`"
        ) from None
    lines = read_metrics(directory / "grpo")
    steps = [line for line in lines if "reward/accuracy" in line]
    if not steps:
        raise DataError(
            f"{directory / 'grpo' / 'metrics.jsonl'}: has no steps of GRPO; expected the files of `hark demo`"
        )
    evaluations = [line for line in lines if line.get("event") == "evaluation"]
    with figure(arguments.out, width=7.2, height=3.4) as drawn:
        axes = drawn.subplots()
        sampled = smoothed([100 * line["reward/accuracy"] for line in steps], MEAN_OF)
        axes.plot(
            [line["step"] for line in steps], sampled, color=BLUE, label=f"sampled in training, mean of {MEAN_OF} steps"
        )
        validation = [(line["step"], 100 * line["accuracy"]) for line in evaluations]
        axes.plot(*zip(*validation, strict=True), "o", color=BLUE, label="greedy, validation")
        tests = (
            ("GRPO", "accuracy_after", BLUE),
            ("SFT instead", "sft_accuracy", GREEN),
            ("warm start", "accuracy_before", GREY),
        )
        for name, key, colour in tests:
            level(axes, 100 * summary[key], f"{name}, test", colour, "-")
        level(axes, 100 * summary["silent_accuracy"], "GRPO, sound removed", ORANGE, "--", va="top")
        level(axes, 100 * summary["chance"], "chance", GREY, ":", va="bottom")
        axes.set(xlabel="step of GRPO", ylabel="accuracy, %", ylim=(0, None), xlim=(0, None))
        axes.legend(frameon=False, loc="lower right", fontsize=9)


def level(axes: Any, value: float, name: str, colour: str, style: str, *, va: str = "center") -> None:
    """A horizontal line with its name and value beside it."""
    axes.axhline(value, color=colour, linestyle=style, linewidth=1)
    axes.annotate(
        f" {name} {value:.1f}", (1, value), xycoords=("axes fraction", "data"), color=colour, va=va, fontsize=9,
        annotation_clip=False,
    )  # fmt: skip


def smoothed(values: list[float], count: int) -> list[float]:
    """The mean of each value and of up to `count` - 1 values before it."""
    sums = [0.0, *accumulate(values)]
    starts = [max(0, end - count) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]


# The benchmark --------------------------------------------------------------------------------------------------------


def draw_speed(arguments: argparse.Namespace) -> None:
    """Seconds of a step, the baseline's and Hark's, for each line of the table that `hark benchmark` printed."""
    rows = measured(arguments.source.read_text(encoding="utf-8"))
    if not rows:
        raise DataError(
            f"{arguments.source}: has no table of `hark benchmark`; expected lines such as 'A 1 1 27.46 s 1.56 s'"
        )
    with figure(arguments.out, width=7.2, height=3.4) as drawn:
        axes = drawn.subplots()
        for place, (_, baseline, own) in enumerate(rows):
            axes.barh(place - 0.2, baseline, 0.38, color=GREY, label="R1-AQA procedure" if not place else None)
            axes.barh(place + 0.2, own, 0.38, color=BLUE, label="Hark" if not place else None)
            axes.text(baseline, place - 0.2, f" {baseline:.1f} s", va="center", fontsize=9)
            axes.text(
                own,
                place + 0.2,
                f" {own:.1f} s, {baseline / own:.1f} times as fast",
                va="center",
                fontsize=9,
                color=BLUE,
            )
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set(xlabel="seconds of a step", xlim=(0, 1.12 * max(baseline for _, baseline, _ in rows)))
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="lower right")


def measured(text: str) -> list[tuple[str, float, float]]:
    """(name, baseline's seconds, Hark's seconds) of each line of the benchmark's first table in a text."""
    seconds = {"A": 10, "B": 30}  # of a clip, in the benchmark's shapes
    table = text.partition("best rate of matrix products")[0]
    found = re.findall(r"^([AB]) +(\d+) +(\d+) +([\d.]+) s +([\d.]+) s ", table, re.MULTILINE)
    return [
        (f"{prompts} x {seconds[shape]} s, {threads} core{'s' * (threads != '1')}", float(baseline), float(own))
        for shape, prompts, threads, baseline, own in found
    ]


if __name__ == "__main__":
    run(main)
