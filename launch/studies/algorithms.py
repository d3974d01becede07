"""Train by every named algorithm from one start, over several seeds; docs/algorithms.md has the results.

    python launch/studies/algorithms.py [--seeds 3] [--jobs 1] [--root runs/studies/algorithms] [--only NAME ...]

The start is the demo's small model and data after its warm start. Each run trains 80 steps of 8 questions with 12
completions each, in about two minutes on one core, and answers the 480 test questions every 20 steps. Each step makes
two updates: at a single one all ratios are 1, and algorithms that bound them differently are the same. Further runs
vary what is trained on: GRPO without a KL term, with and without dynamic sampling (`rollout.refill`), and GRPO from
easy to hard questions, as SARI orders them, by the pass rates that the start has. A run is done once: a study that was
stopped goes on when it is started again. After each run the figures, the table and the picture are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hark.grpo.algorithms import ALGORITHMS
from hark.launch.common.entry import run
from hark.launch.common.pages import Markers, table
from hark.launch.studies.kept import DOCS, Case, Kept, Run, do, mean_and_spread, missing, options, percent
from hark.launch.studies.pictures import BLUE, GREY, figure

MARKERS = Markers.of("launch/studies/algorithms.py")
STEPS, EVERY, PROMPTS, GROUP, UPDATES = 80, 20, 8, 12, 2
PLAIN, DYNAMIC = "grpo, beta 0", "grpo, beta 0, refill 3"
SETTINGS: dict[str, tuple[str, ...]] = {name: (f"loss.kind={name}",) for name in ALGORITHMS} | {
    PLAIN: ("loss.beta=0",),
    DYNAMIC: ("loss.beta=0", "rollout.refill=3"),
    "grpo, easy to hard": ("data.order=sorted", "data.order_by=pass_rate"),
    "grpo, three stages": ("data.order=staged", "data.order_by=pass_rate", "data.stages=3"),
}


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    kept = Kept(arguments.json)
    # All algorithms by the first seed, then all by the second: what there is compares all of them at any time.
    chosen = {name: SETTINGS[name] for name in arguments.only or SETTINGS}
    cases = {case_name(name, seed): (name, seed) for seed in range(arguments.seeds) for name in chosen}

    def prepare(_: Iterable[Case]) -> None:
        start = warm_start(arguments.root / "start")
        do(start)
        kept.put("start", [], {"accuracy": start[1].evaluations()[-1]["accuracy"]})

    for _ in missing(
        kept, cases, settings_of=settings_of, prepare=prepare, runs_of=partial(runs_of, arguments.root),
        figures_of=figures_of, jobs=arguments.jobs,
    ):  # fmt: skip
        write(arguments, kept, cases)
    print(write(arguments, kept, cases))


def write(arguments: argparse.Namespace, kept: Kept, cases: dict[str, tuple[str, int]]) -> str:
    """Write the table and the picture of the cases that are finished; returns the table."""
    done: dict[str, list[dict[str, Any]]] = {}
    for case, (name, seed) in cases.items():
        if kept.has(case, settings_of(name, seed)):
            done.setdefault(name, []).append(kept.figures(case))
    start = kept.figures("start")["accuracy"]
    text = tables(done, start=start, cases=len(cases))
    if find_spec("matplotlib") is not None:
        plot(done, start, arguments.plot)
        text = f"![Test accuracy over the steps of every algorithm]({arguments.plot.name})\n\n{text}"
    arguments.page.write_text(MARKERS.filled(arguments.page.read_text(), text))
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    parser = options(__doc__, "algorithms", seeds="each algorithm")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, metavar="NAME", help="these alone")
    parser.add_argument("--plot", type=Path, default=DOCS / "algorithms.svg", help="where the picture is written")
    return parser.parse_args(argv)


def warm_start(root: Path) -> list[Run]:
    """The runs that make data and model, fine-tune it, and measure it."""
    warm = root / "warm"
    fine_tuning = [
        "mini_sft", f"run.directory={warm}", f"model.path={root}/mini/model", "record.every=0",
        f"data.train={root}/mini/data/train.jsonl", f"data.validation={root}/mini/data/test.jsonl",
        "evaluation.every=150",
    ]  # fmt: skip
    rates = root / "rates"
    measured = [f"run.directory={rates}", f"model.path={warm}/model", f"data.train={root}/mini/data/train.jsonl"]
    return [
        Run(root / "mini", "build_mini.py", (str(root / "mini"),)),
        Run(warm, "sft.py", tuple(fine_tuning)),
        Run(rates, "pass_rate.py", ("mini", *measured, "--samples", "8", "--out", str(rates / "rates.jsonl"))),
    ]


def runs_of(root: Path, name: str, seed: int) -> list[Run]:
    directory, start = root / case_name(name, seed), root / "start"
    words = [
        "mini", f"run.directory={directory}", f"run.seed={seed}", f"model.path={start}/warm/model",
        f"data.train={start}/rates/rates.jsonl", "data.allow_outside=true",  # the clips stay with the demo's data
        f"data.validation={start}/mini/data/test.jsonl",
        f"optim.steps={STEPS}", f"optim.prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP}",
        f"loss.inner_epochs={UPDATES}",
        f"evaluation.every={EVERY}", "evaluation.silent=false", "record.every=0", "record.last=0", "checkpoint.every=0",
        "checkpoint.export=false", "log.completions=0", *SETTINGS[name],
    ]  # fmt: skip
    return [Run(directory, "train.py", tuple(words))]


def case_name(name: str, seed: int) -> str:
    return f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def settings_of(name: str, seed: int) -> list[Any]:
    """What a case of this algorithm is: cases with other settings are done again."""
    return [STEPS, EVERY, PROMPTS, GROUP, UPDATES, *SETTINGS[name]]


def figures_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Accuracy and completions drawn at each evaluation, and means over the steps."""
    one = runs[-1]
    steps = [line for line in one.metrics() if "reward" in line]
    drawn = [GROUP * line.get("drawn_prompts", PROMPTS) for line in steps]
    evaluations = one.evaluations()
    return {
        "accuracy": [line["accuracy"] for line in evaluations],
        "no_choice_share": evaluations[-1]["no_choice_share"],
        "drawn": [sum(drawn[: line["step"]]) for line in evaluations],
        "equal_reward_share": mean_and_spread(line["equal_reward_share"] for line in steps)[0],
        "grad_norm": mean_and_spread(line["grad_norm"] for line in steps)[0],
        "entropy": [line["entropy"] for line in steps if "entropy" in line][-1],  # a step without an update has none
    }


def tables(done: dict[str, list[dict[str, Any]]], *, start: float, cases: int) -> str:
    """The table of all algorithms, the best first, and that of dynamic sampling."""
    rows = sorted(done, key=lambda name: -mean_and_spread(one["accuracy"][-1] for one in done[name])[0])
    heading = ("algorithm", "seeds", "accuracy, %", "best, %", "no choice, %", "entropy", "gradient norm")
    lines = [
        f"{sum(map(len, done.values()))} of {cases} runs; {STEPS} steps of {PROMPTS} questions x {GROUP} completions, "
        f"{UPDATES} updates each, "
        f"from a start of {100 * start:.1f} %; 480 test questions; mean and sample standard deviation over the seeds.",
        "",
        table(heading, [row(name, done[name]) for name in rows]),
    ]
    return "\n".join(lines + dynamic(done))


def row(name: str, seeds: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    return (
        f"`{name}`" if name in ALGORITHMS else name,
        str(len(seeds)),
        percent(one["accuracy"][-1] for one in seeds),
        percent(max(one["accuracy"]) for one in seeds),
        percent(one["no_choice_share"] for one in seeds),
        f"{mean_and_spread(one['entropy'] for one in seeds)[0]:.2f}",
        f"{mean_and_spread(one['grad_norm'] for one in seeds)[0]:.2f}",
    )


def dynamic(done: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A table of the completions that plain GRPO and dynamic sampling have drawn, and the accuracy then."""
    if not {PLAIN, DYNAMIC} <= done.keys():
        return []
    cells = []
    for name in (PLAIN, DYNAMIC):
        for place in range(STEPS // EVERY):
            drawn = mean_and_spread(one["drawn"][place] for one in done[name])[0]
            accuracy = percent(one["accuracy"][place] for one in done[name])
            cells.append((name, str(EVERY * (place + 1)), f"{drawn:.0f}", accuracy))
    return ["", table(("dynamic sampling", "steps", "completions drawn", "accuracy, %"), cells)]


def plot(done: dict[str, list[dict[str, Any]]], start: float, out: Path) -> None:
    """Accuracy over the steps, one small plot for each algorithm, above those of all others in grey."""
    steps = [EVERY * place for place in range(STEPS // EVERY + 1)]
    curves = {name: [[start, *one["accuracy"]] for one in done[name]] for name in SETTINGS if name in done}
    columns = 5
    count = -(-len(curves) // columns)
    with figure(out, width=2.1 * columns, height=1.7 * count) as drawn:
        places = drawn.subplots(count, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, name in zip(places, curves, strict=False):
            for other in curves.values():
                for curve in other:
                    axes.plot(steps, [100 * value for value in curve], color=GREY, linewidth=0.3, alpha=0.4)
            for curve in curves[name]:
                axes.plot(steps, [100 * value for value in curve], color=BLUE, linewidth=0.8, alpha=0.5)
            mean = [100 * mean_and_spread(values)[0] for values in zip(*curves[name], strict=True)]
            axes.plot(steps, mean, color=BLUE, linewidth=2)
            axes.set_title(name, fontsize=9)
        for axes in places[len(curves) :]:
            axes.axis("off")
        drawn.supxlabel("steps", fontsize=9)
        drawn.supylabel("test accuracy, %", fontsize=9)


if __name__ == "__main__":
    run(main)
