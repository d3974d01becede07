"""A policy with an audio tower: what the families share, from clips to embeddings in place of placeholders."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hark.data.chat import Chat, messages
from hark.data.errors import DataError
from hark.models.directory import in_short, read_json
from hark.models.policy import Audio, Policy, PolicyError, Prompt, text_ids
from hark.models.probe import check_text


class AudioPolicy(Policy):
    """A decoder, an audio tower and a projector between them, with the processor of transformers.

    A family supplies `build`, `listen` and `encode`, and the names of its modules where they are not these.
    """

    tower_name: str = "model.audio_tower"  # in `self.model`
    projector_names: tuple[str, ...] = ("model.multi_modal_projector",)
    sample_rate = 16_000  # of every extractor here; checked
    audio_id: int
    requires_audio = True  # whether a prompt without a clip is an error
    shortest: float = 0.0  # seconds; shorter clips make no embedding
    longest: float = 30.0  # seconds

    def __init__(self, model: Any, path: Path):
        try:
            self.processor = self.load_processor(path)
        except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PolicyError(f"{path}: its processor cannot be loaded ({in_short(error)}); copy it again") from error
        super().__init__(model, self.processor.tokenizer)
        self.audio_id = self.find_audio_id()
        vocabulary = model.get_output_embeddings().weight.shape[0]
        others = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
        placeholders = {self.audio_id, *(other for other in others if other is not None)}
        self.suppressed_ids = tuple(sorted(token for token in placeholders if token < vocabulary))
        if self.extractor.sampling_rate != self.sample_rate:
            raise PolicyError(
                f"{path}: its processor takes audio at {self.extractor.sampling_rate} Hz; "
                f"expected {self.sample_rate} Hz"
            )
        self._check_template(path)
        self._check_extractor(path)

    # To be supplied by a family.

    @abstractmethod
    def listen(self, waveform: np.ndarray) -> Audio:
        """The features of a clip (samples,)."""

    @abstractmethod
    def encode(self, clips: Sequence[Audio]) -> torch.Tensor:
        """The tower's outputs for clips, as one batch: (audio embeddings of all clips, width)."""

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The tower's outputs (..., width) as embeddings (..., D) of the decoder."""
        return self.model.model.multi_modal_projector(hidden)

    def placeholders(self, clip: Audio) -> list[int]:
        """The ids that stand for a clip in a prompt, in place of the one placeholder of the chat template."""
        return [self.audio_id] * clip.tokens

    def text(self, turns: list[dict]) -> str:
        """The chat template around turns in the chat format of transformers, with one placeholder for each clip."""
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def ids(self, turns: list[dict]) -> list[int]:
        """The ids of turns with one placeholder for each clip."""
        return text_ids(self.tokenizer, self.text(turns))

    def load_processor(self, path: Path) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(path, trust_remote_code=False)

    def native_inputs(self, chat: Chat, *waveforms: np.ndarray) -> dict[str, torch.Tensor]:
        made = self.processor(
            text=[self.text(messages(chat, len(waveforms)))],
            audio=list(waveforms),
            sampling_rate=self.sample_rate,
            return_tensors="pt",
        )
        return dict(made)

    def find_audio_id(self) -> int:
        return self.model.config.audio_token_id

    # Shared by the families.

    @property
    def extractor(self) -> Any:
        """The feature extractor of the processor."""
        return self.processor.feature_extractor

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def tower(self) -> Any:
        return self.model.get_submodule(self.tower_name)

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.get_submodule(name) for name in self.projector_names)

    def prepare(self, chat: Chat, *waveforms: np.ndarray) -> Prompt:
        """The chat template around the turns with a placeholder for each audio embedding, and the clips.

        Raises DataError for a prompt without a clip if `requires_audio`, and for a clip that is too short or too long
        for the tower.
        """
        if not waveforms and self.requires_audio:
            raise DataError("no audio_path; this policy answers questions about audio (data.require_audio)")
        for waveform in waveforms:
            self._check_length(waveform)
        clips = tuple(self.listen(waveform) for waveform in waveforms)
        ids = self.ids(messages(chat, len(clips)))
        found = ids.count(self.audio_id)
        if found != len(clips):
            raise DataError(
                f"{found} audio placeholders in the prompt of {len(clips)} clips; expected one for each; does the "
                "question contain one?"
            )
        pieces = iter([self.placeholders(clip) for clip in clips])
        expanded = [other for own in ids for other in (next(pieces) if own == self.audio_id else [own])]
        return Prompt(self.known_ids(expanded), clips)

    def embed(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, lengths = self.padded(prompts)
        is_real = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        is_audio = (ids == self.audio_id) & is_real  # a family may pad with its placeholder
        # The placeholder may have no embedding of its own.
        embeddings = self.embed_tokens(ids.masked_fill(is_audio, self.pad_id))
        if not any(prompt.clips for prompt in prompts):
            return embeddings + self._zero(), lengths
        audio = self.project(self._encoded([clip for prompt in prompts for clip in prompt.clips]))
        if int(is_audio.sum()) != len(audio):
            raise PolicyError(
                f"{int(is_audio.sum())} audio placeholders for {len(audio)} audio embeddings; expected equal numbers"
            )
        own, others = embeddings.tensor_split((audio.shape[-1],), dim=-1)  # others: inputs of layers, if there are any
        own = own.masked_scatter(is_audio.unsqueeze(-1).expand_as(own), audio.to(own.dtype))
        return torch.cat([own, others], dim=-1) if others.shape[-1] else own, lengths

    def share_tower(self, other: Policy) -> None:
        self.model.set_submodule(self.tower_name, other.tower)
        self.tower_cache = other.tower_cache

    def _zero(self) -> torch.Tensor | int:
        """0, with the trained weights of the projector in its graph.

        FSDP reduces the gradients that a rank has; those of a rank without a clip must be as many as those of others.
        """
        weights = (weight for module in self.projectors for weight in module.parameters())
        return 0 * sum(weight.sum() for weight in weights if weight.requires_grad)

    def _encoded(self, clips: Sequence[Audio]) -> torch.Tensor:
        """The tower's outputs for all clips, concatenated: (audio embeddings, width); cached if it is frozen."""
        if self.tower_cache is None:
            return self.encode(clips)
        return torch.cat([self.tower_cache.get(clip.digest, partial(self.encode, (clip,))) for clip in clips])

    def _check_length(self, waveform: np.ndarray) -> None:
        least, most = (round(seconds * self.sample_rate) for seconds in (self.shortest, self.longest))
        if not max(least, 1) <= len(waveform) <= most:
            raise DataError(
                f"a clip of {len(waveform)} samples; this tower takes {least} to {most} samples, "
                f"{self.shortest:.4f} s to {self.longest:g} s at {self.sample_rate} Hz"
            )

    def _check_extractor(self, path: Path) -> None:
        """Raise PolicyError if the extractor makes no features of a sound, or not as many as the tower takes."""
        seconds = min(max(self.shortest, 1.0), self.longest)
        try:
            clip = self.listen(np.linspace(-0.5, 0.5, int(seconds * self.sample_rate), dtype=np.float32))
        except Exception as error:
            raise PolicyError(f"{path}: its processor cannot be used ({in_short(error)}); copy it again") from error
        bins = getattr(getattr(self.tower, "config", None), "num_mel_bins", None)
        if bins is not None and bins not in clip.features.shape:
            raise PolicyError(
                f"{path}: its processor makes features of shape {tuple(clip.features.shape)}, and its tower takes "
                f"{bins} mel bins; copy both from the checkpoint that the model was made from"
            )

    def _check_template(self, path: Path) -> None:
        """Raise PolicyError if the chat template leaves a clip out."""
        check_text(path, lambda text: self.tokenizer.decode(self.ids(messages(text, 1))))
        try:
            found = self.ids(messages("What?", 1)).count(self.audio_id)
        except Exception as error:
            raise PolicyError(f"{path}: its chat template cannot be used ({in_short(error)}); copy it again") from error
        if found != 1:
            token = self.tokenizer.convert_ids_to_tokens(self.audio_id)
            raise PolicyError(
                f"{path}: its chat template writes {found} audio placeholders ({token}) for a clip; expected 1; copy "
                "chat_template.jinja from the checkpoint that the model was made from"
            )


@dataclass(frozen=True)
class AudioHalf:
    """What audio needs of a processor that takes images and videos too; the rest of it needs torchvision."""

    feature_extractor: Any
    tokenizer: Any
    template: str | None

    @classmethod
    def load(cls, path: Path) -> AudioHalf:
        from transformers import AutoFeatureExtractor, AutoTokenizer

        tokenizer, older = AutoTokenizer.from_pretrained(path, trust_remote_code=False), path / "chat_template.json"
        template = tokenizer.chat_template
        if template is None and older.exists():  # older processors kept it there
            template = read_json(older)["chat_template"]
        return cls(AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False), tokenizer, template)

    def apply_chat_template(self, turns: list[dict], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(turns, chat_template=self.template, **options)


def audio_of(features: torch.Tensor, frames: int, tokens: int) -> Audio:
    """A clip with the digest of its features."""
    return Audio(features, frames, tokens, hashlib.blake2b(features.numpy().data, digest_size=16).hexdigest())
