"""Qwen3-Omni, the thinker: an audio tower with convolutions over 1 s, and a mixture-of-experts decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hark.models.families.qwen2_5_omni import Qwen2_5OmniPolicy
from hark.models.policy import Audio


class Qwen3OmniMoePolicy(Qwen2_5OmniPolicy):
    """A `Qwen3OmniMoeThinkerForConditionalGeneration` checkpoint, alone or inside that of the whole Omni model."""

    untouched = r"(thinker\.)?(model\.)?visual\.|talker\.|code2wav\."
    projector_names = ("model.audio_tower.proj1", "model.audio_tower.proj2")

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

        model = Qwen3OmniMoeThinkerForConditionalGeneration(getattr(config, "thinker_config", config))
        del model.model.visual
        return model

    def audio_tokens(self, frames: int) -> int:
        return tokens_by_chunks(frames, 2 * self.tower.config.n_window)

    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        chunk = 2 * self.tower.config.n_window
        if len(clips) > 1 and any(clip.frames < chunk for clip in clips):
            # The tower pads chunks to the longest of a call, and its convolutions read the padding.
            return torch.cat([self.encode((clip,)) for clip in clips])
        mels = torch.cat([clip.features for clip in clips], dim=1).to(self.device)
        frames = torch.tensor([clip.frames for clip in clips], device=self.device)
        return self.tower(mels, feature_lens=frames).last_hidden_state


def tokens_by_chunks(frames: int, chunk: int) -> int:
    """Embeddings of a clip whose chunks of `chunk` mel frames each pass three convolutions of stride 2."""
    whole, rest = divmod(frames, chunk)
    return whole * _thrice_halved(chunk) + _thrice_halved(rest)


def _thrice_halved(frames: int) -> int:
    return -(-frames // 8)  # rounding up three times is rounding up once
