"""The distribution over the next token, from which completions are drawn and under which they are scored.

The sampler and the scorer both use `log_distribution`, so that their logprobs are equal up to rounding.
"""

from __future__ import annotations

import torch

from hark.models.policy import Policy


def log_distribution(policy: Policy, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logprobs (..., V) in float32 of the next token after hidden states (..., D).

    log softmax(logits / temperature), where the policy's suppressed ids have probability 0.
    """
    logits = policy.logits(hidden) / temperature
    for neighbours in policy.suppressed_runs:  # by slices: indexing by a list copies the list to the device
        logits[..., neighbours] = -torch.inf
    return logits.log_softmax(dim=-1)


def draw_tokens(distribution: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens (n, g) drawn from logprobs (n, V): the inverse of the cumulative distribution at uniform (n, g) in [0, 1).

    In float64, because a float32 sum over a vocabulary of 150,000 would round rare tokens to probability 0.
    """
    cumulative = distribution.double().exp().cumsum(dim=-1)
    target = uniform * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=distribution.shape[-1] - 1)


def entropy(distribution: torch.Tensor) -> torch.Tensor:
    """Entropy (...) in nats of logprobs (..., V)."""
    # A suppressed id has logprob -inf, and 0 * -inf is nan. Clamped to a finite number it adds 0.
    finite = distribution.clamp(min=torch.finfo(distribution.dtype).min)
    return -(distribution.exp() * finite).sum(dim=-1)
