"""Notes of sampled instruments: tinysoundfont renders TimGM6mb.sf2, a SoundFont that pretty_midi contains."""

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hark.data.mini.clips import SAMPLE_RATE, samples

FONT = "TimGM6mb.sf2"

# family: (General MIDI programs for training, programs of the test split). All sound like an instrument of the family,
# and each program of the test split has a similar one for training.
FAMILIES = {
    "piano": ((0, 1), (3,)),
    "organ": ((16, 18, 19), (17,)),
    "bells": ((9, 14, 98, 112), (8,)),
    "strings": ((40, 42, 44, 48, 49), (50, 110)),
    "brass": ((56, 58, 59, 61), (57,)),
    "flute": ((72, 74, 75, 77), (79,)),
}


@lru_cache(maxsize=1)
def player() -> tuple[Any, int]:
    """The synthesizer and the id of the loaded font; ImportError if either package is missing."""
    import tinysoundfont

    found = importlib.util.find_spec("pretty_midi")
    font = Path(found.origin).parent / FONT if found and found.origin else None
    if font is None or not font.exists():
        raise ImportError(f"pretty_midi is not installed or has no {FONT}", name="pretty_midi")
    synth = tinysoundfont.Synth(samplerate=SAMPLE_RATE)
    return synth, synth.sfload(str(font))


def check() -> None:
    """Raise ImportError, with the package as its `name`, if a package is missing."""
    player()


def play(program: int, notes: list[tuple[float, float, int]], seconds: float) -> np.ndarray:
    """A clip of `seconds` with the notes (start and duration in seconds, MIDI pitch) played by one program."""
    synth, font = player()
    synth.program_select(0, font, 0, program)
    events = [(samples(start), 1, pitch) for start, _, pitch in notes]
    events += [(samples(start + duration), 0, pitch) for start, duration, pitch in notes]
    parts, now = [np.zeros(0, np.float32)], 0
    for moment, on, pitch in sorted(event for event in events if event[0] < samples(seconds)):
        parts.append(_rendered(synth, moment - now))
        now = moment
        synth.noteon(0, pitch, 100) if on else synth.noteoff(0, pitch)
    parts.append(_rendered(synth, samples(seconds) - now))
    synth.sounds_off()
    _rendered(synth, SAMPLE_RATE // 4)  # lets all notes end, so that the next clip does not depend on this one
    return np.concatenate(parts).astype(np.float64)


def _rendered(synth: Any, length: int) -> np.ndarray:
    """The next `length` samples, the mean of both channels."""
    if length == 0:
        return np.zeros(0, np.float32)
    return np.frombuffer(synth.generate(length), np.float32).reshape(-1, 2).mean(axis=1)
