"""Decodes audio files to mono waveforms at the model's sample rate. A clip that cannot be used is an error."""

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from hark.data.cut_off import shortfall
from hark.data.errors import AudioError, CutClipError, MissingClipError, SilentClipError, SkippedClipError
from hark.data.torchaudio_compat import torchaudio

SILENCE_PEAK = 1e-4  # of full scale: -80 dB, three steps of 16-bit audio
CROP_MARGIN = 0.05  # seconds decoded beyond a crop, since the resampling filter also reads samples after the cut
MAX_KERNEL = 2**24  # values of a resampling filter (64 MiB); rates without a small ratio would need gigabytes
UNKNOWN_FRAMES = 2**62  # libsndfile reports this many frames or more where it does not know the length
LONG_CLIPS = ("error", "crop", "skip")


@dataclass(frozen=True)
class Header:
    """The header of a file; its values may be wrong."""

    sample_rate: int
    channels: int
    seconds: float | None  # None where the header has no length


def load_waveform(path: str | Path, *, sample_rate: int, max_seconds: float, long_clips: str = "error") -> np.ndarray:
    """Decode a clip (wav, flac, ogg, mp3) to float32 (samples,) at `sample_rate`: the mean of all its channels.

    long_clips: what to do with a clip longer than `max_seconds`: raise AudioError ("error"), return exactly the first
    `max_seconds` of its resampled waveform ("crop"), or raise SkippedClipError ("skip"). Missing, unreadable, empty,
    silent, cut off and non-finite audio raises AudioError. Of a long clip only the first `max_seconds` are decoded.
    """
    _check_long_clips(long_clips)
    with _opened(path) as file:
        rate = file.samplerate
        samples = _decode(file, max_seconds + CROP_MARGIN)
        if len(samples) > _frames(max_seconds, rate) and long_clips != "crop":
            raise _too_long(path, file, max_seconds, long_clips)
    waveform = samples.mean(axis=1)  # (samples,)
    if len(waveform) == 0:
        raise _no_samples(path)
    if not np.isfinite(waveform).all():
        raise AudioError(f"{path}: holds values that are not finite; expected samples in -1 to 1; encode it again")
    waveform = _resample(path, waveform, rate, sample_rate)[: _frames(max_seconds, sample_rate)]
    peak = float(np.abs(waveform).max())
    if peak < SILENCE_PEAK:
        raise SilentClipError(
            f"{path}: is silent (peak {_rounded(peak, SILENCE_PEAK, '.1e')}, mean of {samples.shape[1]} channels); "
            f"expected a peak of at least {SILENCE_PEAK:.0e}; remove the example or replace the file"
        )
    return waveform


def read_header(path: str | Path) -> Header:
    """The header of a file; AudioError if it cannot be opened."""
    with _opened(path) as file:
        seconds = file.frames / file.samplerate if file.frames < UNKNOWN_FRAMES else None
        return Header(file.samplerate, file.channels, seconds)


@contextmanager
def _opened(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """The opened file. Every error of the decoder, also in later reads of the file, is raised as an AudioError."""
    if not os.path.exists(path):
        raise MissingClipError(f"{path}: no such file; expected a clip there; check audio_path and audio_root")
    if not os.path.isfile(path):
        raise AudioError(f"{path}: is a directory or no regular file; expected a clip; check audio_path and audio_root")
    if not os.access(path, os.R_OK):
        raise AudioError(f"{path}: may not be read by this user; expected a clip; change its permissions")
    if os.path.getsize(path) == 0:
        raise AudioError(f"{path}: is empty (0 bytes); expected a clip; copy it again")
    if missing := shortfall(path):
        raise _cut_off(path, missing)
    try:
        with soundfile.SoundFile(path) as file:
            yield file
    # soundfile raises TypeError for headerless formats, which it recognises by the suffix.
    except (soundfile.SoundFileError, TypeError) as error:
        raise AudioError(
            f"{path}: cannot be decoded{_detail(error)}; expected wav, flac, ogg or mp3; "
            "copy it again if it is cut off, else convert it, e.g. with ffmpeg"
        ) from error


def _decode(file: soundfile.SoundFile, seconds: float) -> np.ndarray:
    """At most the first `seconds` of the file: float32 (samples, channels).

    Reads into an allocated array: soundfile would otherwise allocate the header's length, which may be wrong.
    """
    samples = np.empty((_frames(seconds, file.samplerate), file.channels), dtype=np.float32)
    try:
        return file.read(out=samples)
    except soundfile.SoundFileError as error:
        if file.format != "FLAC":
            raise
        # The decoder fails in the same way where the file ends and where it is damaged.
        raise _cut_off(file.name, "decoding fails before the end that its header promises") from error


def _cut_off(path: str | Path, missing: str) -> CutClipError:
    return CutClipError(f"{path}: is cut off ({missing}); expected the whole clip; copy or encode it again")


def _detail(error: Exception) -> str:
    """The decoder's words in parentheses, if it has any."""
    words = str(error).strip()
    return f" ({words})" if words else ""


def _frames(seconds: float, rate: int) -> int:
    return round(seconds * rate)


def _no_samples(path: str | Path) -> AudioError:
    return AudioError(f"{path}: holds no samples; expected sound; remove the example or replace the file")


def _too_long(path: str | Path, file: soundfile.SoundFile, max_seconds: float, long_clips: str) -> AudioError:
    seconds = file.frames / file.samplerate
    # The header may be wrong: less than was decoded, or libsndfile's largest integer for a length it does not know.
    known = max_seconds < seconds and file.frames < UNKNOWN_FRAMES
    length = f"{_rounded(seconds, max_seconds, '.2f')} s long" if known else "too long"
    kind = SkippedClipError if long_clips == "skip" else AudioError
    return kind(
        f"{path}: is {length}; expected at most {max_seconds:.15g} s; "
        "raise max_seconds if the model can take it, or set long_clips to crop or skip"
    )


def _rounded(value: float, limit: float, style: str) -> str:
    """A value in a format such as ".2f", with more digits if it would otherwise be rounded to the limit or past it."""
    texts = (f"{value:.{digits}{style[-1]}}" for digits in range(int(style[1:-1]), 18))
    same_side = (text for text in texts if float(text) != limit and (float(text) > limit) == (value > limit))
    return next(same_side, repr(value))


def _check_long_clips(long_clips: str) -> None:
    if long_clips not in LONG_CLIPS:
        raise ValueError(f"long_clips is {long_clips!r}; expected one of {', '.join(LONG_CLIPS)}")


def _resample(path: str | Path, waveform: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    if rate == sample_rate:
        return waveform
    common = math.gcd(rate, sample_rate)
    if rate // common * (sample_rate // common) > MAX_KERNEL:
        raise AudioError(
            f"{path}: is sampled at {rate} Hz, which has no small ratio to {sample_rate} Hz; "
            f"expected a usual rate; convert it, e.g. with ffmpeg -ar {sample_rate}"
        )
    with torch.inference_mode():
        return _resampler(rate, sample_rate)(torch.from_numpy(waveform)).numpy()


@functools.lru_cache(maxsize=8)
def _resampler(rate: int, sample_rate: int) -> torch.nn.Module:
    # Caches the filter of torchaudio.functional.resample, since building it takes longer than using it.
    return torchaudio.transforms.Resample(rate, sample_rate)
