"""What a reward function sees and returns, and the rewards of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from hark import UserError
from hark.data.examples import Example
from hark.data.prompts import Template

if TYPE_CHECKING:  # processes that only run rewards need no torch
    import torch


class RewardError(UserError, RuntimeError):
    """A reward function failed, ran out of time, or returned something that is no number."""


@dataclass(frozen=True)
class Group:
    """The G completions of one question.

    ids: the tokens of each, the stop token included. stopped: False for one that reached `max_new_tokens` tokens
    without a stop token. step: counted from 0.
    """

    example: Example
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    stopped: tuple[bool, ...]
    template: Template
    step: int = 0
    max_new_tokens: int = 0


# One number for each completion of the group, or None where the reward does not apply.
Reward: TypeAlias = Callable[[Group], Sequence["float | None"]]


class Failure(NamedTuple):
    """A call of one reward on one group that gave no valid value, as one sentence."""

    reward: str
    reason: str

    def __str__(self) -> str:
        return self.reason


class Judged(NamedTuple):
    """The rewards of a step: columns (B, K) float32, one per name, NaN where the reward is None; and what failed.

    figures: sums to log, such as the tokens that a judge used. failed: the number of questions of which a reward
    failed.
    """

    columns: torch.Tensor
    failures: tuple[Failure, ...] = ()
    figures: dict[str, float] = {}  # noqa: RUF012
    failed: int = 0


def each(function: Callable[[str], float | None]) -> Reward:
    """The reward that judges each text by itself."""
    return lambda group: [function(text) for text in group.texts]
