"""Reward columns -> rewards -> group-relative advantages."""

from collections.abc import Sequence

import torch

EPSILON = 1e-4  # added to the standard deviation; the value of R1-AQA's recipe


def weighted_rewards(columns: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Rewards (B,) float32 of reward columns (B, K): r = sum_k w_k R_k.

    Summed column by column in float64, so that equal rows get exactly the same reward. A matrix product may sum each
    row in another order, and round equal rows differently.
    """
    total = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)
    for column, weight in zip(columns.T, weights, strict=True):
        total += column.double() * weight
    return total.float()


def group_advantages(rewards: torch.Tensor, *, group_size: int, scale: str = "std") -> torch.Tensor:
    """Advantages (B,) of rewards (B,): each reward relative to those of its group.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4) over the G rewards of a group, with the sample standard deviation
    (GRPO, DeepSeekMath, arXiv 2402.03300, section 4.1.2). scale="none" omits the division, which gives more
    weight to questions that are almost always or almost never answered correctly (Dr. GRPO, arXiv 2503.20783). A group
    whose rewards are all equal gets exactly 0.
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; an advantage compares completions and needs at least 2")
    if scale not in ("std", "none"):
        raise ValueError(f"scale is {scale!r}; expected 'std' or 'none'")
    groups = rewards.unflatten(0, (-1, group_size))  # (N, G)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "std":
        centred = centred / (groups.std(dim=1, keepdim=True) + EPSILON)
    # The mean of equal numbers may differ from them by rounding, and dividing by EPSILON would amplify that.
    return centred.masked_fill(equal_rewards(rewards, group_size=group_size)[:, None], 0.0).flatten()


def equal_rewards(rewards: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """Whether all rewards of a group are equal, (N,) bool of rewards (B,); such a group has advantages of 0."""
    groups = rewards.unflatten(0, (-1, group_size))
    return groups.amax(dim=1) == groups.amin(dim=1)
