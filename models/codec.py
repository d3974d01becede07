"""A small vector-quantised codec of speech: a waveform as a sequence of codes, for policies that write codec tokens.

A code is the nearest of K centres to a stretch of `frames` frames of the log-mel spectrogram, 40 ms for the defaults.
The centres are found by k-means, which takes about a second for two minutes of speech. Griffin and Lim's algorithm
(IEEE TASSP 32, 1984) makes a waveform of the spectrogram of the centres.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hark.data.errors import DataError
from hark.data.features import mel_filters
from hark.data.torchaudio_compat import torchaudio
from hark.models.directory import check_directory, in_short, read_json
from hark.models.policy import PolicyError

FLOOR = 1e-5  # smaller magnitudes of the mel spectrogram are set to this value
LARGEST = 40.0  # of a log magnitude: float32 holds its exponential squared
SETTINGS, WEIGHTS = "codec.json", "codec.safetensors"
MOST = {  # of the settings of a saved codec
    "sample_rate": 384_000, "n_fft": 1 << 16, "hop": 1 << 16, "frames": 1024, "mels": 1024, "codes": 1 << 20,
    "iterations": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Of the spectrogram and the codes: n_fft and hop in samples, frames in hops per code, mels in bands."""

    sample_rate: int = 16_000  # Hz
    n_fft: int = 512
    hop: int = 160
    frames: int = 4
    mels: int = 64
    codes: int = 512
    iterations: int = 32  # of Griffin-Lim


class Codec:
    """Centres (K, frames * mels) of log-mel magnitudes, and the two directions: `encode` and `decode`."""

    def __init__(self, settings: Settings, centres: torch.Tensor):
        self.settings, self.centres = settings, centres

    @property
    def seconds(self) -> float:
        """The duration of one code."""
        return self.settings.frames * self.settings.hop / self.settings.sample_rate

    def encode(self, waveform: torch.Tensor) -> list[int]:
        """The codes of a waveform (samples,) at the codec's sample rate: one per started `seconds`."""
        return torch.cdist(stretches(waveform, self.settings), self.centres).argmin(dim=1).tolist()

    def decode(self, codes: Sequence[int]) -> torch.Tensor:
        """The waveform (samples,) of codes, `seconds` for each; the same codes give the same samples."""
        if not codes:
            return torch.zeros(0)
        spectrogram = self.centres[list(codes)].unflatten(1, (self.settings.frames, -1)).flatten(0, 1)  # (F, mels)
        return to_waveform(spectrogram, self.settings)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"centres": self.centres.contiguous()}, directory / WEIGHTS)
        (directory / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=2) + "\n", encoding="utf-8")


def load_codec(directory: str | Path) -> Codec:
    """The codec that `Codec.save` wrote. DataError if there is none."""
    path = Path(directory)
    try:
        check_directory(path)
        settings = Settings(**read_json(path / SETTINGS))
        _check(settings)
        return Codec(settings, _centres(load_file(path / WEIGHTS)["centres"], settings))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, PolicyError) as error:
        reason = f"no codec ({in_short(error)})"
        raise DataError(f"{path}: {reason}; expected {SETTINGS} and {WEIGHTS} of `train_codec`") from error


def _check(settings: Settings) -> None:
    """ValueError for settings that make no sense; a codec may come from anywhere."""
    for name, value in asdict(settings).items():
        if type(value) is not int or not 0 < value <= MOST[name]:
            raise ValueError(f"{name} is {in_short(value)}; expected an integer from 1 to {MOST[name]}")
    if settings.hop > settings.n_fft or settings.mels > settings.n_fft // 2 + 1:
        raise ValueError("n_fft is smaller than hop, or than two samples for each of the mels")


def _centres(stored: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The centres; ValueError for a tensor that holds no centres of these settings."""
    shape = (settings.codes, settings.frames * settings.mels)
    if stored.dtype != torch.float32 or tuple(stored.shape) != shape or not stored.isfinite().all():
        found = f"{stored.dtype} of the shape {tuple(stored.shape)}"
        raise ValueError(f"the centres are {found}; expected finite torch.float32 of the shape {shape}")
    return stored.clamp(max=LARGEST)


def train_codec(
    waveforms: Sequence[torch.Tensor], settings: Settings = Settings(), *, steps: int = 20, seed: int = 0
) -> Codec:
    """A codec whose centres are those of k-means on the waveforms (samples,), after `steps` of Lloyd's iterations.

    They start from stretches drawn at random; a centre that is nearest to none is drawn again. DataError if there are
    fewer stretches than codes.
    """
    points = torch.cat([stretches(waveform, settings) for waveform in waveforms])  # (n, frames * mels)
    if len(points) < settings.codes:
        raise DataError(
            f"{len(points) * settings.frames * settings.hop / settings.sample_rate:.1f} s of speech give {len(points)} "
            f"stretches for {settings.codes} codes; expected at least as many: use more speech or fewer codes"
        )
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[: settings.codes]]
    for _ in range(steps):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=settings.codes)[:, None]
        means = torch.zeros_like(centres).index_add_(0, nearest, points) / counts.clamp(min=1)
        drawn = points[torch.randint(len(points), (settings.codes,), generator=generator)]
        centres = torch.where(counts > 0, means, drawn)
    return Codec(settings, centres)


def stretches(waveform: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Log-mel magnitudes (n, frames * mels) of a waveform (samples,), padded with zeros to whole stretches."""
    waveform = torch.as_tensor(waveform, dtype=torch.float32)
    length = settings.frames * settings.hop
    whole = -(-len(waveform) // length)
    padded = torch.nn.functional.pad(waveform, (0, whole * length - len(waveform) + settings.n_fft))
    window = torch.hann_window(settings.n_fft)
    spectrum = torch.stft(padded, settings.n_fft, settings.hop, window=window, return_complex=True)
    magnitudes = spectrum[:, : whole * settings.frames].abs()  # (n_fft // 2 + 1, frames of the clip)
    mel = mel_filters(settings.mels, settings.n_fft, settings.sample_rate) @ magnitudes
    return mel.clamp(min=FLOOR).log().T.reshape(whole, -1)


def to_waveform(log_mel: torch.Tensor, settings: Settings) -> torch.Tensor:
    """A waveform (F * hop,) of log-mel magnitudes (F, mels), by the pseudo-inverse of the filters and Griffin-Lim."""
    filters = mel_filters(settings.mels, settings.n_fft, settings.sample_rate)
    magnitudes = (torch.linalg.pinv(filters) @ log_mel.exp().T).clamp(min=0)  # (n_fft // 2 + 1, F)
    length = log_mel.shape[0] * settings.hop
    ended = torch.nn.functional.pad(magnitudes, (0, 1))  # a frame more: F hops lie between F + 1 frames
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the phases that the iterations start from
        return torchaudio.functional.griffinlim(
            ended, torch.hann_window(settings.n_fft), settings.n_fft, settings.hop, settings.n_fft, 1.0,
            settings.iterations, 0.99, length, True,
        )  # fmt: skip
