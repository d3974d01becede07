"""Figures of an evaluation: shares with their intervals, by group, beside baselines and controls; plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hark.data.benchmarks import baselines
from hark.data.examples import Example

COLUMNS = ("task", "category", "sub_category", "difficulty")  # of a row, each a section of the table
Z = 1.959964  # 97.5 % of a normal distribution lie below


class Share(NamedTuple):
    """How many of how many are right."""

    right: int
    total: int

    @property
    def accuracy(self) -> float | None:
        return self.right / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval: unlike p ± 2 s it stays within 0 and 1, and holds for few and for extreme shares."""
        if not self.total:
            return None
        n, p = self.total, self.right / self.total
        middle = p + Z**2 / (2 * n)
        half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        # At 0 and at n right, one end is 0 or 1 itself, which rounding would miss.
        low = 0.0 if self.right == 0 else (middle - half) / (1 + Z**2 / n)
        high = 1.0 if self.right == n else (middle + half) / (1 + Z**2 / n)
        return low, high


def row_of(question: Any, *, prediction: str, correct: bool | None, stopped: bool | None) -> dict:
    """One row of an evaluation; a line that could not be read has no more than its id."""
    columns = {column: getattr(question, column, "") for column in COLUMNS}
    return {"id": question.id} | columns | {"prediction": prediction, "correct": correct, "stopped": stopped}


def blank_row(question: Any) -> dict:
    """The row of a question that could not be asked: wrong, unless its answer is not known anyway."""
    hidden = getattr(question, "answer", -1) is None and not question.truth
    return row_of(question, prediction="", correct=None if hidden else False, stopped=None)


def share(rows: Sequence[dict]) -> Share:
    """Right rows of those that can be judged: `correct` is None where the right answer is not known."""
    judged = [row["correct"] for row in rows if row["correct"] is not None]
    return Share(sum(judged), len(judged))


def grouped(rows: Sequence[dict], column: str) -> dict[str, Share]:
    """The share of each value of a column, in the order of their first rows; rows without a value are in no group."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row[column]:
            groups.setdefault(row[column], []).append(row)
    return {value: share(members) for value, members in groups.items() if share(members).total}


def accuracies(rows: Sequence[dict], *by: str) -> dict[str, float]:
    """Share of right answers: "accuracy" over all rows, and "accuracy/COLUMN/VALUE" for each value of the columns."""
    shares = {"accuracy": share(rows)}
    for column in by:
        shares |= {f"accuracy/{column}/{value}": group for value, group in grouped(rows, column).items()}
    return {name: figure.accuracy for name, figure in shares.items() if figure.accuracy is not None}


def baseline_figures(examples: Sequence[Example]) -> dict[str, float]:
    """Accuracies without listening, over the examples whose answer is known; they are exact, not estimates."""
    known = [example for example in examples if example.answer is not None]
    rules: dict[str, Callable[[Example], float]] = {
        "always_first_accuracy": baselines.always_first,
        "longest_choice_accuracy": baselines.longest_choice,
        "chance": baselines.chance,
    }
    return {name: sum(map(rule, known)) / len(known) for name, rule in rules.items()} if known else {}


def figures(rows: Sequence[dict], examples: Sequence[Example], others: Mapping[str, Share]) -> dict:
    """Everything but the rows, as it is written: flat accuracies and intervals, and `groups` with counts.

    others: further shares of the same questions, such as "silent", written as `silent_accuracy`.
    """
    result: dict = {"accuracy": share(rows).accuracy, "accuracy_interval": share(rows).interval}
    result |= share(rows)._asdict()
    for name, other in others.items():
        result |= {f"{name}_accuracy": other.accuracy, f"{name}_accuracy_interval": other.interval}
    result |= baseline_figures(examples)
    sections = {column: grouped(rows, column) for column in COLUMNS}
    for column, groups in sections.items():
        result |= {f"accuracy/{column}/{value}": group.accuracy for value, group in groups.items()}
    counts = {column: {value: _counts(group) for value, group in groups.items()} for column, groups in sections.items()}
    return result | {"groups": counts}


def _counts(group: Share) -> dict:
    return group._asdict() | {"accuracy": group.accuracy, "interval": group.interval}


# The table ----------------------------------------------------------------------------------------------------------

NAMES = {
    "strict": "by the strict rule",
    "always_first_accuracy": "always the first choice",
    "longest_choice_accuracy": "always the longest choice",
    "chance": "a choice at random",
    "silent": "sound removed",
    "shuffled_audio": "sound of another question",
    "shuffled_choices": "choices in another order",
}


def table(rows: Sequence[dict], examples: Sequence[Example], others: Mapping[str, Share]) -> str:
    """The same figures as aligned text; of the others, all but "strict" are controls, shown with their difference."""
    sections = {column.replace("_", "-"): grouped(rows, column) for column in COLUMNS}
    names = ["all", *NAMES.values(), *(f"  {value}" for groups in sections.values() for value in groups)]
    width = max(map(len, names)) + 2
    main = share(rows)
    lines = [heading("", width), line("all", main, width)]
    if "strict" in others:
        lines.append(line(NAMES["strict"], others["strict"], width))
    for name, groups in sections.items():
        if groups:
            lines += ["", name, *(line(f"  {value}", group, width) for value, group in groups.items())]
    without = baseline_figures(examples)
    if without:
        lines += ["", "baselines", *(f"{'  ' + NAMES[key]:{width + 13}}{100 * x:8.1f}" for key, x in without.items())]
    controls = {name: other for name, other in others.items() if name != "strict"}
    if controls:
        lines += ["", f"{'controls':{width + 38}}{'difference':>12}"]
        lines += [line(f"  {NAMES[name]}", other, width, main) for name, other in controls.items()]
    return "\n".join(lines)


def heading(name: str, width: int) -> str:
    """What stands above `line`s."""
    return f"{name:{width}}{'right/total':>13}{'%':>8}{'95 % interval':>17}"


def line(name: str, figure: Share, width: int, main: Share | None = None) -> str:
    """A share with its name in so many columns; beside another, with its difference."""
    if not figure.total:
        return f"{name:{width}}{'0/0':>13}"
    low, high = figure.interval
    counts, limits = f"{figure.right}/{figure.total}", f"{100 * low:.1f} - {100 * high:.1f}"
    difference = "" if main is None else f"{100 * (figure.accuracy - main.accuracy):+12.1f}"
    return f"{name:{width}}{counts:>13}{100 * figure.accuracy:8.1f}{limits:>17}{difference}"
