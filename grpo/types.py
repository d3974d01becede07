"""The values that pass between the hops of a step, and the letters for their dimensions.

    N  prompts            G  completions per prompt (the group)     B  completions, N * G; b = n * G + g
    P  prompt tokens      T  completion tokens                      V  vocabulary       D  hidden size
    L  tokens fed, queries      S  tokens attended to, keys      M  mel bins      F  mel frames      K  reward functions

A mask is True where a token counts. Every (B, T) float is exactly 0 where the mask is False.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from models.policy import Prompt


@dataclass(frozen=True)
class Rollout:
    """N groups of G completions, drawn from the policy.

    tokens: (B, T) int64, the stop token included, `pad_id` behind it.
    mask: (B, T) bool, written by the sampler; never derived from the ids.
    logprobs: (B, T) float32 of each token under the distribution it was drawn from.
    stopped: (B,) bool, False where the completion ran into the token limit.
    """

    prompts: tuple[Prompt, ...]
    group_size: int
    tokens: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    stopped: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """What the loss needs of a step, on this rank.

    weights: (B, T), what each token counts for in the loss, from the whole step over all ranks.
    The rest is None in supervised fine-tuning, where nothing was sampled:
    old_logprobs: (B, T) under the policy that drew the completions; ref_logprobs: the same under the reference, None
    without one; advantages: (B,).
    """

    prompts: tuple[Prompt, ...]
    group_size: int
    tokens: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    advantages: torch.Tensor | None = None

    def micro_batches(self, prompts: int) -> Iterator[Batch]:
        """Split into parts of up to `prompts` whole groups, each trimmed to its longest completion."""
        for first in range(0, len(self.prompts), prompts):
            rows = slice(first * self.group_size, (first + prompts) * self.group_size)
            cells = (rows, slice(int(self.mask[rows].sum(dim=1).max())))
            yield Batch(
                prompts=self.prompts[first : first + prompts],
                group_size=self.group_size,
                tokens=self.tokens[cells],
                mask=self.mask[cells],
                weights=self.weights[cells],
                old_logprobs=None if self.old_logprobs is None else self.old_logprobs[cells],
                ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[cells],
                advantages=None if self.advantages is None else self.advantages[rows],
            )
