"""The settings of `loss` as functions: what a step computes from rewards and logprobs, and what its replay computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hark.grpo.advantage import RewardTable
from hark.grpo.algorithms import find_advantage, find_own_loss
from hark.grpo.config import LossConfig
from hark.grpo.loss import KL, TokenTerms, importance_weights, policy_loss, token_weights


class Objective:
    """loss: the settings. max_new_tokens: of the rollout, the length of token_weights=constant if none is given."""

    def __init__(self, loss: LossConfig, *, max_new_tokens: int):
        self._loss = loss
        self._length = loss.length or max_new_tokens
        self._advantage, self._own = find_advantage(loss.advantage), find_own_loss(loss.kind)

    def counted(self, mask: torch.Tensor, stopped: torch.Tensor) -> torch.Tensor:
        """The tokens (B, T) to train on, of those of `mask`: with truncated=mask only completions that stopped."""
        return mask & stopped[:, None] if self._loss.truncated == "mask" else mask

    def weights(self, counted: torch.Tensor, *, completions: float, tokens: float) -> torch.Tensor:
        """Token weights (B, T); completions, tokens: how many the step has over all ranks, tokens of those counted."""
        return token_weights(
            counted, kind=self._loss.token_weights, completions=completions, tokens=tokens, length=self._length
        )

    def penalties(
        self, old_logprobs: torch.Tensor, ref_logprobs: torch.Tensor | None, mask: torch.Tensor, beta: float
    ) -> torch.Tensor | None:
        """beta * KL (B, T), to subtract from the rewards; None unless kl_in=reward."""
        if self._loss.kl_in != "reward" or ref_logprobs is None:
            return None
        return beta * KL[self._loss.kl](old_logprobs, ref_logprobs) * mask

    def advantages(
        self,
        columns: torch.Tensor,
        reward_weights: Sequence[float],
        mask: torch.Tensor,
        penalties: torch.Tensor | None,
        *,
        group_size: int,
    ) -> torch.Tensor:
        """Advantages (B,), or (B, T) and 0 at padding, of all completions of a step, over all ranks."""
        table = RewardTable(columns, reward_weights, group_size, mask.sum(dim=1), penalties)
        advantages = self._advantage(table)
        if penalties is not None:
            advantages = advantages + 0.0 * penalties.sum()  # what is not finite must not be taken for a missing reward
        return advantages if advantages.dim() == 1 else advantages * mask

    def loss(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor | None,
        advantages: torch.Tensor,
        weights: torch.Tensor,
        *,
        mask: torch.Tensor,
        beta: float,
        sampled_logprobs: torch.Tensor | None,
        entropy: torch.Tensor,
    ) -> tuple[torch.Tensor, TokenTerms]:
        """`policy_loss` with the settings, and the terms "importance" and "importance_capped" of a differing sampler.

        beta: the KL weight of the step, which may be adapted. sampled_logprobs: (B, T) of a sampler that differs; None
        for one that does not. entropy: (B, T).
        """
        loss, importance = self._loss, None
        if sampled_logprobs is not None:
            importance = importance_weights(old_logprobs, sampled_logprobs, cap=loss.importance_cap)
        total, terms = policy_loss(
            logprobs, old_logprobs, ref_logprobs, advantages, weights, mask=mask, ratio=loss.ratio, bound=loss.bound,
            clip_low=loss.clip_low, clip_high=loss.clip_high, ratio_cap=loss.ratio_cap,
            gate_up=loss.gate_up, gate_down=loss.gate_down, own=self._own,
            beta=beta if loss.kl_in == "loss" else 0.0, kl=loss.kl, kl_gradient=loss.kl_gradient,
            importance=importance, entropy=entropy, entropy_weight=loss.entropy,
        )  # fmt: skip
        if importance is not None:
            terms |= {"importance": importance, "importance_capped": importance == loss.importance_cap}
        return total, terms
