"""The baseline of the benchmark: the R1-AQA procedure on Hugging Face's own model.

Each prompt is padded to 30 s and computed once per completion: in `generate`, in the audio tower, in the reference
pass, in the forward and in the backward. Logits over the vocabulary are computed at every position. The file shares no
code with grpo/ or models/, so that tests can use it as an independent reference. Three things differ from R1-AQA, so
that both can give equal numbers: audio is repeated in the order of the rows, the prompt is not cut for the loss, and
the placeholder is never sampled.

    N prompts   G completions per prompt   B = N * G rows, b = n * G + g   P prompt tokens   T completion tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Baseline:
    """A Hugging Face Qwen2-Audio and its processor."""

    model: Any
    processor: Any
    audio_id: int

    @staticmethod
    def load(directory: str | Path) -> Baseline:
        from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

        model = Qwen2AudioForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True
        ).eval()
        # Whisper's positions are constants, but transformers marks them as trainable after loading.
        model.model.audio_tower.embed_positions.requires_grad_(False)
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        processor.tokenizer.padding_side = "left"
        return Baseline(model, processor, model.config.audio_token_id)

    def inputs(self, texts: Sequence[str], waveforms: Sequence[np.ndarray]) -> Inputs:
        """The processor's output for questions about clips: ids (N, P), padded on the left, and mel frames of 30 s."""
        chats = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "audio", "audio_url": ""}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for text in texts
        ]
        rate = self.processor.feature_extractor.sampling_rate
        return dict(
            self.processor(text=chats, audio=list(waveforms), sampling_rate=rate, padding=True, return_tensors="pt")
        )

    @torch.no_grad()
    def rollout(self, inputs: Inputs, *, group_size: int, new_tokens: int) -> torch.Tensor:
        """Sample G completions of each prompt from the full distribution: tokens (B, T), each of exactly T tokens."""
        output = self.model.generate(
            **inputs,
            num_return_sequences=group_size,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            suppress_tokens=[self.audio_id],
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        return output[:, inputs["input_ids"].shape[1] :]

    def logprobs(self, inputs: Inputs, tokens: torch.Tensor, *, group_size: int) -> torch.Tensor:
        """Logprobs (B, T) of completions (B, T); each row of the forward is a prompt followed by one completion."""
        rows = {name: tensor.repeat_interleave(group_size, dim=0) for name, tensor in inputs.items()}
        rows["input_ids"] = torch.cat([rows["input_ids"], tokens], dim=1)
        rows["attention_mask"] = torch.cat([rows["attention_mask"], torch.ones_like(tokens)], dim=1)
        positions = (rows["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        logits = self.model(**rows, position_ids=positions, use_cache=False).logits  # (B, P + T, V)
        logits[..., self.audio_id] = -torch.inf
        return _chosen(logits[:, :-1], rows["input_ids"][:, 1:])[:, -tokens.shape[1] :]


def _chosen(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logprobs (B, L) of ids (B, L) under logits (B, L, V). As in R1-AQA, row by row, which lowers the peak memory."""
    chosen = logits.gather(-1, ids[..., None]).squeeze(-1)
    return chosen - torch.stack([row.logsumexp(dim=-1) for row in logits])


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float,
    beta: float,
) -> torch.Tensor:
    """GRPO (arXiv 2402.03300, equation 3): the mean over completions of the mean over their tokens."""
    ratio = torch.exp(logprobs - old_logprobs)
    advantages = advantages.unsqueeze(1)
    surrogate = torch.min(ratio * advantages, torch.clamp(ratio, 1 - clip, 1 + clip) * advantages)
    kl = torch.exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1
    per_token = -(surrogate - beta * kl)
    return ((per_token * mask).sum(dim=1) / mask.sum(dim=1)).mean()
