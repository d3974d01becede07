"""The rewards of a step: each reward of each group is one call, and a call that fails affects no other."""

from __future__ import annotations

import dataclasses
import math
import queue
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch

from hark.data.examples import Example
from hark.data.prompts import Template, find_template
from hark.data.rewards.group import Failure, Group, Judged, RewardError
from hark.data.rewards.serving import Reply, run_reward
from hark.data.rewards.table import check_rewards, is_foreign
from hark.data.worker import LateError, Worker, WorkerError
from hark.shown import say, shown

FIGURES = ("judge/prompt_tokens", "judge/completion_tokens")  # the same on every rank, also where calls fail
SHOWN, LONGEST = 3, 800  # failures that a step prints, and characters of each
MEMORY = 8 << 30  # bytes of a process, beyond those at its start; an own reward may load a model of 5e8 parameters


class Judge:
    """Rewards of completions by names, in that order.

    options: keyword arguments of each reward. only_if: {a: b} makes reward a 0 where b is not above 0. on_error: "stop"
    raises RewardError where a call fails, "none" makes the rewards of the call None. timeout: seconds of a call of one
    reward on one group. workers: processes that run the rewards; with 0, the built-in rewards that only compute run in
    the calling thread, and all others in one process.
    """

    def __init__(
        self,
        names: Sequence[str],
        template: str,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        only_if: Mapping[str, str] | None = None,
        on_error: Literal["stop", "none"] = "stop",
        timeout: float = 60.0,
        workers: int = 0,
        max_new_tokens: int = 0,
    ):
        check_rewards(names, options, only_if)
        self.names, self.template = list(names), find_template(template)
        self._options, self._only_if = options or {}, only_if or {}
        self._on_error, self._timeout, self._max_new_tokens = on_error, timeout, max_new_tokens
        self._isolated = {name for name in names if workers or is_foreign(name, self._options.get(name))}
        self._workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(max(workers, 1), "rewards")
        for _ in range(max(workers, 1)):
            self._workers.put(Worker(run_reward.__module__, memory=MEMORY))

    def __call__(
        self,
        examples: Sequence[Example],
        texts: Sequence[str],
        ids: Sequence[Sequence[int]],
        stopped: Sequence[bool],
        step: int,
    ) -> Judged:
        """The rewards of B completions of N examples, those of one example side by side."""
        groups = grouped(examples, texts, ids, stopped, self.template, step, self._max_new_tokens)
        calls = [(name, group) for group in groups for name in self.names]
        pending = [
            self._threads.submit(self._isolated_call, *call) if call[0] in self._isolated else None for call in calls
        ]
        # The threads wait for processes; the calls without one are done here meanwhile.
        own = {n: self._own_call(*call) for n, call in enumerate(calls) if pending[n] is None}
        replies = [own[n] if future is None else future.result() for n, future in enumerate(pending)]
        failures: list[Failure] = []
        rows: list[list[list[float | None]]] = []
        failed = 0
        figures: Counter[str] = Counter(dict.fromkeys(FIGURES, 0) if "judge" in self.names else {})
        for n, group in enumerate(groups):
            parts, before = replies[n * len(self.names) :][: len(self.names)], len(failures)
            checked = [
                self._checked(name, group, reply, failures) for name, reply in zip(self.names, parts, strict=True)
            ]
            for reply in parts:
                figures.update(reply.figures)
            rows.append(self._conditioned(checked))
            failed += len(failures) > before
        if failures:
            self._report(failures)
        return Judged(columns(rows, len(self.names)), tuple(failures), dict(figures), failed)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(cancel_futures=True)
        while not self._workers.empty():
            self._workers.get().close()

    def _own_call(self, name: str, group: Group) -> Reply:
        return run_reward(name, self._options.get(name), group)

    def _isolated_call(self, name: str, group: Group) -> Reply:
        worker = self._workers.get()
        try:
            return worker.call(run_reward, name, self._options.get(name), sendable(group), timeout=self._timeout)
        except WorkerError as error:
            setting = " (reward.timeout)" if isinstance(error, LateError) else ""
            return Reply(reason=f"its process {error}{setting}")
        except MemoryError:
            worker.close()  # the next call starts another: this one may hold what it had taken
            return Reply(reason=f"its process needed more than {MEMORY / 2**30:g} GiB")
        finally:
            self._workers.put(worker)

    def _checked(self, name: str, group: Group, reply: Reply, failures: list[Failure]) -> list[float | None]:
        """The values of a call; None for each that is not valid, which adds a failure."""
        size = len(group.texts)
        if reply.reason:
            failures.append(failure(name, group, None, f"failed: {reply.reason}"))
            return [None] * size
        values = reply.values
        if not isinstance(values, list) or len(values) != size:
            what = f"{len(values)} values" if isinstance(values, list) else values
            failures.append(failure(name, group, None, f"returned {what}; expected {size} numbers or None"))
            return [None] * size
        for n, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                failures.append(failure(name, group, n, f"is {value}; expected a finite number or None"))
                values[n] = None
        return values

    def _conditioned(self, values: list[list[float | None]]) -> list[list[float | None]]:
        """The values of one group, by reward, with 0 where a condition does not hold."""
        found = dict(zip(self.names, values, strict=True))
        return [
            own
            if name not in self._only_if
            else [
                0.0 if (needed or 0) <= 0 else value
                for value, needed in zip(own, found[self._only_if[name]], strict=True)
            ]
            for name, own in found.items()
        ]

    def _report(self, failures: Sequence[Failure]) -> None:
        reasons = [shown(failure.reason, LONGEST) for failure in failures[:SHOWN]]
        if len(failures) > SHOWN:
            reasons.append(f"... and {len(failures) - SHOWN} more")
        if self._on_error == "stop":
            raise RewardError("\n".join(reasons))
        say(f"warning: {reasons[0]}", *reasons[1:], file=sys.stderr)


def failure(name: str, group: Group, index: int | None, reason: str) -> Failure:
    """What failed, with the example and the completion; the first one stands for a whole group."""
    example, text = group.example, group.texts[index or 0]
    place = f" ({example.line})" if example.line else ""
    which = "the completion" if index is not None or len(group.texts) == 1 else f"{len(group.texts)} completions, first"
    return Failure(name, f"reward {name!r} of example {example.id!r}{place} for {which} {text[:200]!r} {reason}")


def grouped(
    examples: Sequence[Example],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    stopped: Sequence[bool],
    template: Template,
    step: int,
    max_new_tokens: int,
) -> list[Group]:
    """The group of each example. ValueError unless all have equally many completions."""
    if not len(texts) == len(ids) == len(stopped) or (len(texts) % len(examples) if examples else len(texts)):
        raise ValueError(
            f"{len(texts)} texts, {len(ids)} ids and {len(stopped)} stopped for {len(examples)} examples; expected as "
            "many of each, in groups of equal size"
        )
    size = len(texts) // len(examples) if examples else 0
    parts = [slice(n * size, (n + 1) * size) for n in range(len(examples))]
    return [
        Group(
            example, tuple(texts[part]), tuple(map(tuple, ids[part])), tuple(map(bool, stopped[part])), template, step,
            max_new_tokens,
        )
        for example, part in zip(examples, parts, strict=True)
    ]  # fmt: skip


def sendable(group: Group) -> Group:
    """The group with a dict as its example's other keys: their read-only view cannot be sent to a process."""
    return dataclasses.replace(group, example=dataclasses.replace(group.example, extra=dict(group.example.extra)))


def columns(rows: Sequence[Sequence[Sequence[float | None]]], count: int) -> torch.Tensor:
    """Values by group, reward and completion as columns (B, K) float32, None as NaN."""
    flat = [
        [math.nan if value is None else value for value in values]
        for group in rows
        for values in zip(*group, strict=True)
    ]
    return torch.tensor(flat, dtype=torch.float32).reshape(len(flat), count)
