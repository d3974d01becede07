"""Reward functions by name, and the matrix of rewards of one step.

A reward is any `(example, completion, template) -> float`. A name `path/to/file.py:brief` is the function `brief` of
your own file.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import torch

from hark import UserError
from hark.data.errors import DataError, named
from hark.data.examples import Example, is_right
from hark.data.prompts import Template, find_template
from hark.from_file import from_file, is_in_file, short_name

Reward = Callable[[Example, str, Template], float]

# The content of one element: not blank, and without any tag of the format.
_INSIDE = r"(?=\s*[^\s<]|\s*<(?!/?(?:think|answer)>))(?:(?!</?(?:think|answer)>).)*"


class RewardError(UserError, RuntimeError):
    """A reward function failed or returned something that is not a finite number."""


def accuracy(example: Example, completion: str, template: Template) -> float:
    """1 if the completion's answer is the right choice, or equals an accepted text after `normalise`; else 0.

    DataError for an open question whose answer is null.
    """
    right = is_right(example, completion)
    if right is None:
        raise DataError('"answer" is null, and accuracy needs one; set reward.weights.accuracy to 0')
    return float(right)


def format(example: Example, completion: str, template: Template) -> float:
    """1 if the completion consists of the template's elements, each once, in order and not blank; else 0.

    For a template without tags: 1 if the completion is not blank and has no tag.
    """
    elements = [rf"<{tag}>{_INSIDE}</{tag}>" for tag in template.tags] or [_INSIDE]
    return float(re.fullmatch(r"\s*" + r"\s*".join(elements) + r"\s*", completion, re.DOTALL) is not None)


REWARDS: dict[str, Reward] = {"accuracy": accuracy, "format": format}


def reward_matrix(
    examples: Sequence[Example], completions: Sequence[str], names: Sequence[str], template: str
) -> torch.Tensor:
    """Rewards (B, K), float32: one row per completion, one column per name.

    examples: the example of each completion, repeated for each completion of its group. A reward function that raises,
    or returns a value that is not finite, raises RewardError with its name, the example and the completion.
    """
    if len(examples) != len(completions):
        raise ValueError(f"{len(examples)} examples for {len(completions)} completions; expected one for each")
    functions = {name: find_reward(name) for name in names}
    chosen = find_template(template)
    rows = [
        [_value(name, functions[name], example, completion, chosen) for name in names]
        for example, completion in zip(examples, completions, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(completions), len(names))  # (B, K)


def find_reward(name: str) -> Reward:
    """The reward of that name, or of `path/to/file.py:name`; an unknown name is an error that suggests the nearest."""
    if not is_in_file(name):
        return named(REWARDS, name, kind="reward")
    reward = from_file(name)
    if isinstance(reward, type) or not callable(reward):
        what = "a class" if isinstance(reward, type) else f"of type {type(reward).__name__}"
        raise DataError(f"reward {name!r} is {what}; expected a function (example, completion, template) -> float")
    return reward


def check_rewards(names: Iterable[str]) -> None:
    """Find every reward; two that metrics would show under one name are a DataError."""
    shown: dict[str, str] = {}
    for name in names:
        find_reward(name)
        other = shown.setdefault(short_name(name), name)
        if other != name:
            raise DataError(f"rewards {other!r} and {name!r} would both be shown as {short_name(name)!r}; rename one")


def _value(name: str, reward: Reward, example: Example, completion: str, template: Template) -> float:
    where = f"reward {name!r} of example {example.id!r} for the completion {completion!r}"
    try:
        value = float(reward(example, completion, template))
    except Exception as error:
        raise RewardError(f"{where} failed: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise RewardError(f"{where} is {value}; expected a finite number")
    return value
