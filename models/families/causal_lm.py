"""Text-only causal language models of transformers. Each layer must call attention exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hark.data.chat import Chat, messages
from hark.data.errors import DataError
from hark.models.directory import in_short
from hark.models.policy import Policy, PolicyError, Prompt, text_ids
from hark.models.probe import check_text


class CausalLMPolicy(Policy):
    """Any `AutoModelForCausalLM` checkpoint. It takes text only; audio is an error."""

    def __init__(self, model: nn.Module, path: Path):
        from transformers import AutoTokenizer

        super().__init__(model, AutoTokenizer.from_pretrained(path, trust_remote_code=False))
        check_text(path, lambda text: self.tokenizer.decode(self.prepare(text).ids))
        try:
            self.prepare("What?")
        except Exception as error:
            raise PolicyError(f"{path}: its chat template cannot be used ({in_short(error)}); copy it again") from error

    @staticmethod
    def build(config: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    @property
    def decoder(self) -> Any:
        decoder = self.model.get_decoder()
        return decoder if hasattr(decoder, "config") else self.model.base_model  # ModernBERT's is its last linear layer

    @property
    def windows(self) -> dict[str, int | None]:
        """As in the config, but for Moshi, whose model leaves its window out of the mask."""
        ignored = self.model.config.model_type == "moshi"
        return dict.fromkeys(super().windows) if ignored else super().windows

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        last, head = self.model.get_output_embeddings(), getattr(self.model, "lm_head", None)
        return super().logits(hidden if head is None or head is last else head(hidden))  # ModernBERT's has a layer more

    def prepare(self, chat: Chat, *waveforms: np.ndarray) -> Prompt:
        """The chat template around the turns, or only their texts if the tokenizer has no template.

        Raises DataError for a waveform.
        """
        if waveforms:
            raise DataError("the example has audio, but this policy reads text only; choose a model that takes audio")
        turns = messages(chat, clips=0)
        if self.tokenizer.chat_template is None:
            return Prompt(ids=self.known_ids(self.tokenizer("\n".join(turn["content"] for turn in turns))["input_ids"]))
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return Prompt(ids=self.known_ids(text_ids(self.tokenizer, text)))

    def native_inputs(self, chat: Chat, *waveforms: np.ndarray) -> dict[str, torch.Tensor]:
        return {"input_ids": self.prepare(chat).ids[None]}

    def embed(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, lengths = self.padded(prompts)
        return self.embed_tokens(ids), lengths
