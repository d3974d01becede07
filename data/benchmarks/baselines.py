"""Rules that answer without the audio. A model that uses the audio must have a higher accuracy than each of them."""

from collections.abc import Callable, Sequence

from hark.data.errors import DataError
from hark.data.examples import Example


def always_first(example: Example) -> bool:
    """Whether the first choice is right."""
    return _answer(example) == 0


def longest_choice(example: Example) -> bool:
    """Whether the longest choice is right; of several equally long ones, the first."""
    lengths = [len(choice) for choice in example.choices]
    return _answer(example) == lengths.index(max(lengths))


def chance(example: Example) -> float:
    """The probability that a random choice is right."""
    return 1 / len(example.choices)


def _answer(example: Example) -> int:
    if example.answer is None:
        raise DataError(f"{example.line or example.id}: has no answer; baselines need questions whose answer is known")
    return example.answer


BASELINES: dict[str, Callable[[Example], float]] = {
    "always_first_accuracy": always_first,
    "longest_choice_accuracy": longest_choice,
    "chance": chance,
}


def baseline_figures(examples: Sequence[Example]) -> dict[str, float]:
    """Accuracies of rules that do not use the audio, over the examples whose answer is known; {} without choices.

    An open question counts as wrong, as no rule can answer it, so that the accuracy of a model can be compared.
    """
    chosen = [example for example in examples if example.answer is not None]
    known = len(chosen) + sum(example.has_answer and not example.choices for example in examples)
    return {name: sum(map(rule, chosen)) / known for name, rule in BASELINES.items()} if chosen else {}
