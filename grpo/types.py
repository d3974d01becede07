"""The values that pass between the hops of a step, and the letters for their dimensions.

    N  prompts            G  completions per prompt (the group)     B  completions, N * G; b = n * G + g
    P  prompt tokens      T  completion tokens                      V  vocabulary       D  hidden size
    L  tokens fed, queries      S  tokens attended to, keys      M  mel bins      F  mel frames      K  reward functions

A mask is True where a token counts. Every (B, T) float is exactly 0 where the mask is False.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from hark.models.policy import Prompt

Kind = TypeVar("Kind", bound="Groups")


@dataclass(frozen=True)
class Groups:
    """N prompts with G completions each, one row of the engine per group.

    tokens: (B, T) int64, the stop token included, `pad_id` behind it.
    mask: (B, T) bool, written by the sampler; never derived from the ids.
    """

    prompts: tuple[Prompt, ...]
    group_size: int
    tokens: torch.Tensor
    mask: torch.Tensor

    def rows(self, groups: Sequence[int]) -> torch.Tensor:
        """Where the completions of some groups stand among the B, as many in a row as a group has."""
        first = torch.tensor(groups, device=self.mask.device)[:, None] * self.group_size
        return (first + torch.arange(self.group_size, device=self.mask.device)).flatten()

    def select(self: Kind, groups: Sequence[int]) -> Kind:
        """Some of the groups, by their places, trimmed to their longest completion."""
        rows = self.rows(groups)
        steps = int(self.mask[rows].sum(dim=1).max())
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        cells = {
            name: value[rows, :steps] if value.dim() == 2 else value[rows]
            for name, value in values.items()
            if torch.is_tensor(value)
        }
        return dataclasses.replace(self, prompts=tuple(self.prompts[group] for group in groups), **cells)

    def split_by_length(self, size: int, groups: Sequence[int] | None = None) -> list[list[int]]:
        """Places of the groups, or of some of them, in parts of up to `size`, rows of like length in one part.

        A part is padded to its longest prompt and its longest completion. The longest rows come first, so that the
        memory which the first part took serves most of the others.
        """
        completions = self.mask.sum(dim=1).unflatten(0, (-1, self.group_size)).amax(dim=1).tolist()
        fed = [self.group_size * (longest - 1) for longest in completions]  # a last token is drawn, never fed
        lengths = [len(prompt.ids) + branches for prompt, branches in zip(self.prompts, fed, strict=True)]
        order = sorted(range(len(lengths)) if groups is None else groups, key=lambda group: -lengths[group])
        return [order[first : first + size] for first in range(0, len(order), size)]


@dataclass(frozen=True)
class Rollout(Groups):
    """Completions drawn from the policy.

    logprobs: (B, T) float32 of each token under the distribution it was drawn from.
    stopped: (B,) bool, False where the completion ran into the token limit.
    """

    logprobs: torch.Tensor
    stopped: torch.Tensor


@dataclass(frozen=True)
class Batch(Groups):
    """What the loss needs of a step, on this rank.

    weights: (B, T), what each token counts for in the loss, from the whole step over all ranks.
    The rest is None in supervised fine-tuning, where nothing was sampled:
    old_logprobs: (B, T) under the policy that drew the completions; ref_logprobs: the same under the reference, None
    without one; advantages: (B,).
    """

    weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    advantages: torch.Tensor | None = None

    @property
    def skips(self) -> bool:
        """Whether a group without advantages has no gradient: nothing keeps it near a reference."""
        return self.advantages is not None and self.ref_logprobs is None

    def groups_with_gradient(self) -> list[int]:
        """Places of the groups that have a gradient; no other needs a forward and a backward."""
        if not self.skips:
            return list(range(len(self.prompts)))
        advantages = self.advantages.unflatten(0, (-1, self.group_size))  # (N, G)
        return advantages.ne(0).any(dim=1).nonzero().flatten().tolist()
