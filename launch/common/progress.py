"""Says how far a long piece of work has come."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

PATIENCE = 3.0  # seconds before the first line
PAUSE = 10.0  # seconds between two lines


def counted(items: Iterable[Item], total: int, what: str, *, show: bool = True) -> Iterator[Item]:
    """The items; if they take long, a line now and then says how many of `total` have come, and one at the end."""
    began = time.monotonic()
    due = began + PATIENCE
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if show and now >= due and count < total:
            print(f"{count} of {total} {what}", flush=True)
            due = now + PAUSE
    if show and (seconds := time.monotonic() - began) >= PATIENCE:
        print(f"all {total} {what}, in {seconds:.0f} s", flush=True)
