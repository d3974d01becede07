"""Qwen2.5-Omni, the thinker: an audio tower with windows of 2 s, and a Qwen2.5 decoder with three-part positions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hark.data.chat import Chat
from hark.models.audio_policy import AudioHalf, AudioPolicy, audio_of
from hark.models.policy import Audio
from hark.models.whisper import audio_tokens, positions, whisper_mel


class Qwen2_5OmniPolicy(AudioPolicy):
    """A `Qwen2_5OmniThinkerForConditionalGeneration` checkpoint, alone or inside that of the whole Omni model.

    The vision tower, the talker and the vocoder are neither loaded nor trained; an export copies them. In a prompt of
    text and audio the three parts of a position are equal, so the decoder gets plain positions.
    """

    untouched = r"(thinker\.)?(model\.)?visual\.|talker\.|token2wav\."
    projector_names: tuple[str, ...] = ("model.audio_tower.proj",)

    def __init__(self, model: Any, path: Path):
        super().__init__(model, path)
        frame = self.extractor.hop_length / self.sample_rate
        self.shortest = 2 * frame + 1 / self.sample_rate  # three frames make the first embedding
        self.longest = self.extractor.n_samples / self.sample_rate

    def load_processor(self, path: Path) -> Any:
        return AudioHalf.load(path)

    def native_inputs(self, chat: Chat, *waveforms: np.ndarray) -> dict[str, torch.Tensor]:
        made = self.extractor(
            list(waveforms), sampling_rate=self.sample_rate, return_attention_mask=True, return_tensors="pt"
        )
        return {
            "input_ids": self.prepare(chat, *waveforms).ids[None],
            "input_features": made["input_features"],
            "feature_attention_mask": made["attention_mask"],
        }

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration

        model = Qwen2_5OmniThinkerForConditionalGeneration(getattr(config, "thinker_config", config))
        del model.model.visual
        return model

    def listen(self, waveform: np.ndarray) -> Audio:
        mel = whisper_mel(self.extractor, waveform)
        return audio_of(mel, mel.shape[1], self.audio_tokens(mel.shape[1]))

    def audio_tokens(self, frames: int) -> int:
        return audio_tokens(frames)

    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        mels = torch.cat([clip.features for clip in clips], dim=1).to(self.device)  # one after the other, no padding
        frames = torch.tensor([clip.frames for clip in clips], device=self.device)
        return self.tower(mels, feature_lens=frames, aftercnn_lens=positions(frames)).last_hidden_state

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden  # the projector is the last layer of the tower
