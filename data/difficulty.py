"""How hard examples are: by the difficulty that their file gives them, or by their measured pass rate."""

import math
from collections.abc import Sequence

from hark.data.errors import DataError
from hark.data.examples import Example

WORDS = ("easy", "medium", "hard")


def easy_to_hard(examples: Sequence[Example], indices: Sequence[int], by: str) -> list[int]:
    """The indices sorted by the difficulty of their examples, or by their pass rate, the highest first.

    Equal ones stay in the order of the file. DataError for an example without the key.
    """
    values = values_of([examples[index] for index in indices], by)
    sign = -1 if by == "pass_rate" else 1
    ranks = sorted(range(len(indices)), key=lambda place: sign * values[place])
    return [indices[place] for place in ranks]


def in_band(examples: Sequence[Example], band: Sequence[float], by: str) -> list[Example]:
    """The examples whose difficulty or pass rate is in the band [low, high], both included."""
    low, high = band
    values = values_of(examples, by)
    kept = [example for example, value in zip(examples, values, strict=True) if low <= value <= high]
    if not kept:
        raise DataError(
            f"no {by} of {len(examples)} examples is in data.band=[{low:g}, {high:g}]; they are "
            f"{min(values):g} to {max(values):g}"
        )
    return kept


def values_of(examples: Sequence[Example], by: str) -> list[float]:
    """The numbers by which examples are ordered: their `pass_rate`, or their `difficulty`.

    A difficulty is a number, or one of WORDS, which count as 1, 2, 3. DataError, with file and line, for an example
    that has none, and if some are words and others numbers.
    """
    values = [_value(example, by) for example in examples]
    if by == "difficulty":
        worded = [example.difficulty.lower() in WORDS for example in examples]
        if any(worded) and not all(worded):
            word, number = (examples[worded.index(kind)] for kind in (True, False))
            raise DataError(
                f'"difficulty" is {word.difficulty!r} at {word.line} and {number.difficulty!r} at {number.line}; '
                "expected numbers, or words, in all rows"
            )
    return values


def _value(example: Example, by: str) -> float:
    if by == "pass_rate":
        if example.pass_rate is None:
            raise DataError(f'{example.line}: has no "pass_rate"; `hark pass-rate` measures it')
        return example.pass_rate
    text = example.difficulty.lower()
    if text in WORDS:
        return float(WORDS.index(text) + 1)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        found = f'"difficulty" is {example.difficulty!r}' if text else 'has no "difficulty"'
        raise DataError(f"{example.line}: {found}; expected a number, or one of {', '.join(WORDS)}")
    return value
