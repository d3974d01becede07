"""The values that pass between the stages of a step, and the letters for their dimensions.

    N  prompts            G  completions per prompt (the group)     B  completions, N * G; b = n * G + g
    P  prompt tokens      T  completion tokens                      V  vocabulary       D  hidden size
    L  queries: tokens fed to the decoder   S  keys: tokens attended to
    M  mel bins           F  mel frames     K  reward functions     R  rows of the KV cache

`mask` is True at completion tokens and False at padding. Every (B, T) float is exactly 0 at padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.functional import pad

from hark.models.policy import Prompt

if TYPE_CHECKING:
    from hark.grpo.prefill import Prefill

AnyGroups = TypeVar("AnyGroups", bound="Groups")


def stacked(tensors: Sequence[torch.Tensor], *, value: float = 0) -> torch.Tensor:
    """Tensors under one another; those of (B, T, ...) are padded with `value` to the longest T."""
    if tensors[0].dim() < 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    missing = [(0, 0) * (tensor.dim() - 2) + (0, longest - tensor.shape[1]) for tensor in tensors]
    return torch.cat([pad(tensor, sides, value=value) for tensor, sides in zip(tensors, missing, strict=True)])


@dataclass(frozen=True)
class Groups:
    """N groups: N prompts with G completions each. The scorer computes a group as one row (tree.py).

    tokens: (B, T) int64, the stop token included, padded with `pad_id`.
    mask: (B, T) bool, never derived from the ids, because `pad_id` may be a stop token.
    """

    prompts: tuple[Prompt, ...]
    group_size: int
    tokens: torch.Tensor
    mask: torch.Tensor

    def rows(self, groups: Sequence[int], branches: range | None = None) -> torch.Tensor:
        """Indices of the completions of the given groups, in the order of `groups`; of each the given ones or all."""
        first = torch.tensor(groups, device=self.mask.device)[:, None] * self.group_size
        return (first + torch.tensor(branches or range(self.group_size), device=self.mask.device)).flatten()

    def branches(self, size: int | None) -> list[range]:
        """The completions of a group, `size` at a time; None is all."""
        size = size or self.group_size
        return [range(n, min(n + size, self.group_size)) for n in range(0, self.group_size, size)]

    def select(self: AnyGroups, groups: Sequence[int], branches: range | None = None) -> AnyGroups:
        """The groups with the given indices, with T cut to their longest completion; of each the given completions."""
        rows = self.rows(groups, branches)
        steps = int(self.mask[rows].sum(dim=1).max())
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        selected: dict[str, Any] = {
            name: value[rows, :steps] if value.dim() == 2 else value[rows]
            for name, value in values.items()
            if torch.is_tensor(value)
        }
        size = len(branches or range(self.group_size))
        prompts = tuple(self.prompts[group] for group in groups)
        return dataclasses.replace(self, prompts=prompts, group_size=size, **selected)

    def split_by_length(self, size: int, groups: Sequence[int] | None = None) -> list[list[int]]:
        """Split all groups, or the given ones, into lists of up to `size` indices of groups of similar length.

        Each list is padded to its longest prompt and its longest completion. The longest groups come first, so that the
        others fit in the memory that these allocated.
        """
        longest = self.mask.sum(dim=1).unflatten(0, (-1, self.group_size)).amax(dim=1).tolist()
        fed = [self.group_size * (steps - 1) for steps in longest]  # a completion's last token is never fed
        lengths = [len(prompt.ids) + tokens for prompt, tokens in zip(self.prompts, fed, strict=True)]
        order = sorted(range(len(lengths)) if groups is None else groups, key=lambda group: -lengths[group])
        return [order[first : first + size] for first in range(0, len(order), size)]


@dataclass(frozen=True)
class Rollout(Groups):
    """Completions drawn from the policy.

    logprobs: (B, T) float32 of each token under the distribution it was drawn from.
    stopped: (B,) bool, False where the completion has no stop token because it reached the token limit.
    prefill: the prompts' forward with its graph, if it was kept.
    """

    logprobs: torch.Tensor
    stopped: torch.Tensor
    prefill: Prefill | None = None


@dataclass(frozen=True)
class Batch(Groups):
    """This rank's completions to train on.

    weights: (B, T), the weight of each token in the loss, normalised over the whole step and all ranks.
    prefill: the prompts' forward with its graph, which the first update of a step uses; None computes it.
    """

    weights: torch.Tensor
    prefill: Prefill | None = field(default=None, kw_only=True)

    @property
    def skips_groups(self) -> bool:
        """Whether groups without a gradient may occur; they are not scored."""
        return False

    def groups_with_gradient(self) -> list[int]:
        """Indices of the groups that need a forward and a backward."""
        return list(range(len(self.prompts)))


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """A rollout with the other inputs of the policy loss.

    old_logprobs: (B, T) under the weights that drew the completions. ref_logprobs: (B, T) under the reference; None
    without one. advantages: (B,), or (B, T) where they differ by token.
    beta: the KL weight of this step. regularised: whether the loss has a KL or an entropy term.
    sampled_logprobs: (B, T) as the sampler computed them, where `old_logprobs` are those of the scorer; else None.
    given: the right answers, for the supervised term; None without it.
    """

    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    beta: float = 0.0
    regularised: bool = False
    sampled_logprobs: torch.Tensor | None = None
    given: Batch | None = None

    @property
    def skips_groups(self) -> bool:
        # Without a KL or an entropy term, a group whose advantages are all 0 has no gradient.
        return not self.regularised

    def groups_with_gradient(self) -> list[int]:
        if not self.skips_groups:
            return super().groups_with_gradient()
        advantages = self.advantages.unflatten(0, (-1, self.group_size)).flatten(1)  # (N, G) or (N, G * T)
        return advantages.ne(0).any(dim=1).nonzero().flatten().tolist()
