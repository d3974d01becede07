"""The sound questions of the demo: kind of event, number of sounds, change of loudness, second of several events."""

from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from numpy.random import Generator

from hark.data.mini import synthesis
from hark.data.mini.clips import SAMPLE_RATE, TRENDS, Skill, faded, loudest, sequence, trending

RECORDINGS = Path(__file__).parent / "recordings"
ANIMALS = (("cat", "cow", "dog", "duck", "frog", "sheep"), ("horse", "owl", "pig", "rooster"))  # training, test
CALL = 0.3  # seconds kept of an animal's call when calls are counted
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
STEADY = ("engine", "rain", "horn", "siren")  # events of almost constant loudness


def skills() -> list[Skill]:
    events = tuple(synthesis.EVENTS)
    return [
        Skill(
            task="sound",
            category="event",
            weight=2,
            seconds=(1.5, 2.0),
            questions=("What is making this sound?", "Which sound is heard?", "What do you hear in this clip?"),
            answers=events,
            clip=_event_clip,
        ),
        Skill(
            task="sound",
            category="count",
            weight=2,
            seconds=(2.0, 2.6),
            questions=("How many times is the sound heard?", "How often does the sound occur?"),
            answers=tuple(COUNTS),
            clip=_count_clip,
        ),
        Skill(
            task="sound",
            category="loudness",
            weight=2,
            seconds=(1.5, 2.2),
            questions=("How does the loudness of the sound change?", "What happens to the loudness?"),
            answers=tuple(TRENDS),
            clip=_loudness_clip,
        ),
        Skill(
            task="sound",
            category="sound order",
            weight=2,
            seconds=(2.2, 3.0),
            questions=("Which sound comes second?", "Which sound is heard second?", "What is the second sound?"),
            answers=events,
            clip=_order_clip,
        ),
    ]


@cache
def recording(animal: str) -> np.ndarray:
    wave, sample_rate = soundfile.read(RECORDINGS / f"{animal}.flac")
    if sample_rate != SAMPLE_RATE:
        raise ValueError(f"{animal}.flac has {sample_rate} Hz, expected {SAMPLE_RATE}")
    return wave


def _event(name: str, seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
    voice = synthesis.draw_voice(test, rng)
    wave = synthesis.EVENTS[name](seconds, synthesis.draw_timbre(voice, rng), rng)
    return faded(wave), f"{name}-{voice:02d}"


def _event_clip(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
    return _event(answer, seconds, test, rng)


def _count_clip(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
    if rng.uniform() < 0.5:
        animal = str(rng.choice(ANIMALS[test]))
        hits, source = [faded(loudest(recording(animal), CALL), 0.03)] * COUNTS[answer], f"recording-{animal}"
    else:
        name, voice = str(rng.choice(list(synthesis.HITS))), synthesis.draw_voice(test, rng)
        timbre = synthesis.draw_timbre(voice, rng)
        hits = [synthesis.HITS[name](timbre, rng) for _ in range(COUNTS[answer])]
        source = f"{name}-{voice:02d}"
    return sequence(hits, seconds, 0.12, rng), source


def _loudness_clip(
    answer: str, choices: list[str], seconds: float, test: bool, rng: Generator
) -> tuple[np.ndarray, str]:
    wave, source = _event(str(rng.choice(STEADY)), seconds, test, rng)
    return trending(wave, answer, rng), source


def _order_clip(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
    others = list(rng.permutation([choice for choice in choices if choice != answer]))
    names = [others[0], answer, others[1]][: rng.integers(2, 4)]
    room = (seconds - 0.1 * (len(names) + 1)) / len(names)
    events = [_event(name, room * rng.uniform(0.75, 0.95), test, rng) for name in names]
    return sequence([wave for wave, _ in events], seconds, 0.08, rng), "+".join(source for _, source in events)
