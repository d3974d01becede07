"""Token weights, the KL estimator, and the losses; each docstring has its equation."""

from __future__ import annotations

import torch

# Name -> a value (B, T) for each token, without a gradient. "loss" is weighted and adds up to the loss of the step over
# all tokens of all ranks; the others are not weighted.
TokenTerms = dict[str, torch.Tensor]


def token_weights(mask: torch.Tensor, *, kind: str, completions: float, tokens: float) -> torch.Tensor:
    """Weights (B, T) of the tokens; the loss of a step is the sum over all tokens of all ranks, weighted by them.

    "sequence-mean": 1 / (completions * |o_i|), the mean over completions of the mean over tokens (GRPO, R1-AQA).
    "token-mean": 1 / tokens, the mean over all tokens, so that longer completions weigh more (DAPO, arXiv 2503.14476).
    completions, tokens: how many the whole step has, over all ranks.
    """
    if kind == "sequence-mean":
        return mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * completions)
    if kind == "token-mean":
        return mask / tokens
    raise ValueError(f"token weights are {kind!r}; expected 'sequence-mean' or 'token-mean'")


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) at each sampled token (GRPO, equation 4).

    k3 = pi_ref / pi - log(pi_ref / pi) - 1
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    beta: float,
) -> tuple[torch.Tensor, TokenTerms]:
    """The GRPO objective, negated (arXiv 2402.03300, equation 3), and its terms.

    rho = pi / pi_old
    loss = sum_t w_t * ( -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A) + beta * k3 )

    logprobs, old_logprobs, ref_logprobs, weights: (B, T), 0 at padding; advantages: (B,). The weights contain
    every normalisation, so losses of micro-batches and ranks are summed. ref_logprobs may be None if beta is 0.
    Terms: "ratio", "clipped" (where the clipped product is the smaller one), "kl" with a reference, and "loss".
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    advantage = advantages[:, None]
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    loss = weights * -surrogate
    terms = {"ratio": ratio, "clipped": clipped * advantage < ratio * advantage}
    if ref_logprobs is not None:
        terms["kl"] = kl_k3(logprobs, ref_logprobs)
        loss = loss + beta * weights * terms["kl"]
    elif beta != 0:
        raise ValueError(f"beta is {beta}; a KL term needs the reference's logprobs")
    terms["loss"] = loss
    return loss.sum(), {name: value.detach() for name, value in terms.items()}


def supervised_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, TokenTerms]:
    """Negative log-likelihood of given completions: -sum_t w_t * log pi(t)."""
    loss = weights * -logprobs
    return loss.sum(), {"loss": loss.detach()}
