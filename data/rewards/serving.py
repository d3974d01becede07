"""Runs rewards, in this process, or as `python -m hark.data.rewards.serving FD` for the process that started it.

It imports no torch by itself.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, NamedTuple

from hark.data.rewards.group import Group
from hark.data.rewards.judge import taken
from hark.data.rewards.table import find_reward


class Reply(NamedTuple):
    """What a call gave: the values as `plain`, or the reason why there are none; and sums to log."""

    values: Any = None
    reason: str = ""
    figures: Mapping[str, float] = MappingProxyType({})


def run_reward(name: str, options: Mapping[str, Any] | None, group: Group) -> Reply:
    """Call a reward here; an exception becomes a reason."""
    try:
        values: Sequence[float | None] = find_reward(name, options)(group)
        return Reply(plain(values), "", taken())
    except Exception as error:
        return Reply(None, f"{type(error).__name__}: {error}", taken())


def main(descriptor: int) -> None:
    pipe, parent = Connection(descriptor), os.getppid()
    threading.Thread(target=_watch, args=[parent], daemon=True).start()
    options = pipe.recv()
    pipe.send("ready")
    while True:
        try:
            name, group = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        reply = run_reward(name, options.get(name), group)
        try:
            pipe.send((reply.values, reply.reason, dict(reply.figures)))
        except OSError:
            return


def plain(values: Any) -> Any:
    """Values as a list of floats and None, if they are; else what they are, as text."""
    try:
        return [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        return repr(values)[:200]


def _watch(parent: int) -> None:
    """End this process when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
