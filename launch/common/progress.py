"""Says how far a long piece of work has come."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from hark.shown import say

Item = TypeVar("Item")

PATIENCE = 3.0  # seconds before the first line
PAUSE = 10.0  # seconds between two lines


def counted(
    items: Iterable[Item], total: int, what: str, *, show: bool = True, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """The items; if they take long, a line now and then says how many of `total` are done, and one at the end.

    An item counts `size(item)`, and is done when the next one is asked for.
    """
    began = time.monotonic()
    due, done = began + PATIENCE, 0
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if show and now >= due and done < total:
            left = (now - began) * (total - done) / done
            say(f"{done} of {total} {what}, {left:.0f} s left")
            due = now + PAUSE
    if show and (seconds := time.monotonic() - began) >= PATIENCE:
        say(f"all {total} {what}, in {seconds:.0f} s")
