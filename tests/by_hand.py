"""The named algorithms written out in numpy, float64, token by token from their papers: no code of hark.grpo is used.

`step(name, ...)` returns the loss of a step and its gradient with respect to the logprobs, by formulas and not by
autograd.
"""

from __future__ import annotations

import numpy as np

CLIPS = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1, 4), "cispo_verl": (10, 0.2), "cispo_nemo": (0.2, 0.2)}
TOKEN_MEANS = ("dapo", "cispo", "cispo_verl", "cispo_nemo", "lite_ppo")
KL_IN_LOSS = {
    "grpo": ("k3", 0.04),
    "gdpo": ("k3", 0.04),
    "two_sided": ("k3", 0.001),
    "reinforce_pp_baseline": ("k2", 0.001),
}
KL_IN_REWARD = {"rloo": 0.05, "reinforce_pp": 0.001}
LONGEST = 7  # tokens, for Dr. GRPO


def step(name, columns, reward_weights, group, new, old, ref):
    """columns: B rows of rewards; new, old, ref: B lists of the logprobs of a completion's tokens."""
    beta = KL_IN_REWARD.get(name, 0.0)
    penalties = [beta * (np.array(o) - np.array(r)) for o, r in zip(old, ref, strict=True)]
    advantages = advantages_of(name, np.array(columns, float), reward_weights, group, penalties)
    total, gradient = 0.0, []
    count, tokens = len(new), sum(map(len, new))
    for n, o, r, a in zip(new, old, ref, advantages, strict=True):
        n, o, r = (np.array(values, float) for values in (n, o, r))
        value, slope = completion(name, n, o, r, np.broadcast_to(a, n.shape))
        share = 1 / tokens if name in TOKEN_MEANS else 1 / (count * (LONGEST if name == "dr_grpo" else len(n)))
        total += share * value
        gradient.append(share * slope)
    return total, gradient


def advantages_of(name, columns, weights, group, penalties):
    """One number for each completion, or an array of one for each of its tokens."""
    rewards = columns @ np.array(weights) - np.array([p.sum() for p in penalties])
    lengths = np.array([len(p) for p in penalties])
    if name == "reinforce_pp":
        returns = [columns[i] @ np.array(weights) - np.cumsum(p[::-1])[::-1] for i, p in enumerate(penalties)]
        every = np.concatenate(returns)
        return [(one - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8) for one in returns]
    result = np.zeros(len(rewards))
    for first in range(0, len(rewards), group):
        rows = slice(first, first + group)
        r = rewards[rows]
        if name in ("dr_grpo", "reinforce", "reinforce_pp_baseline"):
            result[rows] = r - r.mean()
        elif name == "rloo":
            result[rows] = [r[i] - np.delete(r, i).mean() for i in range(group)]
        elif name == "opo":
            result[rows] = r - (r * lengths[rows]).sum() / lengths[rows].sum()
        elif name == "lite_ppo":
            result[rows] = (r - r.mean()) / (rewards.std(ddof=1) + 1e-4)
        elif name == "pass_at_k":
            best, second = sorted(r)[::-1][:2]
            result[first + int(r.argmax())] = best - second
        elif name == "gdpo":
            for column, weight in zip(columns[rows].T, weights, strict=True):
                result[rows] += weight * (column - column.mean()) / (column.std(ddof=1) + 1e-4)
        else:
            result[rows] = (r - r.mean()) / (r.std(ddof=1) + 1e-4)
    if name == "gdpo":
        result = (result - result.mean()) / (result.std(ddof=1) + 1e-4)
    if name == "reinforce_pp_baseline":
        every = np.repeat(result, lengths)
        result = (result - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8)
    return result


def completion(name, new, old, ref, advantage):
    """The sum of the losses of a completion's tokens, and its gradient."""
    low, high = CLIPS.get(name, (0.2, 0.2))
    ratio, value, slope = np.exp(new - old), np.zeros(len(new)), np.zeros(len(new))
    for t in range(len(new)):
        a, x = advantage[t], ratio[t]
        if name in ("gspo", "rloo"):
            whole = np.exp((new - old).mean()) if name == "gspo" else np.prod(ratio)
            bounded = min(max(whole, 1 - low), 1 + high)
            value[t] = -min(whole * a, bounded * a)
            if whole * a <= bounded * a:  # else the clipped one, which is constant
                slope += -whole * a * np.ones(len(new)) / (len(new) if name == "gspo" else 1)
        elif name.startswith("cispo"):
            weight = min(max(x, 1 - low), 1 + high)
            value[t], slope[t] = -weight * a * new[t], -weight * a
        elif name == "sapo":
            tau = 1.0 if a > 0 else 1.05
            gate = 1 / (1 + np.exp(-tau * (x - 1)))
            value[t], slope[t] = -4 / tau * gate * a, -4 * gate * (1 - gate) * x * a
        elif name == "reinforce":
            value[t], slope[t] = -a * new[t], -a
        else:
            bounded = min(max(x, 1 - low), 1 + high)
            value[t], slope[t] = -min(x * a, bounded * a), -x * a if x * a <= bounded * a else 0.0
            if name == "two_sided" and a < 0 and x > 4:
                value[t], slope[t] = -4 * a, 0.0
    kind, beta = KL_IN_LOSS.get(name, ("k3", 0.0))
    d = ref - new
    if kind == "k3":
        value, slope = value + beta * (np.exp(d) - d - 1), slope + beta * (1 - np.exp(d))
    else:
        value, slope = value + beta * d**2 / 2, slope - beta * d
    return value.sum(), slope
