"""Log-mel spectrograms for Whisper's audio towers, computed without the padding to 30 s."""

import functools
import math

import numpy as np
import torch

PADDED_SAMPLES = 480_000  # 30 s at 16 kHz, to which WhisperFeatureExtractor pads with zeros
MAX_FREQUENCY = 8000.0  # Hz, upper edge of the last mel band
FLOOR = 1e-10  # smaller powers are set to this value
DYNAMIC_RANGE = 8.0  # decades; values more than this below the maximum are set to maximum - DYNAMIC_RANGE


def log_mel(
    waveform: np.ndarray | torch.Tensor,
    *,
    n_mels: int,
    n_fft: int = 400,
    hop: int = 160,
    sample_rate: int = 16_000,
    padded_samples: int = PADDED_SAMPLES,
) -> torch.Tensor:
    """Log-mel of a waveform (samples,): (n_mels, frames), float32, frames = ceil(samples / hop).

    Equal, up to float32 rounding, to the first frames of transformers' WhisperFeatureExtractor for the clip padded with
    zeros to `padded_samples`, but the zeros are not computed. The later frames of that output are constant, except for
    those whose window still reaches a sample. ValueError if empty, not one channel, or too long.
    """
    waveform = torch.as_tensor(waveform, dtype=torch.float32)
    if waveform.dim() != 1 or not 0 < len(waveform) <= padded_samples:
        shape = tuple(waveform.shape)
        raise ValueError(f"waveform of shape {shape}; expected one channel of 1 to {padded_samples} samples")
    # A frame that contains a real sample reaches at most one window into the padding. With less padding than that, stft
    # reflects the signal at its end, as it does in the full computation.
    zeros = min(n_fft, padded_samples - len(waveform))
    padded = torch.nn.functional.pad(waveform, (0, zeros))
    spectrum = torch.stft(padded, n_fft, hop, window=_window(n_fft), return_complex=True)
    power = spectrum[:, : padded_samples // hop].abs() ** 2  # (n_fft // 2 + 1, frames with a sample)
    log = (mel_filters(n_mels, n_fft, sample_rate) @ power).clamp(min=FLOOR).log10()
    # The maximum is over all frames that contain a sample, also those after the last one that is returned.
    log = torch.maximum(log, log.max() - DYNAMIC_RANGE)
    frames = -(-len(waveform) // hop)
    return ((log[:, :frames] + 4.0) / 4.0).contiguous()  # (n_mels, frames)


@functools.lru_cache(maxsize=8)
def _window(n_fft: int) -> torch.Tensor:
    return torch.hann_window(n_fft)


@functools.lru_cache(maxsize=8)
def mel_filters(n_mels: int, n_fft: int, sample_rate: int) -> torch.Tensor:
    """Triangles of equal area on Slaney's mel scale: linear below 1 kHz, logarithmic above.

    Computed in float64 as in transformers. torchaudio's melscale_fbanks uses float32: with 128 mels some weights are
    close to 0 and lose three digits there (2e-5 in the log-mel).
    """
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(MAX_FREQUENCY), n_mels + 2))
    bins = np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(min=0.0)
    return torch.from_numpy(triangles * 2.0 / (high - low)).float()  # (n_mels, n_fft // 2 + 1)


def _hz_to_mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))
