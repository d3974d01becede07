"""Decodes audio files to mono waveforms at the model's sample rate. A clip that cannot be used is an error."""

import functools
import math
from pathlib import Path

import numpy as np
import torch

from hark.data.clip import Clip
from hark.data.decoding import Samples, decode, rounded
from hark.data.errors import AudioError, SilentClipError
from hark.data.torchaudio_compat import torchaudio

SILENCE_PEAK = 1e-4  # of full scale: -80 dB, three steps of 16-bit audio
MAX_KERNEL = 2**24  # values of a resampling filter (64 MiB); rates without a small ratio would need gigabytes


def load_waveform(
    clip: str | Path | Clip, *, sample_rate: int, max_seconds: float, long_clips: str = "error"
) -> np.ndarray:
    """Decode a clip (wav, flac, ogg, mp3) to float32 (samples,) at `sample_rate`: the mean of all its channels.

    A window of a file is exactly that part of the file's resampled waveform. long_clips: what to do with a clip or a
    window longer than `max_seconds`: raise AudioError ("error"), return exactly its first `max_seconds` ("crop"), or
    raise SkippedClipError ("skip"). Missing, unreadable, empty, silent, cut off and non-finite audio, and a window that
    is not within its file, raise AudioError. Nothing before or after the needed part is decoded.
    """
    clip = clip if isinstance(clip, Clip) else Clip(Path(clip))
    samples = decode(clip, sample_rate, max_seconds, long_clips)
    return waveform_of(clip, samples, sample_rate)


def waveform_of(clip: Clip, samples: Samples, sample_rate: int) -> np.ndarray:
    """The waveform of a clip from its samples; AudioError if it is silent or cannot be resampled."""
    resampled = _resample(clip, samples.values, samples.rate, sample_rate)
    waveform = resampled[samples.first : samples.first + samples.count]
    peak = float(np.abs(waveform).max(initial=0.0))
    if peak < SILENCE_PEAK:
        raise SilentClipError(
            f"{clip}: is silent (peak {rounded(peak, SILENCE_PEAK, '.1e')}, mean of {samples.channels} channels); "
            f"expected a peak of at least {SILENCE_PEAK:.0e}; remove the example or replace the file"
        )
    return waveform


def _resample(clip: Clip, waveform: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    if rate == sample_rate:
        return waveform
    common = math.gcd(rate, sample_rate)
    if rate // common * (sample_rate // common) > MAX_KERNEL:
        raise AudioError(
            f"{clip}: is sampled at {rate} Hz, which has no small ratio to {sample_rate} Hz; "
            f"expected a usual rate; convert it, e.g. with ffmpeg -ar {sample_rate}"
        )
    with torch.inference_mode():
        return _resampler(rate, sample_rate)(torch.from_numpy(waveform)).numpy()


@functools.lru_cache(maxsize=8)
def _resampler(rate: int, sample_rate: int) -> torch.nn.Module:
    # Caches the filter of torchaudio.functional.resample, since building it takes longer than using it.
    return torchaudio.transforms.Resample(rate, sample_rate)
