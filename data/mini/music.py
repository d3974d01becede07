"""The music questions of the demo: instrument, direction of the melody, number of notes, highest note, loudness."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from hark.data.mini import soundfont, synthesis
from hark.data.mini.clips import TRENDS, ClipFunction, Skill, onsets, placed, trending

Notes = list[tuple[float, float, int]]  # start in seconds, duration in seconds, MIDI pitch
SLOW = ("strings",)  # families whose notes start too softly to be counted
HELD = ("organ", "strings", "brass")  # families whose notes keep their loudness
PITCHES = (64, 88)  # MIDI, E4 to E6: high enough that neighbouring notes are in different mel bands
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
PLACES = {"first": 0, "second": 1, "third": 2, "fourth": 3}
SHAPES = {  # the direction of each of four steps
    "rising": (1, 1, 1, 1),
    "falling": (-1, -1, -1, -1),
    "rising then falling": (1, 1, -1, -1),
    "falling then rising": (-1, -1, 1, 1),
}


@dataclass(frozen=True)
class Orchestra:
    """Renders notes: the families of instruments, and functions that choose a player and play notes."""

    families: tuple[str, ...]
    draw: Callable[[str, bool, Generator], int]  # (family, test, rng) -> a player
    play: Callable[[str, int, Notes, float, Generator], np.ndarray]  # (family, player, notes, seconds, rng)


def sampled_orchestra() -> Orchestra:
    """Instruments of a SoundFont; a player is a General MIDI program. ImportError if a package is missing."""
    soundfont.check()
    return Orchestra(
        families=tuple(soundfont.FAMILIES),
        draw=lambda family, test, rng: int(rng.choice(soundfont.FAMILIES[family][test])),
        play=lambda family, program, notes, seconds, rng: soundfont.play(program, notes, seconds),
    )


def computed_orchestra() -> Orchestra:
    """Instruments computed with numpy; a player is a voice of `synthesis`."""

    def play(family: str, voice: int, notes: Notes, seconds: float, rng: Generator) -> np.ndarray:
        timbre = synthesis.draw_timbre(voice, rng)
        waves = [synthesis.instrument(family, pitch, duration, timbre, rng) for _, duration, pitch in notes]
        return placed(waves, [start for start, _, _ in notes], seconds)

    return Orchestra(
        families=tuple(synthesis.INSTRUMENTS),
        draw=lambda family, test, rng: synthesis.draw_voice(test, rng),
        play=play,
    )


def skills(orchestra: Orchestra) -> list[Skill]:
    return [
        Skill(
            task="music",
            category="instrument",
            weight=1.5,
            seconds=(1.5, 2.0),
            questions=("Which instrument is playing?", "What instrument do you hear?", "Which instrument is heard?"),
            answers=orchestra.families,
            clip=_clip(orchestra, orchestra.families, _phrase),
        ),
        Skill(
            task="music",
            category="melody",
            weight=1.5,
            seconds=(1.6, 2.4),
            questions=("How does the melody move?", "Which way does the melody go?"),
            answers=tuple(SHAPES),
            clip=_clip(orchestra, _clear(orchestra), _melody),
        ),
        Skill(
            task="music",
            category="notes",
            weight=2,
            seconds=(1.8, 2.4),
            questions=("How many notes are played?", "How many notes do you hear?"),
            answers=tuple(NUMBERS),
            clip=_clip(orchestra, _clear(orchestra), _number),
        ),
        Skill(
            task="music",
            category="highest note",
            weight=1,
            seconds=(1.6, 2.4),
            questions=("Which of the four notes is the highest?", "Which note is the highest?"),
            answers=tuple(PLACES),
            clip=_clip(orchestra, _clear(orchestra), _peak),
        ),
        Skill(
            task="music",
            category="dynamics",
            weight=2,
            seconds=(1.5, 2.2),
            questions=("How does the loudness of the music change?", "Does the music get louder or quieter?"),
            answers=tuple(TRENDS),
            clip=_dynamics(orchestra),
        ),
    ]


def _clear(orchestra: Orchestra) -> tuple[str, ...]:
    return tuple(family for family in orchestra.families if family not in SLOW)


def _clip(
    orchestra: Orchestra, families: tuple[str, ...], compose: Callable[[str, float, Generator], Notes]
) -> ClipFunction:
    """The clip function of a skill: `compose` makes the notes; the answer, or a random one of `families`, plays."""

    def clip(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
        family = answer if answer in families else str(rng.choice(families))
        player = orchestra.draw(family, test, rng)
        notes = compose(answer, seconds, rng)
        return orchestra.play(family, player, notes, seconds, rng), f"{family}-{player:03d}"

    return clip


def _dynamics(orchestra: Orchestra) -> ClipFunction:
    """The clip function of the loudness skill; its notes keep their loudness, so that only the trend changes it."""
    steady = _clip(orchestra, HELD, _held)

    def clip(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
        wave, source = steady("", choices, seconds, test, rng)
        return trending(wave, answer, rng), source

    return clip


def _held(answer: str, seconds: float, rng: Generator) -> Notes:
    low = int(rng.integers(PITCHES[0], PITCHES[1] - 12))
    return [(0.0, seconds, low + step) for step in (0, int(rng.integers(3, 8)))]


def _timed(pitches: list[int], seconds: float, rng: Generator) -> Notes:
    """The pitches one after another at random distances; each lasts for most of the time to the next."""
    starts = onsets([0.2] * len(pitches), seconds - 0.1, 0.04, rng)
    ends = [*starts[1:], min(starts[-1] + 0.5, seconds - 0.1)]
    share = rng.uniform(0.7, 0.9)
    return [(a, min(share * (b - a), 0.6), pitch) for a, b, pitch in zip(starts, ends, pitches, strict=True)]


def _phrase(answer: str, seconds: float, rng: Generator) -> Notes:
    return _timed([int(pitch) for pitch in rng.integers(*PITCHES, rng.integers(2, 4))], seconds, rng)


def _melody(answer: str, seconds: float, rng: Generator) -> Notes:
    steps = np.array(SHAPES[answer]) * rng.integers(3, 6, size=4)  # semitones
    line = np.concatenate([[0], np.cumsum(steps)])
    base = rng.integers(PITCHES[0] - line.min(), PITCHES[1] - line.max() + 1)
    return _timed([int(base + pitch) for pitch in line], seconds, rng)


def _number(answer: str, seconds: float, rng: Generator) -> Notes:
    pitches = [int(rng.integers(*PITCHES))]
    while len(pitches) < NUMBERS[answer]:
        pitch = int(rng.integers(*PITCHES))
        if abs(pitch - pitches[-1]) >= 2:  # two equal notes of an organ would sound like one long note
            pitches.append(pitch)
    return _timed(pitches, seconds, rng)


def _peak(answer: str, seconds: float, rng: Generator) -> Notes:
    low = int(rng.integers(PITCHES[0], PITCHES[0] + 8))
    pitches = [low + int(step) for step in rng.integers(0, 8, size=4)]
    pitches[PLACES[answer]] = max(pitches) + int(rng.integers(4, 7))
    return _timed(pitches, seconds, rng)
