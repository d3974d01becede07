"""Token weights, KL estimators and the policy losses; each docstring has its equation and its source.

A policy loss is composed of three choices: the ratio (RATIOS), its bound (BOUNDS) and the weights of the tokens
(`token_weights`). `algorithms.py` lists the compositions that have a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

# Name -> a value (B, T) for each token, without a gradient. "loss" is weighted and adds up to the loss of the step over
# all tokens of all ranks; the others are not weighted.
TokenTerms = dict[str, torch.Tensor]


def token_weights(
    mask: torch.Tensor, *, kind: str, completions: float, tokens: float, length: float | None = None
) -> torch.Tensor:
    """Weights (B, T) of the tokens; the loss of a step is the sum over all tokens of all ranks, weighted by them.

    "sequence-mean": 1 / (completions * |o_i|), the mean over completions of the mean over tokens (GRPO, R1-AQA).
    "token-mean": 1 / tokens, the mean over all tokens, so that longer completions weigh more (DAPO, arXiv 2503.14476).
    "constant": 1 / (completions * length), whatever the lengths are (Dr. GRPO, arXiv 2503.20783, appendix A).
    mask: (B, T), True where a token counts. completions, tokens: how many the whole step has, over all ranks; of the
    tokens those that count. length: of the longest possible completion.
    """
    if kind == "sequence-mean":
        return mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * completions)
    if kind == "token-mean":
        return mask / max(tokens, 1)
    if kind == "constant" and length:
        return mask / (completions * length)
    raise ValueError(
        f"token weights are {kind!r} and length is {length}; expected 'sequence-mean', 'token-mean', or 'constant' "
        "with a length"
    )


# Ratio --------------------------------------------------------------------------------------------------------------
# Of log ratios log(pi / pi_old) (B, T) at completion tokens, where `counts` (B, T) is True.


def token_ratio(log_ratio: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """rho_t = pi(o_t) / pi_old(o_t)"""
    return log_ratio.exp()


def sequence_ratio(log_ratio: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """s = (pi(o) / pi_old(o)) ** (1 / |o|), the same for all tokens (GSPO, arXiv 2507.18071, equation 7)."""
    lengths = counts.sum(dim=1, keepdim=True).clamp(min=1)
    return ((log_ratio * counts).sum(dim=1, keepdim=True) / lengths).exp().expand_as(log_ratio)


def sequence_product(log_ratio: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """pi(o) / pi_old(o), the same for all tokens: a completion is one action (RLOO, arXiv 2402.14740)."""
    return (log_ratio * counts).sum(dim=1, keepdim=True).exp().expand_as(log_ratio)


RATIOS = {"token": token_ratio, "sequence": sequence_ratio, "sequence_product": sequence_product}


# Bound --------------------------------------------------------------------------------------------------------------
# Of a ratio (B, T): the loss (B, T) of each token, and where the bound stops or changes its gradient.


class Limits(NamedTuple):
    """The limits of a ratio: 1 - low to 1 + high; `cap` where the advantage is negative; SAPO's gates."""

    low: float
    high: float
    cap: float | None
    gate_up: float
    gate_down: float


Bounded = tuple[torch.Tensor, torch.Tensor]


def clip(ratio: torch.Tensor, logprobs: torch.Tensor, advantage: torch.Tensor, limits: Limits) -> Bounded:
    """-min(rho * A, clip(rho, 1 - low, 1 + high) * A) (PPO, arXiv 1707.06347, equation 7); DAPO's `high` is larger.

    With a cap, at negative advantages at most -cap * A: dual clip (arXiv 1912.09729, equation 5). The two-sided clip
    of INTELLECT-2 (arXiv 2505.07291), min(rho, cap) before the minimum, is the same function for a cap above 1 + high.
    """
    clipped = ratio.clamp(1 - limits.low, 1 + limits.high) * advantage
    surrogate = torch.minimum(ratio * advantage, clipped)
    stopped = clipped < ratio * advantage
    if limits.cap is not None:
        least = limits.cap * advantage
        capped = (advantage < 0) & (surrogate < least)
        surrogate, stopped = torch.where(capped, least, surrogate), stopped | capped
    return -surrogate, stopped


def cispo(ratio: torch.Tensor, logprobs: torch.Tensor, advantage: torch.Tensor, limits: Limits) -> Bounded:
    """-sg(clip(rho, 1 - low, 1 + high)) * A * log pi (CISPO, arXiv 2506.13585, equations 4 and 5)."""
    weight = ratio.detach().clamp(1 - limits.low, 1 + limits.high)
    return -weight * advantage * logprobs, weight != ratio.detach()


def sapo(ratio: torch.Tensor, logprobs: torch.Tensor, advantage: torch.Tensor, limits: Limits) -> Bounded:
    """-(4 / tau) * sigmoid(tau * (rho - 1)) * A (SAPO, arXiv 2511.20347, equations 5 and 6).

    tau is `gate_up` where A > 0 and `gate_down` elsewhere. Nothing is stopped: the gradient falls off smoothly.
    """
    tau = torch.where(advantage > 0, limits.gate_up, limits.gate_down)
    return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantage, torch.zeros_like(ratio, dtype=torch.bool)


def unbounded(ratio: torch.Tensor, logprobs: torch.Tensor, advantage: torch.Tensor, limits: Limits) -> Bounded:
    """-rho * A: importance sampling without a bound."""
    return -ratio * advantage, torch.zeros_like(ratio, dtype=torch.bool)


def reinforce(ratio: torch.Tensor, logprobs: torch.Tensor, advantage: torch.Tensor, limits: Limits) -> Bounded:
    """-A * log pi (REINFORCE, Williams 1992); the ratio has no part in it."""
    return -advantage * logprobs, torch.zeros_like(ratio, dtype=torch.bool)


BOUNDS = {"clip": clip, "cispo": cispo, "sapo": sapo, "none": unbounded, "reinforce": reinforce}

# A user's own loss: (logprobs, old_logprobs, advantages, mask) -> the loss of each token, all (B, T)
OwnLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# KL to the reference ------------------------------------------------------------------------------------------------
# Estimates of KL(policy || reference) at each sampled token (Schulman, "Approximating KL divergence", 2020).


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k1 = log(pi / pi_ref): unbiased, and negative for some tokens. Its gradient is 0 on average."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k2 = log(pi / pi_ref) ** 2 / 2: biased, but its gradient is on average that of the KL."""
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k3 = pi_ref / pi - log(pi_ref / pi) - 1: unbiased and never negative (GRPO, arXiv 2402.03300, equation 4)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def kl_term(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, *, kl: str, gradient: str
) -> torch.Tensor:
    """The KL (B, T) of the loss: the value of an estimate, with the gradient that `gradient` says.

    "own": that of the estimate itself (GRPO). "k2": that of k2, which is right on average (verl's "k3+"). "ratio": the
    estimate times pi / pi_old, whose gradient is right on average (DeepSeek-V3.2, arXiv 2512.02556, equation 7).
    """
    estimate = KL[kl](logprobs, ref_logprobs)
    if gradient == "own":
        return estimate
    if gradient == "k2":
        other = kl_k2(logprobs, ref_logprobs)
        return estimate.detach() + other - other.detach()
    if gradient == "ratio":
        return (logprobs - old_logprobs).exp() * estimate
    raise ValueError(f"the gradient of the KL is {gradient!r}; expected 'own', 'k2' or 'ratio'")


def adapted_beta(beta: float, kl: float, *, target: float, completions: float, horizon: float) -> float:
    """The KL weight of the next step: larger if the KL of this one was above its target (arXiv 1909.08593, eq. 4).

    beta * (1 + e * completions / horizon), e = clip(kl / target - 1, -0.2, 0.2)
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * completions / horizon)


# Losses -------------------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    ratio: str = "token",
    bound: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float | None = None,
    gate_up: float = 1.0,
    gate_down: float = 1.05,
    own: OwnLoss | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    kl_gradient: str = "own",
    mask: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    entropy_weight: float = 0.0,
) -> tuple[torch.Tensor, TokenTerms]:
    """The loss of a policy, and its terms; with the defaults that of GRPO (arXiv 2402.03300, equation 3, negated).

    loss = sum_t w_t * ( importance_t * bound(ratio_t, A) + beta * KL_t - entropy_weight * H_t )

    logprobs, old_logprobs, ref_logprobs, weights, entropy: (B, T), 0 at padding; advantages: (B,) or (B, T). The
    weights contain every normalisation, so losses of micro-batches and ranks are summed. mask: (B, T), the completion
    tokens; None is where the weights are not 0. own: takes the place of ratio and bound. importance: (B, T), factors
    without a gradient (`importance_weights`). ref_logprobs may be None if beta is 0.
    Terms: "ratio", "clipped" (where the bound stops or changes the gradient), "kl" with a reference, and "loss".
    """
    counts = weights != 0 if mask is None else mask
    advantage = advantages[:, None] if advantages.dim() == 1 else advantages
    ratios = RATIOS[ratio](logprobs - old_logprobs, counts)
    if own is None:
        limits = Limits(clip_low, clip_high, ratio_cap, gate_up, gate_down)
        loss, clipped = BOUNDS[bound](ratios, logprobs, advantage, limits)
    else:
        loss, clipped = own(logprobs, old_logprobs, advantage.expand_as(logprobs), counts), torch.zeros_like(counts)
    terms = {"ratio": ratios, "clipped": clipped}
    if importance is not None:
        loss = importance * loss
    if ref_logprobs is not None:
        terms["kl"] = KL[kl](logprobs, ref_logprobs)
        if beta:
            loss = loss + beta * kl_term(logprobs, old_logprobs, ref_logprobs, kl=kl, gradient=kl_gradient)
    elif beta != 0:
        raise ValueError(f"beta is {beta}; a KL term needs the reference's logprobs")
    if entropy_weight:
        assert entropy is not None
        loss = loss - entropy_weight * entropy
    terms["loss"] = weights * loss
    return terms["loss"].sum(), {name: value.detach() for name, value in terms.items()}


def importance_weights(old_logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, *, cap: float) -> torch.Tensor:
    """min(pi_old / pi_sampler, cap) at each token (B, T), without a gradient: truncated importance sampling.

    For a sampler whose probabilities differ from those of training (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"; TRL's and verl's cap is 2).
    """
    return (old_logprobs - sampled_logprobs).detach().exp().clamp(max=cap)


def supervised_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, TokenTerms]:
    """Negative log-likelihood of given completions: -sum_t w_t * log pi(t)."""
    loss = weights * -logprobs
    return loss.sum(), {"loss": loss.detach()}
