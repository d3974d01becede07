"""The prompts of a step on all ranks or on none: what fails on one rank ends the step on all, and none waits for it."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from hark import UserError
from hark.grpo.runtime.collectives import World, exchange_rows, reduce_max
from hark.models.policy import Prompt

Result = TypeVar("Result")
Key = tuple[int, ...]  # the integers that seed the random numbers of a prompt


class OtherRankError(Exception):
    """An unexpected error of other ranks; its cause has their tracebacks as its text."""


class TrainingData(Protocol):
    """The source of prompts: pure functions of the step and of positions; it has no state to save."""

    def step(self, step: int) -> Sequence[tuple[Any, Prompt, Key]]:
        """This rank's examples of a step with their prompts and keys; starts to prepare the next step."""

    def prepare(self, step: int) -> None:
        """Start to prepare a step."""

    def share(self, positions: Sequence[int]) -> list[int]:
        """This rank's of some positions of the run's order, in their order; all ranks get equally many.

        A pure function of the positions and the number of ranks.
        """

    def at(self, step: int, positions: Sequence[int], *, since: int) -> Sequence[tuple[Any, Prompt, Key]]:
        """Examples at any positions of the run's order, for a step that begins at position `since`."""

    def prepare_at(self, step: int, positions: Sequence[int], *, since: int) -> None:
        """Start to prepare what `at` is asked for next."""

    def longest(self) -> tuple[Any, Prompt]:
        """The example with the longest prompt."""

    examples: Sequence[Any]  # all of them

    @property
    def bad(self) -> Sequence[Any]:
        """The examples that this rank has skipped; none is ever removed."""


class SharedData:
    """TrainingData whose errors are those of all ranks.

    lost: the ids of the examples that any rank has skipped since the beginning of the run. More of them than the share
    `max_lost` of all examples, and than one, are an error.
    """

    def __init__(self, data: TrainingData, world: World, *, max_lost: float):
        self._data, self._world = data, world
        self._counted = 0  # of the examples that this rank has skipped
        self._max_lost = max_lost
        self.examples, self.share = data.examples, data.share
        self.prepare, self.prepare_at = data.prepare, data.prepare_at
        self.lost: list[str] = []

    @property
    def bad(self) -> Sequence[Any]:
        return self._data.bad

    def step(self, step: int) -> Sequence[tuple[Any, Prompt, Key]]:
        return self._counting(lambda: self._data.step(step))

    def at(self, step: int, positions: Sequence[int], *, since: int) -> Sequence[tuple[Any, Prompt, Key]]:
        return self._counting(lambda: self._data.at(step, positions, since=since))

    def longest(self) -> tuple[Any, Prompt]:
        return on_all(self._data.longest, self._world)

    def _counting(self, call: Callable[[], Result]) -> Result:
        """The result of a call, after the examples that it skipped were counted on all ranks."""
        result = on_all(call, self._world)
        new, self._counted = self._data.bad[self._counted :], len(self._data.bad)
        if not reduce_max(len(new), self._world):
            return result
        found = exchange_rows(list(new), self._world)
        self.lost = list(dict.fromkeys([*self.lost, *(one.id for one in found)]))
        check_lost(len(self.lost), len(self.examples), self._max_lost, found[-1])
        return result


def check_lost(lost: int, count: int, max_lost: float, last: Any) -> None:
    """Raise UserError, with the last of them, if more are lost than the share `max_lost` of `count`, and than one."""
    if lost > max(1, math.floor(max_lost * count)):
        raise UserError(
            f"{lost} of {count} examples became bad during the run, more than data.max_lost allows, the last "
            f"{last.line}: {last.reason}"
        )


def on_all(call: Callable[[], Result], world: World) -> Result:
    """What a call returns. What it raises on one rank is raised on all: none waits for another.

    Raises the exception itself where it occurred. On the other ranks it raises a UserError with its message, or an
    OtherRankError if one of the ranks has raised anything else.
    """
    failure: Exception | None = None
    returned: list[Result] = []
    try:
        returned.append(call())
    except Exception as error:
        failure = error
    if reduce_max(failure is not None, world):
        found = exchange_rows([] if failure is None else [_described(failure, world)], world)
        raise failure or _of_others(found)
    return returned[0]


def _described(failure: Exception, world: World) -> tuple[str, str]:
    """An error in one line, and its traceback unless it is a UserError."""
    if isinstance(failure, UserError):
        return f"rank {world.rank}: {failure}", ""
    last = traceback.format_exception_only(failure)[-1].strip()
    return f"rank {world.rank}: {last}", "".join(traceback.format_exception(failure))


def _of_others(found: Sequence[tuple[str, str]]) -> Exception:
    text, tracebacks = "; ".join(line for line, _ in found), [trace for _, trace in found if trace]
    if not tracebacks:
        return UserError(text)
    error = OtherRankError(text)
    error.__cause__ = OtherRankError("\n" + "\n".join(tracebacks))
    return error
