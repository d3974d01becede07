"""Rewards -> group-relative advantages."""

import torch

EPSILON = 1e-4  # beside the standard deviation; the value of R1-AQA's recipe


def group_advantages(rewards: torch.Tensor, *, group_size: int, scale: str = "std") -> torch.Tensor:
    """How much better each completion is than its siblings: advantages (B,) of rewards (B,).

    A_i = (r_i - mean(r)) / (std(r) + 1e-4) over the G rewards of a group, with the sample standard deviation
    (GRPO, DeepSeekMath, arXiv 2402.03300, section 4.1.2). scale="none" leaves the division out, which otherwise
    gives questions that are almost always or almost never answered more say (Dr. GRPO, arXiv 2503.20783).
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; an advantage is relative to siblings and needs at least 2")
    if scale not in ("std", "none"):
        raise ValueError(f"scale is {scale!r}; expected 'std' or 'none'")
    groups = rewards.unflatten(0, (-1, group_size))  # (N, G)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "std":
        centred = centred / (groups.std(dim=1, keepdim=True) + EPSILON)
    # A mean of equal numbers is not always that number; divided by EPSILON, the difference would not be small.
    return centred.masked_fill(equal_rewards(rewards, group_size=group_size)[:, None], 0.0).flatten()


def equal_rewards(rewards: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """Which groups (N,) of rewards (B,) hold one value only, and so have no advantage to learn from."""
    groups = rewards.unflatten(0, (-1, group_size))
    return groups.amax(dim=1) == groups.amin(dim=1)
