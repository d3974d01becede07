"""GRPO against supervised fine-tuning and rejection sampling from one start; docs/rl-or-sft.md has the results.

    python launch/studies/rl_or_sft.py [--seeds 3] [--jobs 1] [--root runs/studies/rl-or-sft] [--only CELL ...]

The start is a Whisper encoder and the first layers of SmolLM2 with a new projector (docs/compose.md): 86 million
parameters, of which the tower stays frozen. Its projector, then its decoder, learn the first half of the demo's
questions of ten kinds; a strong start learns the decoder's part longer than a weak one. From there each method sees 320
questions of the second half:

    grpo        GRPO with adapters, 8 completions per question
    sft-lora    supervised fine-tuning on the right answers, with adapters
    sft-full    the same on all weights but the tower's
    rejection   8 answers per question are drawn, and adapters learn the right ones of them

A cell says what varies: the start, how many different questions there are, and whether the choices of a question are
in a new order each time. The test has four parts: the sources of the training clips, other voices and recordings, the
same with the questions in other words, and five kinds of questions that were never trained on.

A case is done once: a study that was stopped goes on when it is started again. Figures, table and picture are written
after each case.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from hark.launch.common.entry import run
from hark.launch.common.pages import Markers, table
from hark.launch.studies.composed import common, compose, tuning
from hark.launch.studies.kept import DOCS, Case, Kept, Run, answered, do, mean_and_spread, missing, options, percent
from hark.launch.studies.pictures import BLUE, GREEN, GREY, ORANGE, figure

MARKERS = Markers.of("launch/studies/rl_or_sft.py")
METHODS = {"grpo": BLUE, "sft-lora": ORANGE, "sft-full": GREY, "rejection": GREEN}
PARTS = ("same sources", "other sources", "other words", "other kinds")
LAYERS = 6  # of SmolLM2; with all 30 the study would take two cores more than a night
PROMPTS, SEEN = 8, 320  # questions per step, and in all
QUESTIONS = 50  # of each part of the test
# The projector learns the answers without their choices, so that they have to come from the clips (docs/compose.md).
PROJECTOR = ("model.train=projector", "data.template=open", "optim.steps=80", "optim.lr=1e-3")
# Clips stay with the demo's. In float32, because few processors have products of bfloat16.
EVERY = ("data.template=answer", "rollout.max_new_tokens=24", "data.allow_outside=true", "model.dtype=float32")
NEVER = ("vowel", "loudness", "highest note", "word order", "addition")  # kinds that are never trained on
WORDS = {  # for each kind that is trained on, the question in words that training has not
    "instrument": "Name the instrument in this recording.",
    "dynamics": "Is the music growing louder, softer, or neither?",
    "sound order": "Name the sound that follows the first one.",
    "language": "In what language is this person talking?",
    "word": "Tell me the number that was said.",
    "count": "Count how often you hear the sound.",
    "word count": "Count the words that the person says.",
    "event": "Name the source of this sound.",
    "melody": "Describe the direction of the tune.",
    "notes": "Count the notes of this tune.",
}


class Cell(NamedTuple):
    """What varies: steps of the start's decoder, different questions, and whether choices change their order."""

    start: int
    questions: int
    shuffled: bool

    @property
    def name(self) -> str:
        return f"start {self.start}, {self.questions} questions, {'shuffled' if self.shuffled else 'fixed'} choices"


CELLS = (Cell(300, 320, True), Cell(120, 320, True), Cell(300, 40, True), Cell(300, 320, False))


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    kept = Kept(arguments.json)
    cells = [cell for cell in CELLS if not arguments.only or cell.name in arguments.only]
    cases = {
        f"{cell.name}, {method}, {seed}": (cell, method, seed)
        for cell in cells for seed in range(arguments.seeds) for method in METHODS
    }  # fmt: skip
    cases |= {f"{cell.name}, start": (cell, "start", 0) for cell in cells}
    for _ in missing(
        kept, cases, settings_of=settings_of, prepare=partial(prepare, arguments.root),
        runs_of=partial(runs_of, arguments.root), figures_of=figures_of, jobs=arguments.jobs,
    ):  # fmt: skip
        write(arguments, kept, cases)
    print(write(arguments, kept, cases))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = options(__doc__, "rl-or-sft", seeds="each method in each cell")
    parser.add_argument("--only", nargs="+", choices=[cell.name for cell in CELLS], metavar="CELL", help="these alone")
    parser.add_argument("--plot", type=Path, default=DOCS / "rl-or-sft.svg", help="where the picture is written")
    return parser.parse_args(argv)


# Start ----------------------------------------------------------------------------------------------------------------


def prepare(root: Path, cases: Iterable[Case]) -> None:
    """Make the data, the composed model, and the starts of these cases."""
    do([Run(root / "mini", "build_mini.py", (str(root / "mini"),))])
    divide(root / "mini" / "data", root / "data")
    learnt = (f"data.train={root}/data/start.jsonl", "optim.prompts_per_step=16", "optim.micro_batch=8", *EVERY)
    projector = tuning(root / "projector", compose(root, layers=LAYERS), *learnt, *PROJECTOR)
    starts = [
        tuning(root / f"start-{steps}", root / "projector" / "model", *learnt, f"optim.steps={steps}")
        for steps in sorted({cell.start for cell, *_ in cases})
    ]
    do([projector, *starts])


def divide(source: Path, target: Path) -> None:
    """Write the files of the start, of training and of the test; clips stay where they are."""
    target.mkdir(parents=True, exist_ok=True)
    rows = {name: [json.loads(line) for line in (source / f"{name}.jsonl").open()] for name in ("train", "test")}
    for row in (row for part in rows.values() for row in part):
        row["audio_path"] = str((source / row["audio_path"]).absolute())
    known = [row for row in rows["train"] if row["category"] not in NEVER]
    tested, known = known[:QUESTIONS], known[QUESTIONS:]
    half = len(known) // 2
    lines(target / "start.jsonl", known[:half])
    for count in {cell.questions for cell in CELLS}:
        lines(target / f"train-{count}.jsonl", known[half : half + count])
    others = [row for row in rows["test"] if row["category"] not in NEVER][:QUESTIONS]
    worded = [{**row, "id": f"{row['id']}-words", "question_text": WORDS[row["category"]]} for row in others]
    kinds = [row for row in rows["test"] if row["category"] in NEVER][:QUESTIONS]
    parts = zip(PARTS, (tested, others, worded, kinds), strict=True)
    lines(target / "test.jsonl", [{**row, "dataset_name": part} for part, some in parts for row in some])


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# Cases ----------------------------------------------------------------------------------------------------------------


def settings_of(cell: Cell, method: str, seed: int) -> list[Any]:
    """What a case is: one with other settings is done again."""
    return [*cell, method, seed, PROMPTS, SEEN, QUESTIONS, LAYERS]


def runs_of(root: Path, cell: Cell, method: str, seed: int) -> list[Run]:
    """Training by a method, and the test."""
    begin = root / f"start-{cell.start}" / "model"
    if method == "start":
        return [test(root, root / "tests" / cell.name.replace(", ", "-").replace(" ", "-"), begin)]
    place = root / f"{cell.name}, {method}, {seed}".replace(", ", "-").replace(" ", "-")
    trained, data = place / "trained", root / "data" / f"train-{cell.questions}.jsonl"
    words = [
        *common(trained, begin), *EVERY, f"run.seed={seed}", f"data.train={data}", f"optim.steps={SEEN // PROMPTS}",
        f"optim.prompts_per_step={PROMPTS}", f"optim.micro_batch={PROMPTS}", "optim.schedule=linear",
        f"data.shuffle_choices={str(cell.shuffled).lower()}", "checkpoint.export=true", "optim.warmup_steps=5",
    ]  # fmt: skip
    adapters = ["lora.rank=16", "optim.lr=2e-4"]
    if method == "grpo":
        runs = [Run(trained, "train.py", ("compose_decoder", *words, *adapters, "rollout.group_size=8"))]
    elif method == "rejection":
        kept = place / "drawn" / "kept.jsonl"
        drawn = ("--samples", "8", "--out", str(place / "drawn" / "rates.jsonl"), "--keep", str(kept))
        runs = [
            Run(place / "drawn", "pass_rate.py", ("compose_decoder", *words, *drawn)),
            Run(trained, "sft.py", ("compose_decoder", *words, *adapters, f"data.train={kept}")),
        ]
    else:
        rate = adapters if method == "sft-lora" else ["optim.lr=5e-5"]
        runs = [Run(trained, "sft.py", ("compose_decoder", *words, *rate))]
    return [*runs, test(root, place / "tested", trained / "model")]


def test(root: Path, directory: Path, model: Path) -> Run:
    words = ("compose_decoder", *common(directory, model), *EVERY, f"data.test={root}/data/test.jsonl", "--silent")
    return Run(directory, "evaluate.py", words)


def figures_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Accuracy and the share of answers that are no choice, of each part of the test, and training's time on a core."""
    every = answered(runs[-1].directory)
    rows = {part: [row for row in every if row["dataset_name"] == part] for part in PARTS}
    seconds = [json.loads((one.directory / "finished.json").read_text())["seconds"] for one in runs[:-1]]
    return {
        "accuracy": {part: mean_and_spread(row["correct"] for row in some)[0] for part, some in rows.items()},
        "no_choice": {part: mean_and_spread(row["choice"] is None for row in some)[0] for part, some in rows.items()},
        "silent": mean_and_spread(row["silent"]["correct"] for row in every)[0],
        "seconds": round(sum(seconds)),
    }


# Results --------------------------------------------------------------------------------------------------------------


def write(arguments: argparse.Namespace, kept: Kept, cases: dict[str, tuple[Cell, str, int]]) -> str:
    """Write the tables and the picture of the cases that are finished; returns the tables."""
    done: dict[Cell, dict[str, list[dict[str, Any]]]] = {}
    for case, which in cases.items():
        if kept.has(case, settings_of(*which)):
            done.setdefault(which[0], {}).setdefault(which[1], []).append(kept.figures(case))
    finished = sum(len(seeds) for methods in done.values() for seeds in methods.values())
    text = "\n\n".join(
        [f"{finished} of {len(cases)} cases.", *(section(cell, done[cell]) for cell in CELLS if cell in done)]
    )
    if find_spec("matplotlib") is not None and done:
        plot(done, arguments.plot)
        text = f"![Accuracy of each method in each part of the test]({arguments.plot.name})\n\n{text}"
    arguments.page.write_text(MARKERS.filled(arguments.page.read_text(), text))
    return text


def section(cell: Cell, methods: dict[str, list[dict[str, Any]]]) -> str:
    heading = ("accuracy, %", "seeds", *PARTS, "no choice", "no choice, other kinds", "without sound", "CPU seconds")
    rows = [(name, *row(methods[name])) for name in ("start", *METHODS) if name in methods]
    return f"**{cell.name[0].upper()}{cell.name[1:]}**\n\n{table(heading, rows)}"


def row(seeds: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    return (
        str(len(seeds)),
        *(percent(one["accuracy"][part] for one in seeds) for part in PARTS),
        percent(mean_and_spread(one["no_choice"].values())[0] for one in seeds),
        percent(one["no_choice"]["other kinds"] for one in seeds),
        percent(one["silent"] for one in seeds),
        f"{mean_and_spread(one['seconds'] for one in seeds)[0]:.0f}",
    )


def plot(done: dict[Cell, dict[str, list[dict[str, Any]]]], out: Path) -> None:
    """For each cell the accuracy in the parts of the test: a point for each seed, a bar for the mean."""
    with figure(out, width=9, height=2.2 * len(done)) as drawn:
        for axes, (cell, methods) in zip(
            drawn.subplots(len(done), 1, squeeze=False).flatten(), done.items(), strict=True
        ):
            for number, (name, colour) in enumerate(METHODS.items()):
                seeds = methods.get(name, [])
                for place, part in enumerate(PARTS):
                    values, x = [100 * one["accuracy"][part] for one in seeds], place + 0.2 * number
                    if values:
                        axes.bar(x, mean_and_spread(values)[0], 0.18, color=colour, alpha=0.5)
                        axes.plot([x] * len(values), values, ".", color=colour)
                axes.bar(0, 0, 0.18, color=colour, alpha=0.5, label=name)
            for place, part in enumerate(PARTS):
                for one in methods.get("start", []):
                    axes.hlines(100 * one["accuracy"][part], place - 0.1, place + 0.7, color="black", linewidth=1)
            axes.set_xticks([place + 0.3 for place in range(len(PARTS))], PARTS)
            axes.set_title(f"{cell.name}; the line is the start", fontsize=9)
        axes.legend(fontsize=8, ncols=len(METHODS))
        drawn.supylabel("accuracy, %", fontsize=9)


if __name__ == "__main__":
    run(main)
