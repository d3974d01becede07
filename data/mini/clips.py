"""`Skill`, which describes one kind of question, and functions that arrange sounds into clips.

A waveform is a float array of samples at SAMPLE_RATE.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

SAMPLE_RATE = 16_000  # Hz
FADE = 0.01  # seconds; prevents an audible click at a cut
PEAK = 0.9  # of full scale, before the random gain
GAIN = (-6.0, 0.0)  # dB
# Changes of loudness: (time as a share of the clip, level in dB) of each corner of the envelope.
TRENDS = {
    "gets louder": ((0, -24), (1, 0)),
    "gets quieter": ((0, 0), (1, -24)),
    "stays the same": ((0, 0), (1, 0)),
    "gets louder then quieter": ((0, -24), (0.5, 0), (1, -24)),
}
NOISE = (-60.0, -45.0)  # dB of full scale, RMS of the background noise

ClipFunction = Callable[[str, list[str], float, bool, Generator], tuple[np.ndarray, str]]


@dataclass(frozen=True)
class Skill:
    """One kind of question: its wordings, its possible answers, and a function that makes a clip for an answer."""

    task: str  # sound, music or speech
    category: str
    weight: float  # share among the skills of its task
    seconds: tuple[float, float]  # range of the clips' duration
    questions: tuple[str, ...]  # wordings, one is drawn per set
    answers: tuple[str, ...]  # four are drawn per set
    # (answer, choices, seconds, test, rng) -> (waveform, source); `test`: use a source of the test split.
    clip: ClipFunction


def samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)


def trending(wave: np.ndarray, trend: str, rng: Generator) -> np.ndarray:
    """The waveform times the envelope of a trend; the time of its corner and its depth are random."""
    shares, levels = np.array(TRENDS[trend], dtype=float).T
    if len(shares) == 3:
        shares[1] = rng.uniform(0.35, 0.65)
    envelope = np.interp(np.linspace(0, 1, len(wave)), shares, levels * rng.uniform(0.8, 1.2))
    return wave * decibels(envelope)


def decibels(level: float) -> float:
    """The amplitude factor of a level in dB."""
    return 10 ** (level / 20)


def normalised(wave: np.ndarray) -> np.ndarray:
    return wave / max(np.abs(wave).max(), 1e-9)


def faded(wave: np.ndarray, fade: float = FADE) -> np.ndarray:
    """The waveform with `fade` seconds of raised cosine at either end."""
    length = min(samples(fade), len(wave) // 2)
    ramp = 0.5 - 0.5 * np.cos(np.pi * np.arange(length) / max(length, 1))
    wave = wave.copy()
    wave[:length] *= ramp
    wave[len(wave) - length :] *= ramp[::-1]
    return wave


def trimmed(wave: np.ndarray, level: float = -40.0) -> np.ndarray:
    """The waveform without its quiet ends, which are below `level` dB relative to its peak."""
    loud = np.flatnonzero(np.abs(wave) > np.abs(wave).max() * decibels(level))
    return wave[loud[0] : loud[-1] + 1] if len(loud) else wave


def loudest(wave: np.ndarray, seconds: float) -> np.ndarray:
    """The window of at most `seconds` that holds the most energy."""
    length = samples(seconds)
    if len(wave) <= length:
        return wave
    energy = np.cumsum(np.concatenate([[0.0], wave**2]))
    start = int(np.argmax(energy[length:] - energy[:-length]))
    return wave[start : start + length]


def resampled(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """The waveform resampled from `sample_rate` Hz to SAMPLE_RATE by cutting its spectrum; its ends must be silent."""
    length = round(len(wave) * SAMPLE_RATE / sample_rate)
    spectrum = np.fft.rfft(wave)[: length // 2 + 1]
    return np.fft.irfft(spectrum, length) * (length / len(wave))


def placed(waves: list[np.ndarray], starts: list[float], seconds: float) -> np.ndarray:
    """A clip of `seconds` with the waveforms added at their start times (seconds); what is beyond the end is cut."""
    clip = np.zeros(samples(seconds))
    for wave, start in zip(waves, starts, strict=True):
        begin = samples(start)
        part = wave[: max(len(clip) - begin, 0)]
        clip[begin : begin + len(part)] += part if len(part) == len(wave) else faded(part)
    return clip


def onsets(lengths: list[float], seconds: float, gap: float, rng: Generator) -> list[float]:
    """Random start times (seconds) in a clip of `seconds` for sounds of `lengths`, in order and at least `gap` apart.

    The remaining time is split at random, so neither the first onset nor the spacing reveals the number of sounds.
    """
    spare = seconds - sum(lengths) - gap * (len(lengths) + 1)
    if spare < 0:
        raise ValueError(f"{len(lengths)} sounds of {sum(lengths):.2f} s with gaps of {gap} s exceed {seconds:.2f} s")
    pauses = gap + spare * rng.dirichlet(np.ones(len(lengths) + 1))
    ends = np.cumsum(pauses[:-1] + np.array(lengths))
    return list(ends - np.array(lengths))


def sequence(waves: list[np.ndarray], seconds: float, gap: float, rng: Generator) -> np.ndarray:
    """A clip of `seconds` with the waveforms one after another at random distances, all with the same peak."""
    starts = onsets([len(wave) / SAMPLE_RATE for wave in waves], seconds, gap, rng)
    return placed([normalised(wave) for wave in waves], starts, seconds)


def finished(wave: np.ndarray, rng: Generator) -> np.ndarray:
    """The clip as it is written, int16: faded, normalised, with a random gain and a little background noise."""
    gain, noise = decibels(rng.uniform(*GAIN)), decibels(rng.uniform(*NOISE))
    clip = PEAK * gain * normalised(faded(wave)) + noise * rng.standard_normal(len(wave))
    return np.round(np.clip(clip, -1, 1) * 32767).astype(np.int16)
