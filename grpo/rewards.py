"""The rewards of a step: computed in a thread of their own, agreed on by all ranks, and weighted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import Any, Protocol

import torch

from hark import UserError
from hark.grpo.config import RewardConfig
from hark.grpo.runtime.collectives import World, exchange_rows, reduce_sums
from hark.grpo.shared_data import on_all
from hark.grpo.types import Rollout
from hark.models.policy import completion_ids
from hark.threads import helper_threads

WINDOW = 100  # steps over which the questions are counted of which a reward failed


class Judged(Protocol):
    """The rewards of completions: columns (B, K), NaN where one was not given; failed calls; sums to log.

    failed: the number of examples of which a reward failed.
    """

    @property
    def columns(self) -> torch.Tensor: ...

    @property
    def failures(self) -> Sequence[Any]: ...

    @property
    def figures(self) -> Mapping[str, float]: ...

    @property
    def failed(self) -> int: ...


# (N examples, B texts, B lists of ids, B times whether it stopped, step) -> rewards
Rewards = Callable[[Sequence[Any], Sequence[str], Sequence[Sequence[int]], Sequence[bool], int], Judged]


class StepRewards:
    """rewards: returns one column per name in `reward.weights`, in that order.

    failing: [step, share of its questions of which a reward failed] of the latest WINDOW steps, without shares of 0.
    """

    def __init__(self, rewards: Rewards, config: RewardConfig, world: World):
        self._rewards, self._config, self._world = rewards, config, world
        self._thread = helper_threads(1, "rewards")
        self._figures: Counter[str] = Counter()
        self._asked, self._failed, self._reason = 0, 0, ""  # of the step that is being done
        self.failing: list[list[float]] = []

    def start(self, examples: Sequence[Any], rollout: Rollout, texts: Sequence[str], step: int) -> Future[Judged]:
        """Start to judge the completions (B) of N examples."""
        self._asked += len(examples)
        ids = completion_ids(rollout.tokens, rollout.mask)
        return self._thread.submit(self._rewards, examples, texts, ids, rollout.stopped.tolist(), step)

    def columns(self, pending: Future[Judged]) -> torch.Tensor:
        """The columns (B, K), waited for. What is raised on one rank is raised on all (`on_all`)."""
        judged = on_all(pending.result, self._world)
        self._figures.update({"reward_failures": len(judged.failures)} | dict(judged.figures))
        self._failed += judged.failed
        self._reason = str(judged.failures[-1]) if judged.failures else self._reason
        return judged.columns.to(self._world.device)

    def check_failures(self, step: int) -> None:
        """Raise UserError, on all ranks, if rewards have failed for a larger share than `reward.max_failed`.

        It is the mean of the shares of the latest WINDOW steps, where steps before the first count as 0: a few failures
        at the beginning are no large share.
        """
        if self._config.on_error == "stop":
            return
        sums = reduce_sums({"asked": self._asked, "failed": self._failed}, self._world)
        reasons, self._asked, self._failed, self._reason = [self._reason] * (self._failed > 0), 0, 0, ""
        self.failing = [one for one in self.failing if one[0] > step - WINDOW]
        if not sums["failed"]:
            return
        self.failing.append([step, sums["failed"] / sums["asked"]])
        mean = sum(share for _, share in self.failing) / WINDOW
        if mean > self._config.max_failed:
            reason = exchange_rows(reasons, self._world)[-1]
            raise UserError(
                f"in the last {WINDOW} steps rewards failed for as many questions as {mean * WINDOW:.1f} steps have, "
                f"more than reward.max_failed={self._config.max_failed:g} of them; correct what fails, or raise "
                f"reward.max_failed; the last: {reason}"
            )

    def weights(self, step: int) -> list[float]:
        return weights_at(self._config.weights, self._config.schedule, step)

    def take_figures(self) -> dict[str, float]:
        """This rank's sums since the last call: failed calls, tokens of judges."""
        figures: dict[str, float] = dict(self._figures)
        self._figures.clear()
        return figures


def weights_at(weights: Mapping[str, float], schedule: Mapping[str, Mapping[int, float]], step: int) -> list[float]:
    """The weight of each reward at a step, counted from 0: the scheduled one, or else that of `weights`."""
    return [scheduled(sorted(schedule[name].items()), step) if name in schedule else weights[name] for name in weights]


def scheduled(points: Sequence[tuple[int, float]], step: int) -> float:
    """The value at a step of points (step, value) in order: linear between them, constant before and after."""
    if step <= points[0][0]:
        return points[0][1]
    for (start, first), (end, last) in pairwise(points):
        if step <= end:
            return first + (last - first) * (step - start) / (end - start)
    return points[-1][1]
