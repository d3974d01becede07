"""Audio towers like Whisper's encoder: two convolutions, positions, layers, and an average of every two outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hark.data.features import log_mel

CONV_REACH = 2  # mel frames after the end of a clip that the two convolutions read

Count = TypeVar("Count", int, torch.Tensor)  # of one clip, or of several


def positions(frames: Count) -> Count:
    """The positions in the layers, 50 per second, of a clip of `frames` mel frames, 100 per second."""
    return (frames - 1) // 2 + 1


def audio_tokens(frames: Count) -> Count:
    """The outputs, 25 per second, of a clip of `frames` mel frames."""
    return (positions(frames) - 2) // 2 + 1


def whisper_mel(extractor: Any, waveform: np.ndarray, *, after: int = 0, most: int | None = None) -> torch.Tensor:
    """The log-mel (M, F) of a clip, equal to what WhisperFeatureExtractor makes of it, with `after` frames of padding.

    most: samples that clips are padded to, by default the extractor's `n_samples`. Frames of the padding that are not
    returned are not computed.
    """
    most = extractor.n_samples if most is None else most
    padded = np.pad(waveform, (0, min(after * extractor.hop_length, most - len(waveform))))
    return log_mel(
        padded,
        n_mels=extractor.feature_size,
        n_fft=extractor.n_fft,
        hop=extractor.hop_length,
        sample_rate=extractor.sampling_rate,
        padded_samples=most,
    )


def encode(tower: Any, mels: Sequence[torch.Tensor], frames: Sequence[int], device: torch.device) -> torch.Tensor:
    """Run a tower on clips as one batch: (outputs of all clips, width).

    mels: (M, F) each, F being the clip's frames and up to CONV_REACH frames of padding after them.

    The tower's own forward in transformers takes clips padded to 30 s, and masks the padding in its layers. So the
    clip's frames and the two after them, which the convolutions read, give the same values.
    """
    lengths = torch.tensor(frames, device=device)
    hidden = nn.utils.rnn.pad_sequence([mel.T for mel in mels], batch_first=True)
    hidden = hidden.transpose(1, 2).to(device, tower.conv1.weight.dtype)
    hidden = F.gelu(tower.conv2(F.gelu(tower.conv1(hidden)))).transpose(1, 2)  # (N, S, D), 50 per second
    hidden = hidden[:, : positions(max(frames))]
    hidden = hidden + tower.embed_positions.weight[: hidden.shape[1]]
    position = torch.arange(hidden.shape[1], device=device)
    mask = None
    if len(set(frames)) > 1:
        # Additive and made once: each layer would convert a boolean mask, and save an (N, 1, S, S) copy.
        padding = (position >= positions(lengths)[:, None])[:, None, None]  # (N, 1, 1, S)
        mask = torch.zeros(padding.shape, dtype=hidden.dtype, device=device).masked_fill(padding, -torch.inf)
        mask = mask.expand(-1, -1, len(position), -1)
    for layer in tower.layers:
        hidden = layer(hidden, mask)
    hidden = tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))  # 25 per second
    return hidden[position[: hidden.shape[1]] < audio_tokens(lengths)[:, None]]
