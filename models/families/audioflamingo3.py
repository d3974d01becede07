"""Audio Flamingo 3 and Music Flamingo: a Whisper-like tower over windows of 30 s, an MLP and a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hark.models.audio_policy import AudioPolicy, audio_of
from hark.models.policy import Audio
from hark.models.whisper import CONV_REACH, audio_tokens, encode, whisper_mel


class AudioFlamingo3Policy(AudioPolicy):
    """An `AudioFlamingo3ForConditionalGeneration` checkpoint."""

    def __init__(self, model: Any, path: Path):
        super().__init__(model, path)
        self.shortest = 2 * self.extractor.hop_length / self.sample_rate + 1 / self.sample_rate
        self.longest = float(self.processor.max_audio_len)

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import AudioFlamingo3ForConditionalGeneration

        return AudioFlamingo3ForConditionalGeneration(config)

    @property
    def window(self) -> int:
        """Mel frames of a window."""
        return 2 * self.tower.config.max_source_positions

    def listen(self, waveform: np.ndarray) -> Audio:
        hop = self.extractor.hop_length
        frames, size = -(-len(waveform) // hop), self.window * hop
        windows = [waveform[first : first + size] for first in range(0, len(waveform), size)]
        mel = torch.cat([whisper_mel(self.extractor, window, after=CONV_REACH) for window in windows], dim=1)
        return audio_of(mel.contiguous(), frames, self.audio_tokens(frames))

    def audio_tokens(self, frames: int) -> int:
        return audio_tokens(frames)

    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        mels = [mel for clip in clips for mel in clip.features.split(self.window, dim=1)]
        frames = [size for clip in clips for size in self.window_frames(clip)]
        return encode(self.tower, mels, frames, self.device)

    def window_frames(self, clip: Audio) -> list[int]:
        """The mel frames of a clip in each window: all are full but the last."""
        return [min(clip.frames - first, self.window) for first in range(0, clip.frames, self.window)]


class MusicFlamingoPolicy(AudioFlamingo3Policy):
    """A `MusicFlamingoForConditionalGeneration` checkpoint: the tower's outputs are rotated by their times."""

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import MusicFlamingoForConditionalGeneration

        return MusicFlamingoForConditionalGeneration(config)

    def placeholders(self, clip: Audio) -> list[int]:
        processor = self.processor
        return [processor.audio_bos_token_id, *super().placeholders(clip), processor.audio_eos_token_id]

    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        from transformers.models.musicflamingo.modeling_musicflamingo import apply_rotary_time_emb

        most = audio_tokens(self.window)  # outputs of a full window
        seconds = 4 * self.model.config.audio_frame_step * torch.arange(most, device=self.device)
        turns = []
        for clip in clips:
            for index, frames in enumerate(self.window_frames(clip)):
                times = seconds + index * most * 4 * self.model.config.audio_frame_step
                turns.append([part[0, : audio_tokens(frames)] for part in self.model.model.pos_emb(times[None], most)])
        cos, sin = (torch.cat(parts) for parts in zip(*turns, strict=True))
        return apply_rotary_time_emb(super().encode(clips), cos, sin)
