"""How much the completions of a group differ: metrics from which `diagnosis.py` finds what cannot be learnt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hark.from_file import short_name
from hark.grpo.advantage import equal_rewards

VARIANCE = "variance_share/"  # the prefix of metrics that are shares of their sum over all rewards


def group_sums(
    columns: torch.Tensor, texts: Sequence[str], *, weights: dict[str, float], group_size: int, groups: int
) -> dict[str, torch.Tensor | float]:
    """This rank's term of each metric, by reward columns (B, K) and completions; `groups` is their number on all ranks.

    `variance_share/NAME` is the variance of a weighted reward in its group until `shares_of_variance`.
    """
    own: dict[str, torch.Tensor | float] = {}
    for (name, weight), column in zip(weights.items(), columns.T, strict=True):
        variances = (weight * column.double()).unflatten(0, (-1, group_size)).var(dim=1)
        own[f"{VARIANCE}{short_name(name)}"] = variances.sum() / groups
        own[f"equal_share/{short_name(name)}"] = equal_rewards(column, group_size=group_size).sum() / groups
    members = (texts[first : first + group_size] for first in range(0, len(texts), group_size))
    return own | {"distinct_completions": sum(len(set(group)) for group in members) / groups}


def shares_of_variance(means: dict[str, float]) -> dict[str, float]:
    """The metrics with the variances as shares of their sum; without them if no reward differs in any group."""
    variances = {name: value for name, value in means.items() if name.startswith(VARIANCE)}
    total = sum(variances.values())
    others = {name: value for name, value in means.items() if name not in variances}
    return others | ({name: value / total for name, value in variances.items()} if total else {})
