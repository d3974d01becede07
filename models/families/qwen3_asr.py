"""Qwen3-ASR: the audio tower of Qwen3-Omni, an MLP and a Qwen3 decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hark.models.audio_policy import AudioPolicy, audio_of
from hark.models.families.qwen3_omni_moe import tokens_by_chunks
from hark.models.policy import Audio


class Qwen3ASRPolicy(AudioPolicy):
    """A `Qwen3ASRForConditionalGeneration` checkpoint."""

    longest = 1200.0

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import Qwen3ASRForConditionalGeneration

        return Qwen3ASRForConditionalGeneration(config)

    def listen(self, waveform: np.ndarray) -> Audio:
        made = self.extractor(
            waveform,
            sampling_rate=self.sample_rate,
            padding=True,
            return_attention_mask=True,
            n_window=self.tower.config.n_window,
            return_tensors="pt",
        )
        frames = int(made["attention_mask"].sum())
        return audio_of(made["input_features"][0].contiguous(), frames, self.audio_tokens(frames))

    def audio_tokens(self, frames: int) -> int:
        return tokens_by_chunks(frames, 2 * self.tower.config.n_window)

    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        most = max(clip.features.shape[1] for clip in clips)
        mels = torch.stack([F.pad(clip.features, (0, most - clip.features.shape[1])) for clip in clips])
        frames = torch.tensor([clip.frames for clip in clips])
        mask = (torch.arange(most) < frames[:, None]).long().to(self.device)
        mels = mels.to(self.device, self.tower.conv2d1.weight.dtype)
        return self.tower(input_features=mels, input_features_mask=mask).last_hidden_state
