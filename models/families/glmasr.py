"""GLM-ASR: an encoder with rotary positions over windows of 30 s, an MLP and a Llama decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hark.models.audio_policy import AudioPolicy, audio_of
from hark.models.policy import Audio
from hark.models.whisper import positions, whisper_mel

MERGED = 4  # positions of the tower that one embedding is made of


class GlmAsrPolicy(AudioPolicy):
    """A `GlmAsrForConditionalGeneration` checkpoint. Its tower attends to padding, so windows are always full."""

    def __init__(self, model: Any, path: Path):
        super().__init__(model, path)
        self.shortest = 6 * self.extractor.hop_length / self.sample_rate + 1 / self.sample_rate  # of one embedding
        self.longest = float(self.processor.max_audio_len)

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import GlmAsrForConditionalGeneration

        return GlmAsrForConditionalGeneration(config)

    def listen(self, waveform: np.ndarray) -> Audio:
        size, hop = self.extractor.n_samples, self.extractor.hop_length
        windows = [waveform[first : first + size] for first in range(0, len(waveform), size)]
        mel = torch.cat([whisper_mel(self.extractor, window, after=size // hop) for window in windows], dim=1)
        frames = -(-len(waveform) // hop)
        return audio_of(mel.contiguous(), frames, self.audio_tokens(frames))

    def audio_tokens(self, frames: int) -> int:
        return positions(frames) // MERGED

    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        size = self.extractor.n_samples // self.extractor.hop_length
        windows = torch.stack([window for clip in clips for window in clip.features.split(size, dim=1)])
        hidden = self.tower(windows.to(self.device, self.tower.conv1.weight.dtype)).last_hidden_state
        merged = hidden.reshape(len(windows), -1, self.tower.config.intermediate_size)
        frames = [min(clip.frames - first, size) for clip in clips for first in range(0, clip.frames, size)]
        return torch.cat([row[: self.audio_tokens(count)] for row, count in zip(merged, frames, strict=True)])
