"""The completions of groups: the best and the worst of each, and metrics of how much they differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hark.from_file import short_name
from hark.grpo.advantage import deviations, equal_rewards
from hark.grpo.instruments.console import Completion

SHOWN = 3  # groups of which completions are shown
GIVEN = "given/"  # the prefix of the number of values of a reward that were given
VARIANCE = "variance_share/"  # the prefix of metrics that are shares of their sum over all rewards


def group_sums(
    columns: torch.Tensor, texts: Sequence[str], *, weights: dict[str, float], group_size: int, groups: int
) -> dict[str, torch.Tensor | float]:
    """This rank's term of each metric, by reward columns (B, K) and completions; `groups` is their number on all ranks.

    `variance_share/NAME` is the variance of a weighted reward in its group until `shares_of_variance`.
    """
    own: dict[str, torch.Tensor | float] = {}
    for (name, weight), column in zip(weights.items(), columns.T, strict=True):
        variances = deviations(weight * column, group_size=group_size).square()
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


def reward_means(sums: dict[str, float]) -> dict[str, float]:
    """The metrics with each `reward/NAME` divided by `given/NAME`, its number of values; without those of no value."""
    counts = {name.removeprefix(GIVEN): value for name, value in sums.items() if name.startswith(GIVEN)}
    means = {f"reward/{name}": sums[f"reward/{name}"] / count for name, count in counts.items() if count}
    removed = {f"{prefix}{name}" for name in counts for prefix in ("reward/", GIVEN)}
    return {name: value for name, value in sums.items() if name not in removed} | means


def best_and_worst(
    examples: Sequence[Any],
    texts: Sequence[str],
    columns: torch.Tensor,
    rewards: torch.Tensor,
    advantages: torch.Tensor,
    *,
    names: Iterable[str],
    group_size: int,
) -> list[Completion]:
    """The completions with the highest and the lowest reward of a few groups, evenly spread.

    examples, texts: B each, columns: (B, K) with K names, rewards, advantages: (B,).
    """
    groups = rewards.unflatten(0, (-1, group_size))  # (N, G)
    shown = range(0, len(groups), max(len(groups) // SHOWN, 1))[:SHOWN]
    high, low = groups.nan_to_num(nan=-torch.inf).argmax(dim=1), groups.nan_to_num(nan=torch.inf).argmin(dim=1)
    rows = [n * group_size + int(place[n]) for n in shown for place in (high, low)]
    shorts = list(map(short_name, names))
    return [
        Completion(
            str(examples[b].id),
            examples[b].question,
            texts[b],
            dict(zip(shorts, columns[b].tolist(), strict=True)),
            reward=float(rewards[b]),
            advantage=float(advantages[b]),
        )  # fmt: skip
        for b in rows
    ]
