"""Rewards of the length of a completion, in tokens unless said otherwise."""

from __future__ import annotations

import math
from statistics import median

from hark.data.examples import is_right
from hark.data.rewards.group import Group
from hark.data.rewards.maths import math as mathematics


def length_median(group: Group) -> list[float]:
    """-|n - m| / m with m the median length of the group, as for speech tokens in arXiv 2509.18569 (R2 of its TTS)."""
    lengths = [len(ids) for ids in group.ids]
    middle = median(lengths)
    return [-abs(length - middle) / middle if middle else 0.0 for length in lengths]


def cosine(
    group: Group,
    *,
    form: str = "trl",
    by: str = "accuracy",
    max_length: int | None = None,
    min_right: float = 0.5,
    max_right: float = 1.0,
    min_wrong: float | None = None,
    max_wrong: float | None = None,
) -> list[float | None]:
    """Short right answers earn most: a cosine of the length between two values (arXiv 2502.03373, section 4.1).

    right: min_right + (max_right - min_right) * (1 + cos(pi p)) / 2
    wrong: max_wrong + (min_wrong - max_wrong) * (1 + cos(pi p)) / 2;  p = length / max_length

    form "trl": length in tokens, p at most 1, and min_wrong -1, max_wrong -0.5: short wrong answers cost most (TRL,
    get_cosine_scaled_reward). form "open_rs": length in characters, p not limited, and min_wrong 0, max_wrong -0.5:
    long wrong answers cost most (Open-RS, arXiv 2503.16219, src/open_r1/grpo.py). max_length: null is the token limit.
    by: what is right, as the reward "accuracy" or "math" has it; TRL and Open-RS compare mathematics. None without a
    right answer, or one that cannot be read, of which Open-RS gives 1.
    """
    if by not in ("accuracy", "math"):
        raise ValueError(f"by is {by!r}; expected 'accuracy' or 'math'")
    if form not in ("trl", "open_rs"):
        raise ValueError(f"form is {form!r}; expected 'trl' or 'open_rs'")
    short_wrong = min_wrong if min_wrong is not None else -1.0 if form == "trl" else 0.0
    long_wrong = -0.5 if max_wrong is None else max_wrong
    longest = max_length or group.max_new_tokens

    rights = mathematics(group) if by == "math" else [is_right(group.example, text) for text in group.texts]

    def value(text: str, ids: tuple[int, ...], right: float | bool | None) -> float | None:
        if right is None:
            return None
        p = min(len(ids) / longest, 1.0) if form == "trl" else len(text) / longest
        wave = (1 + math.cos(math.pi * p)) / 2
        low, high = (min_right, max_right) if right else (long_wrong, short_wrong)
        return low + (high - low) * wave

    return [value(*one) for one in zip(group.texts, group.ids, rights, strict=True)]


def soft_overlong(group: Group, *, cache: int, max_length: int | None = None) -> list[float]:
    """0 up to L - c tokens, ((L - c) - n) / c up to L, -1 beyond (DAPO, arXiv 2503.14476, equation 13).

    cache: c; max_length: L, null is the token limit.
    """
    longest = max_length or group.max_new_tokens
    if not 0 < cache <= longest:
        raise ValueError(f"cache is {cache}; expected 1 to {longest} tokens, the longest completion")
    start = longest - cache
    return [
        0.0 if len(ids) <= start else -1.0 if len(ids) > longest else (start - len(ids)) / cache for ids in group.ids
    ]
