"""Decodes audio files to samples at their own rate. It imports no torch, so a process that decodes starts at once."""

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from hark.data.clip import Cell, Clip
from hark.data.cut_off import shortfall
from hark.data.errors import AudioError, CutClipError, MissingClipError, SkippedClipError

CROP_MARGIN = 0.05  # seconds decoded beyond a crop, since the resampling filter also reads samples after the cut
UNKNOWN_FRAMES = 2**62  # libsndfile reports this many frames or more where it does not know the length
WINDOW_SLACK = 0.05  # seconds by which a window may end after its clip, since ends are often rounded up
BLOCK = 2**20  # values decoded at a time, of all channels
FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "MPEG")  # as libsndfile names them
MAX_CHANNELS = 64
RATES = (1_000, 768_000)  # Hz; outside of it, a header is wrong
MAX_PEAK = 16.0  # of full scale, +24 dB: float files may exceed full scale, and integers kept as floats exceed this
LONG_CLIPS = ("error", "crop", "skip")


@dataclass(frozen=True)
class Header:
    """The header of a file; its values may be wrong."""

    sample_rate: int
    channels: int
    seconds: float | None  # None where the header has no length


@dataclass(frozen=True)
class Samples:
    """The mean of a clip's channels at the rate of its file, with a little before and after the part that is meant.

    Of the resampled values, that part is `count` from number `first` on.
    """

    values: np.ndarray  # (samples,) float32
    rate: int
    channels: int
    first: int
    count: int


Attempt = tuple[Header | None, Samples | AudioError]


def decode(clip: Clip, sample_rate: int, max_seconds: float, long_clips: str = "error") -> Samples:
    """The samples of a clip (wav, flac, ogg, mp3) that its waveform at `sample_rate` needs.

    long_clips: what to do with a clip or a window longer than `max_seconds`: raise AudioError ("error"), decode its
    first `max_seconds` ("crop"), or raise SkippedClipError ("skip"). Missing, unreadable, empty, cut off and non-finite
    audio, and a window that is not within its file, raise AudioError.
    """
    _check_long_clips(long_clips)
    with _opened(clip.source) as file:
        rate = file.samplerate
        begin = _seek(clip, file, sample_rate)
        lead = _frames(clip.start, rate) - begin  # frames that are decoded before the window
        seconds = max_seconds if clip.seconds is None else min(clip.seconds, max_seconds)
        values = _decode(clip, file, lead + _frames(seconds + CROP_MARGIN, rate))
        too_long = clip.seconds > max_seconds if clip.seconds else len(values) - lead > _frames(max_seconds, rate)
        if too_long and long_clips != "crop":
            raise _too_long(clip, file, max_seconds, long_clips)
        _check_window(clip, file, found=begin + len(values), expected=seconds)
        channels = file.channels
    if len(values) == 0:
        raise _no_samples(clip)
    first = _frames(clip.start, sample_rate) - begin * sample_rate // rate
    return Samples(values, rate, channels, first, _frames(seconds, sample_rate))


def read_header(clip: Clip) -> Header:
    """The header of a file; AudioError if it cannot be opened."""
    with _opened(clip.source) as file:
        seconds = file.frames / file.samplerate if file.frames < UNKNOWN_FRAMES else None
        return Header(file.samplerate, file.channels, seconds)


def attempt(clip: Clip, *rest: Any) -> Attempt:
    """The header of a clip's file, None if there is none, and what `decode` returns or raises."""
    header = None
    try:
        header = read_header(clip)
        return header, decode(clip, *rest)
    except AudioError as error:
        return header, error


def seconds_of(clip: Clip, header: Header) -> float | None:
    """The length of a clip or of its window by a header, which may be wrong; None where the header has no length."""
    ends = [end for end in (clip.end, header.seconds) if end is not None]
    return max(min(ends) - clip.start, 0.0) if ends else None


def _seek(clip: Clip, file: soundfile.SoundFile, sample_rate: int) -> int:
    """Go to the frame at which decoding begins, a little before the window, and return it.

    At this frame the resampled waveform has a sample, so that the window has the samples of the whole file's.
    """
    step = file.samplerate // math.gcd(file.samplerate, sample_rate)
    begin = max(_frames(clip.start, file.samplerate) - _frames(CROP_MARGIN, file.samplerate), 0) // step * step
    if begin:
        _check_window(clip, file, found=file.frames)
        _skip(file, begin)
    return begin


def _skip(file: soundfile.SoundFile, frames: int) -> None:
    """Go to a frame. In ogg files, libsndfile's seek is wrong near the end, so these are decoded up to the frame."""
    if file.format != "OGG":
        file.seek(frames)
        return
    block = _block(file)
    while frames > 0:
        file.read(out=block[:frames])
        frames -= len(block)


def _block(file: soundfile.SoundFile) -> np.ndarray:
    return np.empty((BLOCK // file.channels, file.channels), dtype=np.float32)


def _check_window(clip: Clip, file: soundfile.SoundFile, *, found: int, expected: float = 0.0) -> None:
    """AudioError if the file, of which `found` frames are there, ends before `expected` seconds of a window."""
    seconds = found / file.samplerate
    outside = seconds <= clip.start or clip.end is not None and seconds < clip.start + expected - WINDOW_SLACK
    if outside and clip.is_window:
        raise AudioError(f"{clip}: is not within the clip, which is {seconds:.2f} s long; correct start and end")


@contextmanager
def _opened(source: Path | Cell) -> Iterator[soundfile.SoundFile]:
    """The opened file. Every error of the decoder, also in later reads of the file, is raised as an AudioError."""
    if isinstance(source, Path):
        _check_file(source)
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.read()) as content:
        if missing := shortfall(content):
            raise _cut_off(source, missing)
        content.seek(0)
        try:
            # From its path, since libsndfile recognises some formats by the suffix alone.
            with soundfile.SoundFile(source if isinstance(source, Path) else content) as file:
                _check_header(source, file)
                yield file
        # soundfile raises TypeError for headerless formats, which it recognises by the suffix.
        except (soundfile.SoundFileError, TypeError) as error:
            raise AudioError(
                f"{source}: cannot be decoded{_detail(error)}; expected wav, flac, ogg or mp3; "
                "copy it again if it is cut off, else convert it, e.g. with ffmpeg"
            ) from error


def _check_header(source: Path | Cell, file: soundfile.SoundFile) -> None:
    """AudioError for what no clip has, before anything is decoded: it would cost memory and time without a bound."""
    if file.format not in FORMATS:
        raise AudioError(f"{source}: is in the format {file.format}; expected wav, flac, ogg or mp3; convert it")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise AudioError(f"{source}: has {file.channels} channels; expected at most {MAX_CHANNELS}; encode it again")
    if not RATES[0] <= file.samplerate <= RATES[1]:
        expected = f"expected {RATES[0]} to {RATES[1]} Hz; encode it again"
        raise AudioError(f"{source}: has a sample rate of {file.samplerate} Hz; {expected}")


def _check_file(path: Path) -> None:
    """AudioError if a path names nothing that can be read."""
    if not os.path.exists(path):
        raise MissingClipError(f"{path}: no such file; expected a clip there; check audio_path and audio_root")
    if not os.path.isfile(path):
        raise AudioError(f"{path}: is a directory or no regular file; expected a clip; check audio_path and audio_root")
    if not os.access(path, os.R_OK):
        raise AudioError(f"{path}: may not be read by this user; expected a clip; change its permissions")
    if os.path.getsize(path) == 0:
        raise AudioError(f"{path}: is empty (0 bytes); expected a clip; copy it again")


def _decode(clip: Clip, file: soundfile.SoundFile, frames: int) -> np.ndarray:
    """The mean of the channels of at most the next `frames` of the file: float32 (samples,).

    Reads into a block: memory grows with what is there, not with the header's length, which may be wrong.
    """
    block, means, left = _block(file), [np.empty(0, dtype=np.float32)], frames
    try:
        while left > 0 and len(samples := file.read(out=block[:left])):
            _check_samples(clip, samples)
            means.append(samples.mean(axis=1))
            left -= len(samples)
        return np.concatenate(means)
    except soundfile.SoundFileError as error:
        if file.format != "FLAC":
            raise
        # The decoder fails in the same way where the file ends and where it is damaged.
        raise _cut_off(clip.source, "decoding fails before the end that its header promises") from error


def _check_samples(clip: Clip, samples: np.ndarray) -> None:
    peak = float(np.abs(samples).max())
    if not math.isfinite(peak):
        raise AudioError(f"{clip}: holds values that are not finite; expected samples in -1 to 1; encode it again")
    if peak > MAX_PEAK:
        raise AudioError(
            f"{clip}: has a peak of {peak:.3g}; expected samples in -1 to 1, and {MAX_PEAK:.0f} at most; "
            "divide integers by their full scale, and encode it again"
        )


def _cut_off(source: Path | Cell, missing: str) -> CutClipError:
    return CutClipError(f"{source}: is cut off ({missing}); expected the whole clip; copy or encode it again")


def _detail(error: Exception) -> str:
    """The decoder's words in parentheses, if it has any."""
    words = str(error).strip()
    return f" ({words})" if words else ""


def _frames(seconds: float, rate: int) -> int:
    return round(seconds * rate)


def _no_samples(clip: Clip) -> AudioError:
    return AudioError(f"{clip}: holds no samples; expected sound; remove the example or replace the file")


def _too_long(clip: Clip, file: soundfile.SoundFile, max_seconds: float, long_clips: str) -> AudioError:
    seconds = clip.seconds or file.frames / file.samplerate - clip.start
    # The header may be wrong: less than was decoded, or libsndfile's largest integer for a length it does not know.
    known = max_seconds < seconds and (clip.seconds is not None or file.frames < UNKNOWN_FRAMES)
    length = f"{rounded(seconds, max_seconds, '.2f')} s long" if known else "too long"
    kind = SkippedClipError if long_clips == "skip" else AudioError
    return kind(
        f"{clip}: is {length}; expected at most {max_seconds:.15g} s; "
        "raise max_seconds if the model can take it, or set long_clips to crop or skip"
    )


def rounded(value: float, limit: float, style: str) -> str:
    """A value in a format such as ".2f", with more digits if it would otherwise be rounded to the limit or past it."""
    texts = (f"{value:.{digits}{style[-1]}}" for digits in range(int(style[1:-1]), 18))
    same_side = (text for text in texts if float(text) != limit and (float(text) > limit) == (value > limit))
    return next(same_side, repr(value))


def _check_long_clips(long_clips: str) -> None:
    if long_clips not in LONG_CLIPS:
        raise ValueError(f"long_clips is {long_clips!r}; expected one of {', '.join(LONG_CLIPS)}")
