"""Qwen2-Audio: a Whisper-like audio tower, a linear projector and a Qwen2 decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hark.data.chat import Chat, messages
from hark.data.errors import DataError
from hark.data.features import log_mel
from hark.models.policy import Audio, Policy, PolicyError, Prompt, pad_ids, text_ids

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

CONV_REACH = 2  # mel frames after the end of a clip that the tower's two convolutions read

Count = TypeVar("Count", int, torch.Tensor)  # of one clip, or of several


def audio_tokens(frames: Count) -> Count:
    """The number of audio embeddings, 25 per second, of a clip of `frames` mel frames, 100 per second."""
    return (_positions(frames) - 2) // 2 + 1


def _positions(frames: Count) -> Count:
    """The number of positions in the tower's layers, 50 per second, of a clip of `frames` mel frames."""
    return (frames - 1) // 2 + 1


class Qwen2AudioPolicy(Policy):
    """Any `Qwen2AudioForConditionalGeneration` checkpoint, from the one that `models/mini.py` builds to the 7B."""

    hub_prefixes = (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("audio_tower.", "model.audio_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )
    audio_id: int
    sample_rate = 16_000  # of Whisper's feature extractor, which all of these models share

    def __init__(self, model: Any, path: Path):
        from transformers import AutoProcessor

        self.processor = AutoProcessor.from_pretrained(path)
        super().__init__(model, self.processor.tokenizer)
        self.audio_id = model.config.audio_token_id
        rate = self.processor.feature_extractor.sampling_rate
        if rate != self.sample_rate:
            raise PolicyError(f"{path}: its processor takes audio at {rate} Hz; expected {self.sample_rate} Hz")
        self.suppressed_ids = (self.audio_id,)
        self.max_frames = 2 * model.config.audio_config.max_source_positions
        self.min_frames = next(frames for frames in count(1) if audio_tokens(frames))

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import Qwen2AudioForConditionalGeneration

        return Qwen2AudioForConditionalGeneration(config)

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def tower(self) -> Any:
        return self.model.model.audio_tower

    def prepare(self, chat: Chat, *waveforms: np.ndarray) -> Prompt:
        """The chat template around the turns with a placeholder for each audio embedding, and the clips.

        Raises DataError for a prompt without a clip, and for a clip that is too short for one embedding or longer than
        the tower takes.
        """
        if not waveforms:
            raise DataError("no audio_path; this policy answers questions about audio")
        clips = tuple(self._clip(waveform) for waveform in waveforms)
        text = self.processor.apply_chat_template(
            messages(chat, len(clips)), add_generation_prompt=True, tokenize=False
        )
        ids = torch.tensor(text_ids(self.tokenizer, text))
        return Prompt(self._expand(ids, [clip.tokens for clip in clips]), clips)

    def _clip(self, waveform: np.ndarray) -> Audio:
        """The log-mel of a clip without 30 s padding."""
        extractor = self.processor.feature_extractor
        hop = extractor.hop_length
        frames = -(-len(waveform) // hop)
        least, most = (self.min_frames - 1) * hop + 1, self.max_frames * hop
        if not least <= len(waveform) <= most:
            raise DataError(
                f"a clip of {len(waveform)} samples; this tower takes {least} to {most} samples, "
                f"{least / self.sample_rate:.4f} s to {most / self.sample_rate:g} s at {self.sample_rate} Hz"
            )
        padded = np.pad(waveform, (0, min(CONV_REACH * hop, most - len(waveform))))
        mel = log_mel(padded, n_mels=extractor.feature_size, n_fft=extractor.n_fft, hop=hop)
        digest = hashlib.blake2b(mel.numpy().data, digest_size=16).hexdigest()
        return Audio(mel, frames, audio_tokens(frames), digest)

    def embed(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, lengths = pad_ids(prompts, self.pad_id, self.device)
        embeddings = self.embed_tokens(ids)
        clips = [clip for prompt in prompts for clip in prompt.clips]
        audio = self.model.model.multi_modal_projector(self._encode_audio(clips)).to(embeddings.dtype)
        # Prompts are padded with pad_id, so no placeholder is padding.
        is_audio = (ids == self.audio_id).unsqueeze(-1).expand_as(embeddings)
        placeholders = int(is_audio[..., 0].sum())
        if placeholders != len(audio):
            raise PolicyError(
                f"{placeholders} audio placeholders for {len(audio)} audio embeddings; expected equal numbers"
            )
        return embeddings.masked_scatter(is_audio, audio), lengths

    def _expand(self, ids: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Replace the placeholder of each clip in ids (P,) by as many as it has embeddings."""
        found = ids == self.audio_id
        if int(found.sum()) != len(counts):
            raise DataError(
                f"{int(found.sum())} audio placeholders in the prompt of {len(counts)} clips; expected one for each; "
                "does the question contain one?"
            )
        repeats = torch.ones_like(ids)
        repeats[found] = torch.tensor(counts)
        return ids.repeat_interleave(repeats)

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self.model.model.multi_modal_projector,)

    def share_tower(self, other: Policy) -> None:
        self.model.model.audio_tower, self.tower_cache = other.tower, other.tower_cache

    def _encode_audio(self, clips: Sequence[Audio]) -> torch.Tensor:
        """The tower's outputs for all clips, concatenated: (audio embeddings, tower width); cached if it is frozen."""
        if self.tower_cache is None:
            return self._encode_clips(clips)
        return torch.cat([self.tower_cache.get(clip.digest, partial(self._encode_clips, (clip,))) for clip in clips])

    def _encode_clips(self, clips: Sequence[Audio]) -> torch.Tensor:
        """Run the tower on all clips as one batch: (audio embeddings, tower width).

        The tower's own forward in transformers takes clips padded to 3000 frames, 30 s, and masks the padding in its
        layers. So the clip's frames and the two after them, which the convolutions read, give the same values.
        """
        tower = self.tower
        frames = torch.tensor([clip.frames for clip in clips], device=self.device)
        mels = [clip.features.T for clip in clips]
        hidden = nn.utils.rnn.pad_sequence(mels, batch_first=True)
        hidden = hidden.transpose(1, 2).to(self.device, tower.conv1.weight.dtype)
        hidden = F.gelu(tower.conv2(F.gelu(tower.conv1(hidden)))).transpose(1, 2)  # (N, S, D), 50 per second
        hidden = hidden[:, : _positions(max(clip.frames for clip in clips))]
        hidden = hidden + tower.embed_positions.weight[: hidden.shape[1]]
        position = torch.arange(hidden.shape[1], device=self.device)
        mask = None
        if len({clip.frames for clip in clips}) > 1:
            # Additive and made once: each layer would convert a boolean mask, and save an (N, 1, S, S) copy.
            padding = (position >= _positions(frames)[:, None])[:, None, None]  # (N, 1, 1, S)
            mask = torch.zeros(padding.shape, dtype=hidden.dtype, device=self.device).masked_fill(padding, -torch.inf)
            mask = mask.expand(-1, -1, len(position), -1)
        for layer in tower.layers:
            hidden = layer(hidden, mask)
        hidden = tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))  # 25 per second
        return hidden[position[: hidden.shape[1]] < audio_tokens(frames)[:, None]]
