"""Rewards against repetition within a completion, and for differences between the completions of a group."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein

from hark.data.rewards.group import Group


def repetition(group: Group, *, n: int = 3, penalty: float = -1.0, of: str = "tokens") -> list[float]:
    """(1 - distinct n-grams / n-grams) * penalty; 0 for fewer than n tokens (TRL, get_repetition_penalty_reward).

    of: "tokens", as TRL counts, or "words" in lower case, as Open-RS does. A stop token counts as a token.
    """
    if of not in ("tokens", "words"):
        raise ValueError(f"of is {of!r}; expected 'tokens' or 'words'")
    rows: list = list(group.ids) if of == "tokens" else [text.lower().split() for text in group.texts]
    return [_repeated(row, n) * penalty for row in rows]


def _repeated(items: tuple | list, n: int) -> float:
    """The share of n-grams that are repeats of another."""
    grams = list(zip(*(items[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def diversity(group: Group) -> list[float]:
    """The mean of the normalised edit distances between a completion's tokens and those of the others, 0 to 1.

    The distance is divided by the longer length (R3 of arXiv 2509.18569's TTS names token diversity by edit distance
    and no formula). 0 for a group of one.
    """
    others = max(len(group.ids) - 1, 1)
    return [sum(Levenshtein.normalized_distance(own, other) for other in group.ids) / others for own in group.ids]
