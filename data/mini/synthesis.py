"""Sounds computed with numpy alone: everyday events, hits, vowels and simple instruments.

Every sound has VOICES voices. Voice v draws its main timbre parameter (a pitch, a rate, a size) from the v-th of VOICES
equal parts of the range, so that two voices never have the same value; HELD_OUT are the voices of the test split.
Waveforms are float arrays at clips.SAMPLE_RATE; `timbre` is 0 to 1 over the range, `seconds` is the duration.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from hark.data.mini.clips import SAMPLE_RATE, decibels, faded, placed, samples

VOICES = 12
HELD_OUT = (2, 5, 6, 9)
HIGHEST = 7_500.0  # Hz of the highest harmonic: below half the sample rate, so that there is no aliasing


def draw_voice(test: bool, rng: Generator) -> int:
    return int(rng.choice([voice for voice in range(VOICES) if (voice in HELD_OUT) == test]))


def draw_timbre(voice: int, rng: Generator) -> float:
    return (voice + rng.uniform(0.05, 0.95)) / VOICES


def _log_range(low: float, high: float, timbre: float) -> float:
    """The value between low (timbre 0) and high (timbre 1) on a logarithmic scale."""
    return low * (high / low) ** timbre


def _time(seconds: float) -> np.ndarray:
    return np.arange(samples(seconds)) / SAMPLE_RATE


def _tone(frequency: np.ndarray | float, length: int) -> np.ndarray:
    """A sine of `frequency` Hz, constant or one value per sample."""
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(frequency, length)) / SAMPLE_RATE)


def _pulses(frequency: np.ndarray | float, length: int) -> np.ndarray:
    """A band-limited pulse train of `frequency` Hz: the sum of all harmonics up to HIGHEST, by Dirichlet's kernel."""
    frequency = np.broadcast_to(frequency, length)
    count = max(int(HIGHEST / frequency.max()), 1)
    half = np.pi * np.cumsum(frequency) / SAMPLE_RATE + 1e-4
    sine = np.sin(half)
    sine = np.where(np.abs(sine) < 1e-6, 1e-6, sine)
    return np.sin(count * half) * np.cos((count + 1) * half) / sine / count


def _shaped(wave: np.ndarray, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The waveform filtered with zero phase by `gain`, a function from Hz to amplitude."""
    spectrum = np.fft.rfft(wave)
    return np.fft.irfft(spectrum * gain(np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)), len(wave))


def _band_noise(length: int, centre: float, width: float, rng: Generator) -> np.ndarray:
    """Noise around `centre` Hz, `width` octaves to either side; standard deviation 1."""
    noise = rng.standard_normal(length)
    noise = _shaped(noise, lambda hertz: np.exp(-0.5 * (np.log2(np.maximum(hertz, 1) / centre) / width) ** 2))
    return noise / noise.std()


def _wander(length: int, rate: float, rng: Generator) -> np.ndarray:
    """A random curve between -1 and 1, linear between about `rate` random values per second."""
    knots = rng.uniform(-1, 1, max(int(length / SAMPLE_RATE * rate), 1) + 2)
    return np.interp(np.linspace(0, len(knots) - 1, length), np.arange(len(knots)), knots)


# Events


def siren(seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    length = samples(seconds)
    turns = max(rng.uniform(0.8, 2.0) * seconds, 1.0)
    sweep = np.sin(2 * np.pi * (turns * np.arange(length) / length + rng.uniform()))
    frequency = _log_range(450, 1100, timbre) * 2 ** (rng.uniform(0.3, 0.5) * sweep)
    return _tone(frequency, length) + rng.uniform(0.2, 0.4) * _tone(2 * frequency, length)


def bell(seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    pitch, rate = _log_range(350, 1300, timbre), rng.uniform(1.5, 4.0)
    time = _time(seconds)
    strike = np.zeros_like(time)
    for ratio in (0.5, 1.0, 1.19, 1.5, 2.0, 2.74, 3.76):
        if pitch * ratio < HIGHEST:
            level = rng.uniform(0.3, 1) / ratio * np.exp(-rate * ratio * time)
            strike += level * np.sin(2 * np.pi * pitch * ratio * time)
    starts = np.arange(0, seconds - 0.1, rng.uniform(0.6, 1.2))
    return placed([strike] * len(starts), list(starts), seconds)


def rain(seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    length = samples(seconds)
    hiss = _band_noise(length, _log_range(2500, 6000, timbre), 0.9, rng)
    drops = np.where(rng.uniform(size=length) < rng.uniform(60, 160) / SAMPLE_RATE, rng.exponential(6.0, length), 0)
    tail = np.exp(-np.arange(64) / 12) * np.cos(np.arange(64) * 2 * np.pi * 0.2)
    return hiss + np.convolve(drops, tail)[:length]


def knocking(seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    spacing = rng.uniform(0.16, 0.26)
    knocks = enumerate(np.arange(0.02, seconds - 0.1, spacing))
    starts = [start for index, start in knocks if seconds < 1 or index % 5 < 4]
    resonance = _log_range(160, 480, timbre)
    return placed([_thud(resonance, rng) for _ in starts], starts, seconds)


def _thud(resonance: float, rng: Generator) -> np.ndarray:
    time = _time(0.12)
    noise = _band_noise(len(time), resonance * 2, 0.5, rng)
    body = np.sin(2 * np.pi * resonance * time) + 0.4 * noise
    return rng.uniform(0.75, 1) * faded(body * np.exp(-time / 0.025), 0.001)


def engine(seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    length = samples(seconds)
    rate = _log_range(28, 75, timbre) * (1 + 0.12 * _wander(length, 2, rng))
    pulses = _pulses(rate, length)
    corner = rng.uniform(300, 600)
    exhaust = _shaped(pulses, lambda hertz: 1 / (1 + (hertz / corner) ** 2))
    return exhaust / exhaust.std() + 0.15 * _band_noise(length, 300, 1.0, rng)


def bird(seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    chirps = np.cumsum(rng.uniform(0.1, 0.3, int(seconds / 0.1)))
    starts = [0.02, *chirps[chirps < seconds - 0.1]]
    return placed([_chirp(_log_range(2300, 4800, timbre), rng) for _ in starts], starts, seconds)


def _chirp(pitch: float, rng: Generator) -> np.ndarray:
    length = samples(rng.uniform(0.05, 0.12))
    sweep = rng.choice([-1, 1]) * rng.uniform(0.2, 0.45) * np.linspace(-1, 1, length)
    return rng.uniform(0.6, 1) * np.hanning(length) * _tone(pitch * 2**sweep, length)


def alarm(seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    length, beep = samples(seconds), rng.uniform(0.08, 0.16)
    tone = _tone(_log_range(1200, 3200, timbre), length)
    beeping = (_time(seconds) + rng.uniform(0, beep)) % (2 * beep) < beep
    envelope = np.convolve(beeping, np.ones(64) / 64, mode="same")
    return np.tanh(3 * tone) * envelope


def wind(seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    length = samples(seconds)
    gusts = 1 + 0.5 * _wander(length, 2, rng)
    return gusts * _band_noise(length, _log_range(220, 800, timbre), 0.45, rng)


def clock(seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    spacing = rng.uniform(0.2, 0.4)
    starts = np.arange(rng.uniform(0.02, 0.1), seconds - 0.05, spacing)
    pitch, time = _log_range(2600, 5500, timbre), _time(0.03)
    ticks = []
    for index in range(len(starts)):
        ring = np.sin(2 * np.pi * pitch * (0.85 if index % 2 else 1) * time)
        ticks.append(np.exp(-time / 0.004) * (ring + 0.3 * rng.standard_normal(len(time))))
    return placed(ticks, list(starts), seconds)


def horn(seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    length, pitch = samples(seconds), _log_range(260, 520, timbre)
    chord = _pulses(pitch, length) + _pulses(pitch * rng.uniform(1.2, 1.3), length)
    corner = rng.uniform(1500, 2500)
    return _shaped(chord, lambda hertz: 1 / (1 + (hertz / corner) ** 2))


EVENTS = {
    "siren": siren,
    "bell": bell,
    "rain": rain,
    "knocking": knocking,
    "engine": engine,
    "bird": bird,
    "alarm": alarm,
    "wind": wind,
    "clock": clock,
    "horn": horn,
}


# Single hits, for counting


def drum(timbre: float, rng: Generator) -> np.ndarray:
    time = _time(rng.uniform(0.14, 0.22))
    pitch = _log_range(70, 260, timbre) * (1 + 1.5 * np.exp(-time / 0.02))
    return faded(_tone(pitch, len(time)) * np.exp(-time / 0.06), 0.004)


def clap(timbre: float, rng: Generator) -> np.ndarray:
    time = _time(rng.uniform(0.1, 0.16))
    return faded(_band_noise(len(time), _log_range(700, 3500, timbre), 0.5, rng) * np.exp(-time / 0.025), 0.002)


def beep(timbre: float, rng: Generator) -> np.ndarray:
    length = samples(rng.uniform(0.1, 0.2))
    return faded(_tone(_log_range(400, 2500, timbre), length), 0.015)


HITS = {"drum": drum, "clap": clap, "beep": beep}


# Vowels

FORMANTS = {  # Hz, of men, after Peterson and Barney (1952)
    "ah": (730, 1090, 2440),
    "eh": (530, 1840, 2480),
    "ee": (270, 2290, 3010),
    "oh": (490, 850, 2410),
    "oo": (300, 690, 2240),
}


def vowel(name: str, seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    """A sung vowel; timbre 0 is a low voice with low formants, 1 a high voice with high formants."""
    length, scale = samples(seconds), _log_range(0.92, 1.25, timbre)
    glide = 2 ** (rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, length) + 0.02 * _wander(length, 6, rng))
    voice = _pulses(_log_range(95, 230, timbre) * rng.uniform(0.9, 1.1) * glide, length)
    formants = [scale * formant * rng.uniform(0.96, 1.04) for formant in FORMANTS[name]]

    def tract(hertz: np.ndarray) -> np.ndarray:
        peaks = [1 / (1 + ((hertz - centre) / 70) ** 2) for centre in formants]
        return (peaks[0] + 0.6 * peaks[1] + 0.3 * peaks[2] + 0.002) / (1 + (hertz / 1500) ** 2) ** 0.25

    return faded(_shaped(voice, tract) + 1e-5 * rng.standard_normal(length), 0.04)


# Instruments, used if no SoundFont is installed

# name: (partials' frequency ratios, their fall-off exponent, decay per second, attack in seconds, vibrato, breath)
INSTRUMENTS = {
    "organ": ((1, 2, 3, 4, 6, 8), 0.5, 0.0, 0.01, 0.0, 0.0),
    "bells": ((0.5, 1, 1.19, 1.5, 2, 2.74, 3.76), 0.8, 4.0, 0.002, 0.0, 0.0),
    "guitar": (tuple(range(1, 13)), 1.0, 3.0, 0.004, 0.0, 0.0),
    "flute": ((1, 2, 3), 2.0, 0.0, 0.05, 0.004, 0.02),
    "brass": (tuple(range(1, 15)), 0.3, 0.0, 0.03, 0.0, 0.0),
    "strings": (tuple(range(1, 15)), 1.0, 0.0, 0.08, 0.008, 0.01),
}


def instrument(name: str, pitch: float, seconds: float, timbre: float, rng: Generator) -> np.ndarray:
    """One note of MIDI pitch `pitch`; `timbre` runs from dark to bright."""
    ratios, fall, decay, attack, vibrato, breath = INSTRUMENTS[name]
    time, frequency = _time(seconds), 440 * 2 ** ((pitch - 69) / 12)
    phase = 2 * np.pi * frequency * (time + vibrato / 30 * np.sin(2 * np.pi * 5.5 * time + rng.uniform(0, 6)))
    note = np.zeros_like(time)
    for ratio in ratios:
        if frequency * ratio < HIGHEST:
            level = ratio ** -(fall * (1.3 - 0.6 * timbre))
            note += level * np.exp(-decay * ratio**0.7 * time) * np.sin(ratio * phase)
    note += breath * _band_noise(len(time), 2 * frequency, 1.0, rng)
    note *= 1 - np.exp(-time / (attack / 3))
    return decibels(rng.uniform(-3, 0)) * faded(note, 0.02)
