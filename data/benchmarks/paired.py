"""Compares two models that answered the same questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hark.data.benchmarks.report import COLUMNS, Share


class Paired(NamedTuple):
    """How many questions both models answered right, only the first, only the second, and neither."""

    both: int
    first_only: int
    second_only: int
    neither: int

    @classmethod
    def of(cls, results: Iterable[tuple[bool, bool]]) -> Paired:
        """The counts of pairs (the first model is right, the second is right)."""
        pairs = list(results)
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def first(self) -> Share:
        return Share(self.both + self.first_only, sum(self))

    @property
    def second(self) -> Share:
        return Share(self.both + self.second_only, sum(self))

    @property
    def difference(self) -> float:
        """The second model's accuracy minus the first's."""
        return (self.second_only - self.first_only) / sum(self)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference, by method 10 of Newcombe (Statistics in Medicine 17, 1998).

        It combines the Wilson intervals of the two accuracies, taking account of their correlation.
        """
        correlation = self._correlation()
        return (
            self.difference - _side(_below(self.second), _above(self.first), correlation),
            self.difference + _side(_above(self.second), _below(self.first), correlation),
        )

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: how likely so unequal a split of the questions is that only one answered."""
        unequal = self.first_only + self.second_only
        tail = sum(math.comb(unequal, k) for k in range(min(self.first_only, self.second_only) + 1))
        return min(1.0, 2 * tail / 2**unequal)

    def _correlation(self) -> float:
        """Newcombe's estimate of phi, with a continuity correction if it is positive."""
        a, b, c, d = self
        margins = (a + b) * (c + d) * (a + c) * (b + d)
        if not margins:
            return 0.0
        product = a * d - b * c
        return (max(product - sum(self) / 2, 0) if product > 0 else product) / math.sqrt(margins)


def _below(share: Share) -> float:
    """The distance from an accuracy to the lower end of its interval."""
    assert share.interval is not None
    return share.right / share.total - share.interval[0]


def _above(share: Share) -> float:
    assert share.interval is not None
    return share.interval[1] - share.right / share.total


def _side(first: float, second: float, correlation: float) -> float:
    # Rounding can make the sum slightly negative where both distances are equal and the correlation is 1.
    return math.sqrt(max(0.0, first**2 - 2 * correlation * first * second + second**2))


def pairs_of(first: Sequence[dict], second: Sequence[dict]) -> list[tuple[dict, dict]]:
    """The rows of two evaluations of one question, matched by id; questions without a known answer are left out."""
    others = {row["id"]: row for row in second}
    matched = [(row, others[row["id"]]) for row in first if row["id"] in others]
    return [pair for pair in matched if None not in (pair[0]["correct"], pair[1]["correct"])]


def by_column(pairs: Sequence[tuple[dict, dict]], column: str) -> dict[str, Paired]:
    """The counts for each value of a column of the first rows, such as "task"; see `COLUMNS`."""
    assert column in COLUMNS
    values = dict.fromkeys(row[column] for row, _ in pairs if row[column])
    return {value: paired([pair for pair in pairs if pair[0][column] == value]) for value in values}


def paired(pairs: Sequence[tuple[dict, dict]]) -> Paired:
    """The counts of matched rows."""
    return Paired.of((first["correct"], second["correct"]) for first, second in pairs)
