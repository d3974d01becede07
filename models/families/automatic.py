"""Any other audio model of transformers, without code of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hark.data.chat import Chat, messages
from hark.data.errors import DataError
from hark.models.audio_policy import AudioPolicy
from hark.models.policy import PolicyError, Prompt

TOWERS = ("audio_tower", "audio_encoder", "audio_model", "encoder")  # names of towers in transformers
PROJECTORS = ("multi_modal_projector", "embed_audio", "audio_projector", "projector")


@dataclass(frozen=True)
class NativePrompt(Prompt):
    """A prompt as transformers' own processor gives it to its model: one row for each input."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


class AutomaticPolicy(AudioPolicy):
    """The embeddings of a prompt are those that transformers' own model gives to its decoder.

    The model is called with the inputs of its own processor, and stopped where its decoder begins. Prompts are embedded
    one by one. A run uses this policy only after the contract has held on its checkpoint (launch/common/contract.py).
    """

    longest = float("inf")

    def __init__(self, model: Any, path: Path):
        super().__init__(model, path)
        self.sample_rate = self.extractor.sampling_rate

    @staticmethod
    def build(config: Any) -> Any:
        import transformers

        return getattr(transformers, config.architectures[0])(config)

    @property
    def extractor(self) -> Any:
        parts = (getattr(self.processor, name, None) for name in ("feature_extractor", "audio_processor"))
        return next(part for part in parts if part is not None)

    @property
    def decoder(self) -> Any:
        return getattr(self.model.base_model, "language_model", None) or self.model.get_decoder()

    @property
    def tower_name(self) -> str | None:  # type: ignore[override]
        names = dict(self.model.base_model.named_children())
        found = next((name for name in TOWERS if name in names and hasattr(names[name], "layers")), None)
        return found and f"{self.model.base_model_prefix}.{found}"

    @property
    def tower(self) -> Any | None:
        return None if self.tower_name is None else self.model.get_submodule(self.tower_name)

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return tuple(part for name, part in self.model.base_model.named_children() if name in PROJECTORS)

    def find_audio_id(self) -> int:
        for owner in (self.model.config, self.processor):
            found = getattr(owner, "audio_token_id", None)
            if found is not None:
                return found
        raise PolicyError(f"{type(self.model).__name__}: neither its config nor its processor has an audio_token_id")

    def _check_extractor(self, path: Path) -> None:
        """Nothing: its processor hears all clips of a prompt together, and `verify` tries it."""

    def select_trained(self, part: str) -> None:
        if part == "no-tower" and self.tower is None:
            raise PolicyError(f"{type(self.model).__name__}: no audio tower was found in it; set model.train to all")
        super().select_trained(part)

    def prepare(self, chat: Chat, *waveforms: np.ndarray) -> Prompt:
        if not waveforms:
            raise DataError("no audio_path; this policy answers questions about audio")
        try:
            inputs = self.native_inputs(chat, *waveforms)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"its processor refuses the prompt: {error}") from error
        return NativePrompt(inputs["input_ids"][0], inputs=inputs)

    def native_inputs(self, chat: Chat, *waveforms: np.ndarray) -> dict[str, torch.Tensor]:
        made = self.processor(
            text=[self.text(messages(chat, len(waveforms)))], audio=list(waveforms), return_tensors="pt"
        )
        return {name: torch.as_tensor(value) for name, value in made.items() if name != "token_type_ids"}

    def audio_tokens(self, frames: int) -> int:
        return frames // 4  # 25 per second, as in most families

    def embed(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self._recorded(prompt) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

    def _recorded(self, prompt: Prompt) -> torch.Tensor:
        """The embeddings (P, D) that the model gives to its decoder."""
        assert isinstance(prompt, NativePrompt)
        dtype = self.decoder.get_input_embeddings().weight.dtype
        inputs = {
            name: value.to(self.device, dtype if value.is_floating_point() else None)
            for name, value in prompt.inputs.items()
        }
        hook = self.decoder.register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            self.model(**inputs, use_cache=False)
        except _Recorded as recorded:
            return recorded.embeddings[0]
        finally:
            hook.remove()
        raise PolicyError(f"{type(self.model).__name__} did not call its decoder with inputs_embeds")


class _Recorded(Exception):
    """Leaves the model's forward where its decoder begins."""

    def __init__(self, embeddings: torch.Tensor):
        super().__init__()
        self.embeddings = embeddings


def _stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get("inputs_embeds") is not None:
        raise _Recorded(kwargs["inputs_embeds"])
