"""The rows and figures of an evaluation: shares with intervals, by group, with baselines and controls. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hark.data.benchmarks.baselines import baseline_figures
from hark.data.examples import Example
from hark.shown import shown

COLUMNS = ("task", "category", "sub_category", "difficulty")  # columns of a row that the table has a section for
LONGEST = 60  # characters of the name of a group in the table
Z = 1.959964  # the 97.5 % quantile of the normal distribution


class Share(NamedTuple):
    """The number of right answers, and of all answers that are counted."""

    right: int
    total: int

    @classmethod
    def of(cls, results: Iterable[bool | None]) -> Share:
        """The share of True among the results that are not None."""
        counted = [result for result in results if result is not None]
        return cls(sum(counted), len(counted))

    @property
    def accuracy(self) -> float | None:
        return self.right / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval. Unlike p ± 2 s it stays within 0 and 1 and is valid for small totals."""
        if not self.total:
            return None
        n, p = self.total, self.right / self.total
        middle = p + Z**2 / (2 * n)
        half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        # With 0 or n right, one end is exactly 0 or 1; the formula would give it with a rounding error.
        low = 0.0 if self.right == 0 else (middle - half) / (1 + Z**2 / n)
        high = 1.0 if self.right == n else (middle + half) / (1 + Z**2 / n)
        return low, high


def row_of(
    question: Any, *, prediction: str, correct: bool | None, stopped: bool | None, choice: int | None = None
) -> dict:
    """The row of a question in a report: its id and COLUMNS ("" where it has none), its prediction and its grade.

    correct: None where the right answer is not known. stopped: whether the completion ended with a stop token; None
    where that is not known. choice: the choice that the answer equals; None if it is none of them, or not known. The
    row of an open question has no choice, and says that it is open.
    """
    columns = {column: getattr(question, column, "") for column in COLUMNS}
    outcome = {"prediction": prediction, "correct": correct, "stopped": stopped, "choice": choice}
    return {"id": question.id} | columns | outcome | ({} if getattr(question, "choices", True) else {"open": True})


def blank_row(question: Any) -> dict:
    """The row of a question that could not be asked: wrong, or None where its right answer is not known."""
    hidden = not getattr(question, "has_answer", True)
    return row_of(question, prediction="", correct=None if hidden else False, stopped=None)


def share(rows: Sequence[dict]) -> Share:
    """The share of right rows; rows whose `correct` is None are not counted."""
    return Share.of(row["correct"] for row in rows)


def grouped(rows: Sequence[dict], column: str) -> dict[str, Share]:
    """The share of each value of a column, in order of first occurrence; rows with an empty value are in no group."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row[column]:
            groups.setdefault(row[column], []).append(row)
    return {value: share(members) for value, members in groups.items() if share(members).total}


def accuracies(rows: Sequence[dict], *by: str) -> dict[str, float]:
    """The accuracy over all rows, and for each value of the columns in `by` as "accuracy/COLUMN/VALUE".

    Rows whose `correct` is None are not counted; an accuracy over no row is left out.
    """
    shares = {"accuracy": share(rows)}
    for column in by:
        shares |= {f"accuracy/{column}/{value}": group for value, group in grouped(rows, column).items()}
    return {name: figure.accuracy for name, figure in shares.items() if figure.accuracy is not None}


def answer_shares(rows: Sequence[dict]) -> dict[str, float]:
    """The share of answers that are none of the choices, and of those cut off at the longest length; {} without any.

    Open questions have no choices, so they do not count in the first.
    """
    return {name: found.right / found.total for name, found in _answer_counts(rows).items() if found.total}


def _answer_counts(rows: Sequence[dict]) -> dict[str, Share]:
    given = [row for row in rows if row["stopped"] is not None]
    return {
        "no_choice_share": Share.of(row["choice"] is None for row in given if not row.get("open")),
        "cut_off_share": Share.of(not row["stopped"] for row in given),
    }


def figures(rows: Sequence[dict], examples: Sequence[Example], others: Mapping[str, Share]) -> dict:
    """All figures of a report for its JSON file: flat accuracies and intervals, and `groups` with counts.

    others: further shares of the same questions; "silent" is written as `silent_accuracy`, `silent_total`, ...
    """
    result: dict = {"accuracy": share(rows).accuracy, "accuracy_interval": share(rows).interval}
    result |= share(rows)._asdict()
    for name, other in others.items():
        result |= {f"{name}_{key}": value for key, value in other._asdict().items()}
        result |= {f"{name}_accuracy": other.accuracy, f"{name}_accuracy_interval": other.interval}
    result |= answer_shares(rows) | baseline_figures(examples) | accuracies(rows, *COLUMNS)
    sections = {column: grouped(rows, column) for column in COLUMNS}
    counts = {column: {value: _counts(group) for value, group in groups.items()} for column, groups in sections.items()}
    return result | {"groups": counts}


def _counts(group: Share) -> dict:
    return group._asdict() | {"accuracy": group.accuracy, "interval": group.interval}


# The table ----------------------------------------------------------------------------------------------------------

NAMES = {
    "official": "by the official script",
    "strict": "by the strict rule",
    "no_choice_share": "none of the choices",
    "cut_off_share": "cut off at the longest length",
    "always_first_accuracy": "always the first choice",
    "longest_choice_accuracy": "always the longest choice",
    "chance": "a choice at random",
    "silent": "sound removed",
    "shuffled_audio": "sound of another question",
    "shuffled_choices": "choices in another order",
}
RULES = ("official", "strict")  # names of shares that grade the same answers by another rule


def table(rows: Sequence[dict], examples: Sequence[Example], others: Mapping[str, Share]) -> str:
    """The same figures as aligned text.

    Of the others, "official" and "strict" grade the same answers by other rules. The rest are controls: other answers,
    shown with the difference of their accuracy.
    """
    sections = {column.replace("_", "-"): grouped(rows, column) for column in COLUMNS}
    names = [
        "all",
        *(f"  {name}" for name in NAMES.values()),
        *(f"  {shown(value, LONGEST)}" for groups in sections.values() for value in groups),
    ]
    width = max(map(len, names)) + 2
    main = share(rows)
    lines = [heading("", width), line("all", main, width)]
    lines += [line(NAMES[name], others[name], width) for name in RULES if name in others]
    for name, groups in sections.items():
        if groups:
            lines += ["", name, *(line(f"  {shown(value, LONGEST)}", group, width) for value, group in groups.items())]
    counts = {name: found for name, found in _answer_counts(rows).items() if found.total}
    if counts:
        lines += ["", "answers", *(line(f"  {NAMES[name]}", found, width) for name, found in counts.items())]
    without = baseline_figures(examples)
    if without:
        lines += ["", "baselines", *(f"{'  ' + NAMES[key]:{width + 13}}{100 * x:8.1f}" for key, x in without.items())]
    controls = {name: other for name, other in others.items() if name not in RULES}
    if controls:
        lines += ["", f"{'controls':{width + 38}}{'difference':>12}"]
        lines += [line(f"  {NAMES[name]}", other, width, main) for name, other in controls.items()]
    return "\n".join(lines)


def heading(name: str, width: int) -> str:
    """The heading of a column of `line`s."""
    return f"{name:{width}}{'right/total':>13}{'%':>8}{'95 % interval':>17}"


def line(name: str, figure: Share, width: int, main: Share | None = None) -> str:
    """A share, its name padded to `width`; with `main`, also the difference of the accuracies in percentage points."""
    if figure.accuracy is None or figure.interval is None:
        return f"{name:{width}}{'0/0':>13}"
    low, high = figure.interval
    counts, limits = f"{figure.right}/{figure.total}", f"{100 * low:.1f} - {100 * high:.1f}"
    difference = "" if main is None or main.accuracy is None else f"{100 * (figure.accuracy - main.accuracy):+12.1f}"
    return f"{name:{width}}{counts:>13}{100 * figure.accuracy:8.1f}{limits:>17}{difference}"
