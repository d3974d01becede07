"""Speech recognition by GRPO after supervised fine-tuning; docs/asr.md has the results.

    python launch/studies/asr.py [--seeds 3] [--jobs 1] [--root runs/studies/asr]

The composed model (docs/compose.md) learns to transcribe sentences that espeak-ng speaks: first its projector, then its
decoder, for 100 steps to a strong start and for 30 to a weak one. From each, GRPO goes on with the rewards of
asr.yaml, 1 - WER and hallucination, and for comparison supervised fine-tuning on the same sentences. The word error
rate is measured on new sentences, by voices of training and by others. A case is done once: a study that was stopped
goes on when it is started again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
from numpy.random import Generator, default_rng

from hark.data.mini.clips import SAMPLE_RATE
from hark.data.mini.espeak import VOICES, Speaker
from hark.data.rewards.transcript import error_rate, spoken
from hark.launch.common.entry import run
from hark.launch.common.pages import Markers, table
from hark.launch.studies.composed import common, compose, tuning
from hark.launch.studies.kept import Case, Kept, Run, answered, do, missing, options, percent

MARKERS = Markers.of("launch/studies/asr.py")
TRAIN, TEST = 1600, 50  # sentences; the test has so many of each part
PARTS = ("known voices", "other voices")
STARTS = (30, 100)  # steps of the decoder
PROMPTS, STEPS = 8, 60
METHODS = ("grpo", "sft")
TEXT = ("data.template=open", "rollout.max_new_tokens=32", "data.max_seconds=4")
QUESTION = "Transcribe the speech."
WORDS = (  # a sentence has one word of each; none of them is an article
    "the my your our every this another his her their".split(),
    "old young happy tired quiet clever brave hungry friendly lonely".split(),
    "farmer doctor teacher sailor painter neighbour driver soldier singer baker".split(),
    "found bought carried painted lost borrowed opened cleaned broke sold".split(),
    "two three four five six seven eight nine ten eleven".split(),
    "green yellow heavy broken wooden empty tiny golden dusty narrow".split(),
    "apples boxes ladders windows bottles baskets letters chairs lamps bridges".split(),
)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    kept = Kept(arguments.json)
    cases = {
        f"start {start}, {method}, {seed}": (start, method, seed)
        for start in STARTS for seed in range(arguments.seeds) for method in METHODS
    }  # fmt: skip
    cases |= {f"start {start}": (start, "start", 0) for start in STARTS}
    for _ in missing(
        kept, cases, settings_of=settings_of, prepare=partial(prepare, arguments.root),
        runs_of=partial(runs_of, arguments.root), figures_of=figures_of, jobs=arguments.jobs,
    ):  # fmt: skip
        write(arguments, kept, cases)
    print(write(arguments, kept, cases))


def parse(argv: list[str]) -> argparse.Namespace:
    return options(__doc__, "asr", seeds="each method").parse_args(argv)


# Speech ---------------------------------------------------------------------------------------------------------------


def sentences(generator: Generator) -> Iterator[str]:
    """Sentences, no two alike."""
    seen = set()
    while True:
        sentence = " ".join(str(generator.choice(words)) for words in WORDS)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def speak(directory: Path) -> None:
    """Write train.jsonl and test.jsonl with their clips."""
    (directory / "audio").mkdir(parents=True, exist_ok=True)
    generator, speaker = default_rng(0), Speaker()
    said = sentences(generator)
    tested = [(part, voices) for part, voices in zip(PARTS, VOICES, strict=True) for _ in range(TEST)]
    trained = [("train", VOICES[0]) for _ in range(TRAIN)]
    for file, rows in (("train", trained), ("test", tested)):
        with (directory / f"{file}.jsonl").open("w", encoding="utf-8") as out:
            for number, (part, voices) in enumerate(rows):
                sentence, path = next(said), directory / "audio" / f"{file}-{number:04}.wav"
                rate, pitch = (int(generator.integers(*limits)) for limits in ((170, 210), (30, 70)))
                wave = speaker.speak(sentence, "en-us", str(generator.choice(voices)), rate=rate, pitch=pitch)
                soundfile.write(path, wave, SAMPLE_RATE, subtype="PCM_16")
                row = {"id": f"{file}-{number}", "audio_path": str(path.absolute()), "question_text": QUESTION}
                out.write(json.dumps(row | {"answer": sentence, "dataset_name": part}) + "\n")


# Cases ----------------------------------------------------------------------------------------------------------------


def prepare(root: Path, cases: Iterable[Case]) -> None:
    """Make the speech, the composed model, and the starts of these cases."""
    if not (root / "data" / "test.jsonl").exists():
        speak(root / "data")
    learnt = (f"data.train={root}/data/train.jsonl", "optim.prompts_per_step=16", "optim.micro_batch=8", *TEXT)
    projector = ("model.train=projector", "optim.steps=100", "optim.lr=1e-3")
    starts = [
        tuning(root / f"start-{steps}", root / "projector" / "model", *learnt, f"optim.steps={steps}")
        for steps in sorted({start for start, *_ in cases})
    ]
    do([tuning(root / "projector", compose(root), *learnt, *projector), *starts])


def settings_of(start: int, method: str, seed: int) -> list[Any]:
    """What a case is: one with other settings is done again."""
    return [start, method, seed, PROMPTS, STEPS, TRAIN, TEST]


def runs_of(root: Path, start: int, method: str, seed: int) -> list[Run]:
    """Training by a method, and the test."""
    begin, place = root / f"start-{start}" / "model", root / f"start-{start}-{method}-{seed}"
    words = [
        *TEXT, f"run.seed={seed}", f"data.train={root}/data/train.jsonl", f"optim.steps={STEPS}",
        f"optim.prompts_per_step={PROMPTS}", f"optim.micro_batch={PROMPTS}", "optim.lr=2e-5",
    ]  # fmt: skip
    trained = place / "trained"
    rewards = ("rollout.group_size=8", "reward.weights={wer: 1.0, hallucination: 1.0}", "loss.beta=0.1")
    of_method = {
        "start": [],
        "sft": [tuning(trained, begin, *words)],
        "grpo": [Run(trained, "train.py", ("compose_decoder", *common(trained, begin), *words, *rewards))],
    }
    model = begin if method == "start" else trained / "model"
    test = ("compose_decoder", *common(place / "tested", model), *TEXT, f"data.test={root}/data/test.jsonl")
    return [*of_method[method], Run(place / "tested", "evaluate.py", test)]


def figures_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The word error rate of each part of the test: edits of all sentences by their words; and the exact share."""
    rows = answered(runs[-1].directory)
    parts = {part: [row for row in rows if row["dataset_name"] == part] for part in PARTS}
    return {"wer": {part: word_error_rate(some) for part, some in parts.items()}} | {
        "exact": {part: sum(row["correct"] for row in some) / len(some) for part, some in parts.items()}
    }


def word_error_rate(rows: Sequence[dict[str, Any]]) -> float:
    pairs = [(spoken(row["answer"]).split(), spoken(row["prediction"]).split()) for row in rows]
    return sum(error_rate(said, heard) * len(said) for said, heard in pairs) / sum(len(said) for said, _ in pairs)


def write(arguments: argparse.Namespace, kept: Kept, cases: dict[str, tuple[int, str, int]]) -> str:
    """Write the table of the cases that are finished; returns it."""
    done: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for case, which in cases.items():
        if kept.has(case, settings_of(*which)):
            done.setdefault(which[:2], []).append(kept.figures(case))
    heading = ("", "seeds", *(f"WER, %, {part}" for part in PARTS), *(f"exact, %, {part}" for part in PARTS))
    labels = {"start": "start after {} steps", **{method: f"... then {method}" for method in METHODS}}
    shown = [(what, part) for what in ("wer", "exact") for part in PARTS]
    rows = [
        (label.format(start), str(len(seeds)), *(percent(one[what][part] for one in seeds) for what, part in shown))
        for start in STARTS for method, label in labels.items() if (seeds := done.get((start, method)))
    ]  # fmt: skip
    text = f"{sum(map(len, done.values()))} of {len(cases)} cases.\n\n{table(heading, rows)}"
    arguments.page.write_text(MARKERS.filled(arguments.page.read_text(), text))
    return text


if __name__ == "__main__":
    run(main)
