"""What can be had without listening: the accuracies that any result has to be read against."""

from hark.data.errors import DataError
from hark.data.examples import Example


def always_first(example: Example) -> bool:
    """Whether the first choice is right."""
    return _answer(example) == 0


def longest_choice(example: Example) -> bool:
    """Whether the longest choice is right, the first of several that are equally long."""
    lengths = [len(choice) for choice in example.choices]
    return _answer(example) == lengths.index(max(lengths))


def chance(example: Example) -> float:
    """The probability that a choice drawn at random is right."""
    return 1 / len(example.choices)


def _answer(example: Example) -> int:
    if example.answer is None:
        raise DataError(f"{example.line or example.id}: has no answer; baselines need questions whose answer is known")
    return example.answer
