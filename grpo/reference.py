"""The reference of the KL term: its logprobs, its weight beta, and how both may change from step to step."""

from __future__ import annotations

from typing import Any

import torch

from hark.grpo.config import LossConfig
from hark.grpo.loss import adapted_beta
from hark.grpo.prefill import prefilled
from hark.grpo.runtime.sharding import mix_weights, release
from hark.grpo.scorer import score
from hark.grpo.types import Rollout
from hark.models.lora import WithoutAdapters
from hark.models.policy import Policy


class Reference:
    """policy: has no gradient; None if loss.beta is 0. completions: of a step, over all ranks.

    beta: the KL weight of the next step; with loss.kl_target it changes.
    """

    def __init__(self, policy: Policy | WithoutAdapters | None, loss: LossConfig, *, completions: int):
        self.policy, self.beta = policy, loss.beta
        self._loss, self._completions = loss, completions

    @property
    def in_loss(self) -> bool:
        """Whether the loss has a KL term."""
        return self.policy is not None and self._loss.kl_in == "loss"

    def move(self, policy: Policy, step: int) -> None:
        """After a step: move towards the policy where loss.reference_every says so."""
        if self._loss.reference_every and (step + 1) % self._loss.reference_every == 0:
            assert isinstance(self.policy, Policy)
            mix_weights(policy, self.policy, share=self._loss.reference_mix)

    def adapt(self, kl: float | None) -> None:
        """After a step: adapt beta to the step's KL where loss.kl_target says so; None if no token was scored."""
        if self._loss.kl_target is not None and kl is not None:
            self.beta = adapted_beta(
                self.beta, kl, target=self._loss.kl_target, completions=self._completions,
                horizon=self._loss.kl_horizon,
            )  # fmt: skip

    def figures(self) -> dict[str, float]:
        """The metrics of a step: beta, where it changes."""
        return {} if self._loss.kl_target is None else {"beta": self.beta}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the beta of a checkpoint, where it changes; else it is that of the configuration."""
        if self._loss.kl_target is not None:
            self.beta = state.get("beta", self.beta)

    def further_policies(self) -> dict[str, Policy]:
        """The policy, by its name in a checkpoint, if its weights change."""
        return {"reference": self.policy} if self._loss.reference_every and isinstance(self.policy, Policy) else {}


@torch.no_grad()
def rollout_logprobs(
    policy: Policy | WithoutAdapters,
    rollout: Rollout,
    *,
    micro_batch: int,
    temperature: float,
    micro_branches: int | None = None,
) -> torch.Tensor:
    """Logprobs (B, T) of the completions under a policy, `micro_batch` groups at a time, `micro_branches` of each."""
    logprobs, parts = torch.zeros_like(rollout.logprobs), rollout.branches(micro_branches)
    for groups in rollout.split_by_length(micro_batch):
        prompts = [rollout.prompts[group] for group in groups]
        prefix = prefilled(policy, prompts).select(range(len(prompts))) if len(parts) > 1 else None
        for branches in parts:
            micro = rollout.select(groups, branches)
            part, _ = score(
                policy, prompts, micro.tokens, micro.mask, group_size=micro.group_size, temperature=temperature,
                prefix=prefix,
            )  # fmt: skip
            logprobs[rollout.rows(groups, branches), : part.shape[1]] = part
    if isinstance(policy, Policy):
        release(policy)
    return logprobs
