"""Voxtral: Whisper's encoder over blocks of 30 s, silence included, an MLP and a Llama-like decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hark.data.chat import Chat
from hark.data.errors import DataError
from hark.models.audio_policy import AudioPolicy, audio_of
from hark.models.policy import Audio, PolicyError, text_ids
from hark.models.whisper import whisper_mel


class VoxtralPolicy(AudioPolicy):
    """A `VoxtralForConditionalGeneration` checkpoint. Its tower attends to padding, so blocks are always full."""

    longest = 30 * 60.0

    def __init__(self, model: Any, path: Path):
        super().__init__(model, path)
        if model.config.audio_token_id not in (None, self.audio_id):
            raise PolicyError(
                f"{path}: audio_token_id is {model.config.audio_token_id} in config.json and {self.audio_id} in its "
                "processor; expected the same"
            )

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import VoxtralForConditionalGeneration

        return VoxtralForConditionalGeneration(config)

    def find_audio_id(self) -> int:
        return self.processor.audio_token_id

    @property
    def block(self) -> int:
        """Mel frames of a block."""
        return 2 * self.tower.config.max_source_positions

    def listen(self, waveform: np.ndarray) -> Audio:
        size = self.block * self.extractor.hop_length
        padded = np.pad(waveform, (0, -len(waveform) % size))
        mel = whisper_mel(self.extractor, padded, most=len(padded))
        return audio_of(mel, mel.shape[1], self.audio_tokens(mel.shape[1]))

    def audio_tokens(self, frames: int) -> int:
        config = self.tower.config  # the projector takes several positions of width hidden_size as one
        return -(-frames // self.block) * config.max_source_positions * config.hidden_size // config.intermediate_size

    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        blocks = torch.stack([block for clip in clips for block in clip.features.split(self.block, dim=1)])
        hidden = self.tower(blocks.to(self.device)).last_hidden_state
        return hidden.reshape(-1, self.tower.config.intermediate_size)

    def native_inputs(self, chat: Chat, *waveforms: np.ndarray) -> dict[str, torch.Tensor]:
        """By hand, as its processor takes no ids and its chat template needs files."""
        size = self.block * self.extractor.hop_length
        made = [
            self.extractor(w, sampling_rate=self.sample_rate, padding=True, truncation=False, pad_to_multiple_of=size,
                           return_tensors="pt")["input_features"][0]
            for w in waveforms
        ]  # fmt: skip
        blocks = torch.stack([block for mel in made for block in mel.split(self.block, dim=1)])
        return {"input_ids": self.prepare(chat, *waveforms).ids[None], "input_features": blocks}

    def ids(self, turns: list[dict]) -> list[int]:
        """Mistral's format, by hand: its tokenizers have no template that leaves a clip to be filled in."""
        special = {name: self._special(name) for name in ("<s>", "</s>", "[INST]", "[/INST]", "[BEGIN_AUDIO]")}
        ids = [special["<s>"]]
        for turn in turns:
            parts = [turn["content"]] if isinstance(turn["content"], str) else turn["content"]
            inside = [piece for part in parts for piece in self._part(part, special["[BEGIN_AUDIO]"])]
            if turn["role"] == "user":
                ids += [special["[INST]"], *inside, special["[/INST]"]]
            elif turn["role"] == "assistant":
                ids += [*inside, special["</s>"]]
            else:
                raise DataError(f"a turn of the role {turn['role']!r}; Voxtral takes those of user and assistant only")
        return ids

    def _part(self, part: str | dict, begin: int) -> list[int]:
        if isinstance(part, dict) and part["type"] == "audio":
            return [begin, self.audio_id]
        return text_ids(self.tokenizer, part if isinstance(part, str) else part["text"])

    def _special(self, name: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(name)
        if found is None or found == getattr(self.tokenizer, "unk_token_id", None) and name != self.tokenizer.unk_token:
            raise PolicyError(f"{self.name}: its tokenizer has no token {name}, which Voxtral's prompts need")
        return found
