"""Gemma 4: a conformer with chunked attention, a linear projector, and a decoder with inputs for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hark.data.chat import Chat
from hark.models.audio_policy import AudioHalf, AudioPolicy, audio_of
from hark.models.policy import Audio


class Gemma4Policy(AudioPolicy):
    """A `Gemma4ForConditionalGeneration` checkpoint with an audio tower; its vision tower is not loaded."""

    untouched = r"(model\.)?(vision_tower|embed_vision)\."
    projector_names = ("model.embed_audio",)

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import Gemma4ForConditionalGeneration

        model = Gemma4ForConditionalGeneration(config)
        model.model.vision_tower = model.model.embed_vision = None
        return model

    def load_processor(self, path: Path) -> Any:
        return AudioHalf.load(path)

    def native_inputs(self, chat: Chat, *waveforms: np.ndarray) -> dict[str, torch.Tensor]:
        made = self.extractor(list(waveforms), return_tensors="pt")
        return {
            "input_ids": self.prepare(chat, *waveforms).ids[None],
            "input_features": made["input_features"],
            "input_features_mask": made["input_features_mask"].bool(),
        }

    def listen(self, waveform: np.ndarray) -> Audio:
        made = self.extractor([waveform], return_tensors="pt")
        frames = int(made["input_features_mask"].sum())
        return audio_of(made["input_features"][0].contiguous(), frames, self.audio_tokens(frames))

    def audio_tokens(self, frames: int) -> int:
        return -(-frames // 4)  # two convolutions of stride 2, which round up

    def placeholders(self, clip: Audio) -> list[int]:
        config = self.model.config
        return [config.boa_token_id, *super().placeholders(clip), config.eoa_token_index]

    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        """One by one: the chunks of a shorter clip in a batch would attend to padding."""
        dtype, rows = self.tower.output_proj.weight.dtype, []
        for clip in clips:
            mask = torch.arange(len(clip.features), device=self.device) < clip.frames
            hidden = self.tower(clip.features[None].to(self.device, dtype), mask[None]).last_hidden_state
            rows.append(hidden[0, : clip.tokens])
        return torch.cat(rows)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.model.embed_audio(inputs_embeds=hidden)
