"""Measure the time of a step for different sizes and numbers of ranks, on the CPU; docs/scaling.md has the results.

    python launch/studies/scaling.py [--json FILE] [--plot FILE.svg] [--table FILE.md] [--repeat 3] [--threads 1]
                                     [--group-size 2 4 8 ...] [--seconds 1 2 ...] [--new-tokens 8 ...]
                                     [--prompts 1 2 ...] [--ranks 1 2 4]

The model is that of launch/studies/benchmark.py. The base step has one prompt with a clip of 10 s and 8 completions of
24 tokens. Each curve varies one of these sizes and keeps the others fixed. Then launch/studies/weak_scaling.py measures
the base step on each number of ranks. Beside the times, the tables show the multiply-adds that the step needs
(grpo/instruments/flops.py), and how many it would need if each completion had a row of its own with the prompt in it.

The tables are printed. --table writes them into a page, between two marker lines. With the default values it takes
about 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hark.data.json_files import write_json
from hark.grpo.instruments.flops import best_matmul_rate, cost_of, macs
from hark.grpo.types import Rollout
from hark.launch.common.entry import run
from hark.launch.common.pages import Markers, table
from hark.launch.common.torchrun import environment, torchrun
from hark.launch.studies.sides import (
    BASE,
    HarkSide,
    Size,
    Work,
    build_model,
    machine,
    medians,
    silence,
    timed_passes,
    with_update,
)

CURVES: dict[str, tuple[str, tuple[float, ...]]] = {  # field of Work -> its title and its values
    "group_size": ("completions per prompt", (2, 4, 8, 16, 32, 64)),
    "seconds": ("seconds of sound", (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)),
    "new_tokens": ("tokens per completion", (8, 16, 32, 64, 128, 256, 512)),
    "prompts": ("prompts", (1, 2, 4, 8, 16, 32)),
}
RANKS = (1, 2, 4)
PHASES = {"rollout": "rollout", "reference": "reference", "score": "forward, backward", "optimizer": "optimizer"}
MARKERS = Markers.of("launch/studies/scaling.py")


def main(argv: list[str], size: Size | None = None) -> None:
    arguments = parse(argv)
    silence()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build_model(directory, size or Size())
        chosen = {field: getattr(arguments, field) for field in CURVES}
        result = {"machine": machine(), "threads": arguments.threads, "repeat": arguments.repeat}
        result |= measure_curves(directory, chosen, arguments.repeat)
        result["ranks"] = [measure_ranks(directory, ranks, arguments.repeat) for ranks in arguments.ranks]
    print(tables(result))
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.plot:
        plot(result, arguments.plot)
    if arguments.table:
        arguments.table.write_text(MARKERS.filled(arguments.table.read_text(), tables(result)))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, (name, values) in CURVES.items():
        option, kind = f"--{field.replace('_', '-')}", type(getattr(BASE, field))
        parser.add_argument(option, type=kind, nargs="*", default=values, help=name)
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=RANKS, help="numbers of processes; each process has the same work"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads for the curves; a rank always has one")
    parser.add_argument("--repeat", type=int, default=3, help="steps; their median is reported")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves; needs matplotlib")
    parser.add_argument("--table", type=Path, metavar="FILE", help="replace the tables in this page")
    arguments = parser.parse_args(argv)
    if arguments.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install -e '.[plot]'")
    if arguments.table and not (arguments.table.exists() and MARKERS.are_in(arguments.table.read_text())):
        parser.error(f"--table {arguments.table}: expected a page with the lines '{MARKERS.begin}' and '{MARKERS.end}'")
    return arguments


# Measuring ------------------------------------------------------------------------------------------------------------


def measure_curves(directory: Path, chosen: dict[str, Sequence[Any]], repeat: int) -> dict[str, Any]:
    """The figures of every point of every curve, and the best matmul rate measured in the run."""
    works = {field: [replace(BASE, **{field: value}) for value in values] for field, values in chosen.items()}
    points: dict[Work, dict[str, Any]] = {}
    rate = 0.0
    for work in dict.fromkeys(work for curve in works.values() for work in curve):
        rate = max(rate, best_matmul_rate())
        points[work] = measure(directory, work, repeat)
        print(f"{work}: {points[work]['seconds']['step']:.3g} s", flush=True)
    for point in points.values():
        point["limit_seconds"] = point["necessary_gmacs"] * 1e9 / rate
        point["separate_limit_seconds"] = point["separate_gmacs"] * 1e9 / rate
    curves = {field: [points[work] for work in curve] for field, curve in works.items()}
    return {"matmul_gmacs_per_second": rate / 1e9, "curves": curves}


def measure(directory: Path, work: Work, repeat: int) -> dict[str, Any]:
    """The median seconds of each phase of a step, and its multiply-adds."""
    side = HarkSide(directory, work)
    drawn = side.rollout()
    turns = [with_update(side, timed_passes(side, drawn)[0]) for _ in range(repeat)]
    shared, separate = necessary(side, drawn)
    return {
        "work": asdict(work),
        "prompt_tokens": len(side.prompts[0].ids),
        "seconds": medians(turns),
        "necessary_gmacs": shared / 1e9,
        "separate_gmacs": separate / 1e9,
    }


def necessary(side: HarkSide, drawn: Rollout) -> tuple[int, int]:
    """Multiply-adds of the step, and of the same step with a separate row, prompt included, for each completion."""
    cost, lengths = cost_of(side.policy), drawn.mask.sum(dim=1)
    repeated = [prompt for prompt in side.prompts for _ in range(side.work.group_size)]
    shared, separate = (
        macs(cost, prompts, lengths, audio_id=side.policy.audio_id).step() for prompts in (side.prompts, repeated)
    )
    return shared, separate


def measure_ranks(directory: Path, ranks: int, repeat: int) -> dict[str, float]:
    """The figures of launch/studies/weak_scaling.py on a number of processes."""
    figures = directory / "ranks.json"
    script = (str(Path(__file__).with_name("weak_scaling.py")), str(directory), "--json", str(figures))
    words = [*torchrun(ranks), *script, "--repeat", str(repeat)]
    subprocess.run(words, env=environment() | {"OMP_NUM_THREADS": "1"}, check=True)  # each rank has one thread
    return json.loads(figures.read_text())


# Tables ---------------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """All figures as markdown."""
    parts = [conditions(result)]
    for field, points in result["curves"].items():
        name = CURVES[field][0]
        if points:
            parts += [f"### {name.capitalize()}", table(curve_heading(name), [curve_row(field, p) for p in points])]
    if result["ranks"]:
        heading = ("ranks", "step, s", "tokens/s", "per rank", "in collectives, s", "received, MiB", "formula, MiB")
        rows = [ranks_row(figures, result["ranks"][0]) for figures in result["ranks"]]
        parts += ["### Ranks", table(heading, rows), *note_on_cores(result)]
    return "\n\n".join(parts)


def conditions(result: dict[str, Any]) -> str:
    on, threads, repeat = result["machine"], result["threads"], result["repeat"]
    return (
        f"{on['cpu']}, {on['cores']} cores, {threads} thread{'s' * (threads > 1)}, torch {on['torch']}, transformers "
        f"{on['transformers']}, float32; {'each step timed once' if repeat == 1 else f'medians of {repeat} steps'}; "
        f"the best matmul rate of the run is {result['matmul_gmacs_per_second']:.1f} · 10⁹ multiply-adds/s."
    )


def curve_heading(name: str) -> tuple[str, ...]:
    times = (f"{title}, s" for title in (*PHASES.values(), "step"))
    return (name, *times, "multiply-adds, 10⁹", "of limit", "in separate rows, 10⁹", "saved")


def curve_row(field: str, point: dict[str, Any]) -> tuple[str, ...]:
    seconds, shared, separate = point["seconds"], point["necessary_gmacs"], point["separate_gmacs"]
    times = (number(seconds[phase]) for phase in (*PHASES, "step"))
    share, saved = point["limit_seconds"] / seconds["step"], f"{separate / shared:.1f} x"
    return (f"{point['work'][field]:g}", *times, number(shared), f"{share:.2f}", number(separate), saved)


def ranks_row(figures: dict[str, float], first: dict[str, float]) -> tuple[str, ...]:
    """A row of the table of ranks; the rate per rank is relative to that of the first row."""
    per_rank = figures["tokens_per_second"] / figures["ranks"] / (first["tokens_per_second"] / first["ranks"])
    return (
        f"{figures['ranks']:g}",
        number(figures["seconds/step"]),
        number(figures["tokens_per_second"]),
        f"{per_rank:.2f}",
        number(figures["seconds/communication"]),
        *(f"{1024 * figures[name]:.3f}" for name in ("communication/gib", "formula/gib")),
    )


def note_on_cores(result: dict[str, Any]) -> Iterator[str]:
    """A note if there are more ranks than cores."""
    cores = result["machine"]["cores"]
    most = max(figures["ranks"] for figures in result["ranks"])
    if most > cores:
        yield f"Each rank has one thread. More than {cores} ranks share the {cores} cores and wait for one another."


def number(value: float) -> str:
    """A number with three significant digits and without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# Plot -----------------------------------------------------------------------------------------------------------------

# Name, seconds, style. The colours are from the palette of Okabe and Ito, which colour-blind readers can tell apart.
LINES = (
    ("whole step", lambda point: point["seconds"]["step"], dict(color="black", marker=".", linewidth=2)),
    ("forward, backward", lambda point: point["seconds"]["score"], dict(color="#D55E00", marker=".")),
    ("rollout", lambda point: point["seconds"]["rollout"], dict(color="#0072B2", marker=".")),
    ("limit", lambda point: point["limit_seconds"], dict(color="#666666", linestyle="--")),
    ("limit, separate rows", lambda point: point["separate_limit_seconds"], dict(color="#666666", linestyle=":")),
)
LABEL_GAP = 0.06  # smallest distance of two labels, as a share of the height of a panel


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw one panel per curve as SVG: seconds over the size, both axes logarithmic."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    curves = {field: points for field, points in result["curves"].items() if points}
    # Text is kept as text, and the same figures give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hark", "font.size": 9}):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        panels = dict(zip(curves, figure.subplots(2, 2, sharey=True).flat, strict=False))
        for field, axes in panels.items():
            draw_lines(axes, field, curves[field])
        for field, axes in panels.items():  # the panels share their y axis, so all lines must be drawn first
            label_lines(axes, curves[field])
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_lines(axes: Any, field: str, points: Sequence[dict[str, Any]]) -> None:
    sizes = [point["work"][field] for point in points]
    for _, seconds, style in LINES:
        axes.plot(sizes, [seconds(point) for point in points], **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g} s")
    axes.set_xlabel(CURVES[field][0])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def label_lines(axes: Any, points: Sequence[dict[str, Any]]) -> None:
    """Write the name of each line at its right end, moved up where two names would overlap."""
    low, high = map(math.log, axes.get_ylim())
    ends = sorted(((math.log(seconds(points[-1])) - low) / (high - low), name, style) for name, seconds, style in LINES)
    height = -math.inf
    for end, name, style in ends:
        height = max(end, height + LABEL_GAP)
        axes.text(1.01, height, name, color=style["color"], transform=axes.transAxes, verticalalignment="center")


if __name__ == "__main__":
    run(main)
