"""The values that pass between the hops of a step, and the letters for their dimensions.

    N  prompts            G  completions per prompt (the group)     B  completions, N * G; b = n * G + g
    P  prompt tokens      T  completion tokens                      V  vocabulary       D  hidden size
    L  queries: tokens that are fed         S  keys: tokens attended to
    M  mel bins           F  mel frames     K  reward functions     R  rows of the cache

A mask is True where a token counts. Every (B, T) float is exactly 0 where the mask is False.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from hark.models.policy import Prompt

Kind = TypeVar("Kind", bound="Groups")


@dataclass(frozen=True)
class Groups:
    """N prompts with G completions each; the engine computes a group as one row.

    tokens: (B, T) int64, the stop token included, then `pad_id`.
    mask: (B, T) bool, written by the sampler, never derived from the ids.
    """

    prompts: tuple[Prompt, ...]
    group_size: int
    tokens: torch.Tensor
    mask: torch.Tensor

    def rows(self, groups: Sequence[int]) -> torch.Tensor:
        """Indices among the B completions of those of some groups, in the groups' order."""
        first = torch.tensor(groups, device=self.mask.device)[:, None] * self.group_size
        return (first + torch.arange(self.group_size, device=self.mask.device)).flatten()

    def select(self: Kind, groups: Sequence[int]) -> Kind:
        """Some of the groups, by their indices, trimmed to their longest completion."""
        rows = self.rows(groups)
        steps = int(self.mask[rows].sum(dim=1).max())
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        selected: dict[str, Any] = {
            name: value[rows, :steps] if value.dim() == 2 else value[rows]
            for name, value in values.items()
            if torch.is_tensor(value)
        }
        return dataclasses.replace(self, prompts=tuple(self.prompts[group] for group in groups), **selected)

    def split_by_length(self, size: int, groups: Sequence[int] | None = None) -> list[list[int]]:
        """Indices of the groups, or of some of them, in parts of up to `size` groups of similar length.

        A part is padded to its longest prompt and its longest completion. The longest come first: the memory that the
        first part was given is then large enough for the others.
        """
        completions = self.mask.sum(dim=1).unflatten(0, (-1, self.group_size)).amax(dim=1).tolist()
        fed = [self.group_size * (longest - 1) for longest in completions]  # a last token is never fed
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
    """Completions to learn from, on this rank.

    weights: (B, T), what each token counts for in the loss, computed from the whole step over all ranks.
    """

    weights: torch.Tensor

    @property
    def skips_groups(self) -> bool:
        """Whether groups without a gradient may occur, and are not scored."""
        return False

    def groups_with_gradient(self) -> list[int]:
        """Indices of the groups that need a forward and a backward."""
        return list(range(len(self.prompts)))


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """A scored rollout.

    old_logprobs: (B, T) under the policy that drew the completions. ref_logprobs: (B, T) under the reference; None
    where the loss has no KL term. advantages: (B,).
    """

    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor

    @property
    def skips_groups(self) -> bool:
        # Without a KL term, a group whose advantages are all 0 has no gradient.
        return self.ref_logprobs is None

    def groups_with_gradient(self) -> list[int]:
        if not self.skips_groups:
            return super().groups_with_gradient()
        advantages = self.advantages.unflatten(0, (-1, self.group_size))  # (N, G)
        return advantages.ne(0).any(dim=1).nonzero().flatten().tolist()
