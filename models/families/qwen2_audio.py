"""Qwen2-Audio: a Whisper-like audio tower, a linear projector and a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hark.models.audio_policy import AudioPolicy, audio_of
from hark.models.policy import Audio
from hark.models.whisper import CONV_REACH, audio_tokens, encode, whisper_mel

# Sizes of Qwen/Qwen2-Audio-7B-Instruct, as keys of its config.json: 8.4 billion parameters.
QWEN2_AUDIO_7B: dict[str, Any] = {
    "model_type": "qwen2_audio",
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 128,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 8192,
        "vocab_size": 156032,
    },
    "audio_token_index": 151646,
}


class Qwen2AudioPolicy(AudioPolicy):
    """Any `Qwen2AudioForConditionalGeneration` checkpoint, from the one that `models/mini.py` builds to the 7B."""

    def __init__(self, model: Any, path: Path):
        super().__init__(model, path)
        frame = self.extractor.hop_length / self.sample_rate
        fewest = next(frames for frames in count(1) if audio_tokens(frames))
        self.shortest = (fewest - 1) * frame + 1 / self.sample_rate
        self.longest = 2 * model.config.audio_config.max_source_positions * frame

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import Qwen2AudioForConditionalGeneration

        return Qwen2AudioForConditionalGeneration(config)

    def listen(self, waveform: np.ndarray) -> Audio:
        frames = -(-len(waveform) // self.extractor.hop_length)
        return audio_of(whisper_mel(self.extractor, waveform, after=CONV_REACH), frames, audio_tokens(frames))

    def audio_tokens(self, frames: int) -> int:
        return audio_tokens(frames)

    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        mels, frames = [clip.features for clip in clips], [clip.frames for clip in clips]
        return encode(self.tower, mels, frames, self.device)
