"""Qwen2-Audio: a Whisper-like audio tower, a linear projector and a Qwen2 decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hark.data.errors import DataError
from hark.data.features import log_mel
from hark.models.policy import Policy, PolicyError, Prompt, pad_ids

# Sizes of Qwen/Qwen2-Audio-7B-Instruct, as keys of its config.json: 8.4 billion parameters.
QWEN2_AUDIO_7B = {
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

CONV_REACH = 2  # mel frames behind a clip that the tower's two convolutions still see


def audio_tokens(frames: int | torch.Tensor) -> int | torch.Tensor:
    """Audio embeddings of a clip of `frames` mel frames (100 per second): 25 per second."""
    return (_places(frames) - 2) // 2 + 1


def _places(frames: int | torch.Tensor) -> int | torch.Tensor:
    """Positions of the tower's layers for a clip of `frames` mel frames: 50 per second."""
    return (frames - 1) // 2 + 1


class Qwen2AudioPolicy(Policy):
    """Any `Qwen2AudioForConditionalGeneration` checkpoint, from the small one of `models/mini.py` to the 7B."""

    hub_prefixes = (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("audio_tower.", "model.audio_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )

    def __init__(self, model: nn.Module, path: Path):
        from transformers import AutoProcessor

        self.processor = AutoProcessor.from_pretrained(path)
        super().__init__(model, self.processor.tokenizer)
        self.audio_id = model.config.audio_token_id
        self.sample_rate = self.processor.feature_extractor.sampling_rate
        self.suppressed_ids = (self.audio_id,)
        self.max_frames = 2 * model.config.audio_config.max_source_positions

    @staticmethod
    def build(config) -> nn.Module:
        from transformers import Qwen2AudioForConditionalGeneration

        return Qwen2AudioForConditionalGeneration(config)

    @property
    def decoder(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def tower(self) -> nn.Module:
        return self.model.model.audio_tower

    def prepare(self, text: str, waveform: np.ndarray | None) -> Prompt:
        """Chat template around the audio and the text; log-mel of the real samples only.

        Raises DataError for a missing waveform, one too short for an embedding, or one longer than the tower takes.
        """
        if waveform is None:
            raise DataError("no audio_path; this policy answers questions about audio")
        extractor = self.processor.feature_extractor
        hop = extractor.hop_length
        frames = -(-len(waveform) // hop)
        if frames > self.max_frames or audio_tokens(frames) < 1:
            seconds = len(waveform) / self.sample_rate
            raise DataError(f"a clip of {seconds:.3f} s; this tower takes 0.03 s to {self.max_frames / 100:g} s")
        reached = np.pad(waveform, (0, min(CONV_REACH * hop, self.max_frames * hop - len(waveform))))
        mel = log_mel(reached, n_mels=extractor.feature_size, n_fft=extractor.n_fft, hop=hop)
        content = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": text}]
        chat = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        ids = torch.tensor(self.tokenizer(chat, add_special_tokens=False)["input_ids"])
        sound = hashlib.blake2b(mel.numpy(), digest_size=16).hexdigest()
        return Prompt(ids=self._expand(ids, audio_tokens(frames)), log_mel=mel, frames=frames, sound=sound)

    def embed(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, lengths = pad_ids(prompts, self.pad_id, self.device)
        embeddings = self.embed_tokens(ids)
        audio = self.model.model.multi_modal_projector(self._encode_audio(prompts)).to(embeddings.dtype)
        # Padding repeats pad_id, so every placeholder is a real one; `prepare` made as many as there are embeddings.
        places = (ids == self.audio_id).unsqueeze(-1).expand_as(embeddings)
        if int(places[..., 0].sum()) != len(audio):
            raise PolicyError(f"{int(places[..., 0].sum())} audio placeholders for {len(audio)} audio embeddings")
        return embeddings.masked_scatter(places, audio), lengths

    def _expand(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """Repeat the one audio placeholder `count` times."""
        places = (ids == self.audio_id).nonzero().flatten().tolist()
        if len(places) != 1:
            raise DataError(f"the chat gave {len(places)} audio placeholders for one clip; is one in the question?")
        return torch.cat([ids[: places[0]], ids.new_full((count,), self.audio_id), ids[places[0] + 1 :]])

    def share_tower(self, other: Qwen2AudioPolicy) -> None:
        self.model.model.audio_tower, self.tower_cache = other.tower, other.tower_cache

    def _encode_audio(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """The tower's output (A, tower width) for all clips, one after the other."""
        if self.tower_cache is None:
            return self._run_tower(prompts)
        return torch.cat([self.tower_cache.get(p.sound, partial(self._run_tower, (p,))) for p in prompts])

    def _run_tower(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Let the tower hear the clips as one batch: (A, tower width).

        transformers' tower takes 3000 frames, 30 s, whatever the clip. Its layers never let a real frame see padding,
        so running them on the real frames, and the two behind them that the convolutions reach, gives the same values.
        """
        tower = self.tower
        frames = torch.tensor([prompt.frames for prompt in prompts], device=self.device)
        hidden = nn.utils.rnn.pad_sequence([prompt.log_mel.T for prompt in prompts], batch_first=True)
        hidden = hidden.transpose(1, 2).to(self.device, tower.conv1.weight.dtype)
        hidden = F.gelu(tower.conv2(F.gelu(tower.conv1(hidden)))).transpose(1, 2)  # (N, S, D), 50 per second
        hidden = hidden[:, : _places(max(prompt.frames for prompt in prompts))]
        hidden = hidden + tower.embed_positions.weight[: hidden.shape[1]]
        place = torch.arange(hidden.shape[1], device=self.device)
        mask = None
        if len({prompt.frames for prompt in prompts}) > 1:
            # Addends in one row, for all layers: from booleans each would make, and keep, a square of its own.
            behind = (place >= _places(frames)[:, None])[:, None, None]  # (N, 1, 1, S)
            mask = torch.zeros(behind.shape, dtype=hidden.dtype, device=self.device).masked_fill(behind, -torch.inf)
            mask = mask.expand(-1, -1, len(place), -1)
        for layer in tower.layers:
            hidden = layer(hidden, mask)
        hidden = tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))  # 25 per second
        return hidden[place[: hidden.shape[1]] < audio_tokens(frames)[:, None]]
