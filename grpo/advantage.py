"""Reward columns -> rewards -> advantages; each docstring has its equation and its source.

NaN in a reward column is a reward that was not given. A completion without any reward has the reward NaN, belongs to no
mean and to no deviation, and has an advantage of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

EPSILON = 1e-4  # added to a standard deviation; the value of TRL and of R1-AQA's recipe


class RewardTable(NamedTuple):
    """The rewards of a whole step, of all ranks; its B completions are in groups of `group_size`.

    columns: (B, K), NaN where a reward was not given; weights: K; lengths: (B,) completion tokens.
    penalties: (B, T), what is subtracted from the reward at each token (beta * KL); None without a KL in the reward.
    """

    columns: torch.Tensor
    weights: Sequence[float]
    group_size: int
    lengths: torch.Tensor
    penalties: torch.Tensor | None = None

    @property
    def rewards(self) -> torch.Tensor:
        """(B,) float64: the weighted sum of the rewards, less the penalties of all tokens."""
        rewards = weighted_rewards(self.columns, self.weights).double()
        return rewards if self.penalties is None else rewards - self.penalties.double().sum(dim=1)


Advantage = Callable[[RewardTable], torch.Tensor]  # -> (B,) or (B, T)


def weighted_rewards(columns: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Rewards (B,) float32 of reward columns (B, K): r = sum_k w_k R_k over the rewards that were given.

    Summed column by column in float64, so that equal rows get exactly the same reward. A matrix product may sum each
    row in another order, and round equal rows differently.
    """
    total = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)
    for column, weight in zip(columns.T, weights, strict=True):
        total += column.double().nan_to_num(nan=0.0) * weight
    return total.masked_fill(columns.isnan().all(dim=1), torch.nan).float()


def group_advantages(
    rewards: torch.Tensor, *, group_size: int, baseline: str = "mean", scale: str = "std"
) -> torch.Tensor:
    """Advantages (B,) float32 of rewards (B,): each reward relative to those of its group.

    A_i = (r_i - b_i) / (s + 1e-4)

    baseline: "mean", the mean of the group (GRPO, DeepSeekMath, arXiv 2402.03300, section 4.1.2); "others", the mean of
    the other completions of the group (RLOO, arXiv 2402.14740, equation 9).
    scale: "std", the sample standard deviation of the group (R1-AQA, TRL, verl); "population", with G in place of
    G - 1; "batch", the sample standard deviation of all rewards of the step (Lite-PPO, arXiv 2508.08221, as TRL's
    scale_rewards="batch"); "none" does not divide, which gives more weight to questions that are almost always or
    almost never answered right (Dr. GRPO, arXiv 2503.20783).

    A group whose rewards are all equal, or of one completion, gets exactly 0.
    """
    if scale not in ("std", "population", "batch", "none") or baseline not in ("mean", "others"):
        raise ValueError(
            f"baseline is {baseline!r} and scale is {scale!r}; expected 'mean' or 'others', and 'std', 'population', "
            "'batch' or 'none'"
        )
    groups = rewards.double().unflatten(0, (-1, group_size))  # (N, G)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    given = (~groups.isnan()).sum(dim=1, keepdim=True)
    if baseline == "others":
        # r_i - (sum - r_i) / (G - 1) = (r_i - mean) * G / (G - 1)
        centred = centred * given / (given - 1).clamp(min=1)
    if scale == "batch":
        centred = centred / (_deviation(groups.reshape(1, -1)) + EPSILON)
    elif scale != "none":
        centred = centred / (_deviation(groups, freedom=int(scale == "std")) + EPSILON)
    # The mean of equal numbers may differ from them by rounding, and dividing by EPSILON would amplify that.
    equal = equal_rewards(rewards, group_size=group_size)[:, None]
    return centred.masked_fill(equal | groups.isnan(), 0.0).flatten().float()


def equal_rewards(rewards: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """Whether all rewards of a group that were given are equal, (N,) bool of rewards (B,)."""
    groups = rewards.unflatten(0, (-1, group_size))
    missing = groups.isnan()
    return groups.masked_fill(missing, -torch.inf).amax(dim=1) <= groups.masked_fill(missing, torch.inf).amin(dim=1)


def deviations(rewards: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """The sample standard deviation (N,) of the rewards (B,) of each group; 0 for fewer than two that were given."""
    return _deviation(rewards.double().unflatten(0, (-1, group_size))).squeeze(1)


def reward_itself(table: RewardTable) -> torch.Tensor:
    """A_i = r_i: no baseline (REINFORCE, Williams 1992)."""
    return _zero_where_missing(table.rewards, table.rewards)


def gdpo(table: RewardTable) -> torch.Tensor:
    """Each reward is standardised in its group, and their weighted sum in the step (GDPO, arXiv 2601.05242, eq. 4-6).

    z_k = (R_k - mean) / (std + 1e-4);  A = (x - mean(x)) / (std(x) + 1e-4) with x = sum_k w_k z_k

    Sample deviations, over completions, as TRL and the authors' code have it; verl whitens over tokens, NeMo-RL without
    an epsilon. Penalties are one more reward, of weight 1.
    """
    columns = list(table.columns.double().T)
    weights = list(table.weights)
    if table.penalties is not None:
        columns, weights = [*columns, -table.penalties.double().sum(dim=1)], [*weights, 1.0]
    missing = table.rewards.isnan()
    standard = torch.stack([group_advantages(column, group_size=table.group_size) for column in columns], dim=1)
    total = weighted_rewards(standard, weights).double().masked_fill(missing, torch.nan)
    # The mean of the step is 0: the sum over each group is.
    return _zero_where_missing(total / (_deviation(total[None]).squeeze() + EPSILON), table.rewards)


def reinforce_pp(table: RewardTable) -> torch.Tensor:
    """The return of each token, standardised over all tokens of the step (REINFORCE++, arXiv 2501.03262, eq. 8-10).

    G_t = r - sum_{s >= t} penalty_s;  A_t = (G_t - mean) / sqrt(var + 1e-8), the sample variance, as in verl
    """
    return _whitened(table, _without_penalties(table))


def reinforce_pp_baseline(table: RewardTable) -> torch.Tensor:
    """REINFORCE++ of rewards less the mean of their group (arXiv 2501.03262, equation 11)."""
    groups = _without_penalties(table).unflatten(0, (-1, table.group_size))
    return _whitened(table, (groups - groups.nanmean(dim=1, keepdim=True)).flatten())


def opo(table: RewardTable) -> torch.Tensor:
    """A_i = r_i - sum_j |o_j| r_j / sum_j |o_j|: the baseline of least variance (OPO, arXiv 2505.23585, equation 7)."""
    groups = table.rewards.unflatten(0, (-1, table.group_size))
    lengths = table.lengths.double().unflatten(0, (-1, table.group_size)).masked_fill(groups.isnan(), 0.0)
    lengths = torch.where(lengths.sum(dim=1, keepdim=True) > 0, lengths, 1.0)
    baseline = (lengths * groups.nan_to_num(nan=0.0)).sum(dim=1, keepdim=True) / lengths.sum(dim=1, keepdim=True)
    equal = equal_rewards(table.rewards, group_size=table.group_size)[:, None]
    return _zero_where_missing((groups - baseline).masked_fill(equal, 0.0).flatten(), table.rewards)


def pass_at_k(table: RewardTable) -> torch.Tensor:
    """The best completion of a group gets its lead over the second best, all others 0 (arXiv 2503.19595, equation 12).

    A tie for the best, and a group of one completion, gives 0.
    """
    groups = table.rewards.unflatten(0, (-1, table.group_size))
    if table.group_size == 1:
        return torch.zeros_like(table.rewards, dtype=torch.float32)
    best = groups.masked_fill(groups.isnan(), -torch.inf).topk(2, dim=1)
    lead = (best.values[:, :1] - best.values[:, 1:]).masked_fill(best.values[:, 1:].isneginf(), 0.0)
    return torch.zeros_like(groups).scatter(1, best.indices[:, :1], lead).flatten().float()


def _relative(**settings: str) -> Advantage:
    return lambda table: group_advantages(table.rewards, group_size=table.group_size, **settings)


ADVANTAGES: dict[str, Advantage] = {
    "std": _relative(scale="std"),
    "population": _relative(scale="population"),
    "none": _relative(scale="none"),
    "batch": _relative(scale="batch"),
    "leave_one_out": _relative(baseline="others", scale="none"),
    "reward": reward_itself,
    "gdpo": gdpo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "opo": opo,
    "pass_at_k": pass_at_k,
}
WITHOUT_GROUP = ("reward", "reinforce_pp")  # those that a group of one completion does not set to 0


def _deviation(rows: torch.Tensor, *, freedom: int = 1) -> torch.Tensor:
    """Standard deviations (N, 1) of rows (N, X) without their NaN; 0 for fewer than two numbers."""
    squares = (rows - rows.nanmean(dim=1, keepdim=True)).square().nansum(dim=1, keepdim=True)
    return (squares / ((~rows.isnan()).sum(dim=1, keepdim=True) - freedom).clamp(min=1)).sqrt()


def _zero_where_missing(advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    return advantages.masked_fill(rewards.isnan(), 0.0).float()


def _without_penalties(table: RewardTable) -> torch.Tensor:
    return table._replace(penalties=None).rewards


def _whitened(table: RewardTable, rewards: torch.Tensor) -> torch.Tensor:
    """Returns of tokens, standardised over the step: (B, T) with penalties, else (B,), equal for a row's tokens."""
    lengths = table.lengths.masked_fill(rewards.isnan(), 0)
    returns = rewards.nan_to_num(nan=0.0)[:, None]  # (B, 1)
    counts = lengths.double()[:, None]
    if table.penalties is not None:
        returns = returns - table.penalties.double().flip(1).cumsum(dim=1).flip(1)  # (B, T)
        counts = (torch.arange(returns.shape[1], device=lengths.device) < lengths[:, None]).double()
    total = counts.sum().clamp(min=1)
    centred = returns - (counts * returns).sum() / total
    variance = (counts * centred.square()).sum() / (total - 1).clamp(min=1)
    white = (centred * (variance + 1e-8).rsqrt()).masked_fill(counts == 0, 0.0).float()
    return white if table.penalties is not None else white.squeeze(1)
