"""Granite Speech: a conformer, a query transformer as the projector, and a Granite decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hark.data.chat import Chat, messages
from hark.models.audio_policy import AudioPolicy, audio_of
from hark.models.policy import Audio


class GraniteSpeechPolicy(AudioPolicy):
    """A `GraniteSpeechForConditionalGeneration` checkpoint.

    Its conformer reads padding, so clips are encoded one by one. Logits are divided by the decoder's `logits_scaling`,
    as in the text-only Granite; transformers 5.24 leaves that out.
    """

    tower_name = "model.encoder"
    projector_names = ("model.projector",)
    longest = 30 * 60.0

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import GraniteSpeechForConditionalGeneration

        return GraniteSpeechForConditionalGeneration(config)

    @property
    def extractor(self) -> Any:
        return self.processor.audio_processor

    def text(self, turns: list[dict]) -> str:
        """The chat template takes text only, with the placeholder in it."""
        return self.processor.apply_chat_template(
            [turn | {"content": self._flat(turn["content"])} for turn in turns],
            add_generation_prompt=True,
            tokenize=False,
        )

    def _flat(self, content: str | list[dict]) -> str:
        if isinstance(content, str):
            return content
        return "".join(part["text"] if part["type"] == "text" else self.processor.audio_token for part in content)

    def native_inputs(self, chat: Chat, *waveforms: np.ndarray) -> dict[str, torch.Tensor]:
        text = self.text(messages(chat, len(waveforms)))
        made = self.processor(
            text=[text], audio=[torch.from_numpy(waveform) for waveform in waveforms], return_tensors="pt"
        )
        return {name: made[name] for name in ("input_ids", "input_features", "input_features_mask")}

    def native_logits(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().native_logits(model, inputs) / model.config.text_config.logits_scaling

    def listen(self, waveform: np.ndarray) -> Audio:
        features = self.extractor(torch.from_numpy(waveform)[None])["input_features"][0]  # (F / 2, 2 M)
        frames = 2 * len(features)
        return audio_of(features.contiguous(), frames, self.audio_tokens(frames))

    def audio_tokens(self, frames: int) -> int:
        config = self.model.config
        return -(-(frames // 2) // config.window_size) * (config.window_size // config.downsample_rate)

    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        """Each clip's outputs are padded to whole windows of the projector, as it does itself."""
        window, dtype = self.model.config.window_size, self.tower.input_linear.weight.dtype
        hidden = [self.tower(clip.features[None].to(self.device, dtype)).last_hidden_state[0] for clip in clips]
        return torch.cat([F.pad(rows, (0, 0, 0, -len(rows) % window)) for rows in hidden])

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.model.projector(hidden[None])[0]
