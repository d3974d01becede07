"""Map a function over items by threads, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from hark.threads import helper_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int | None = None
) -> Iterator[Result]:
    """`function(item)` for each item, in the order of the items, computed by `workers` threads.

    ahead: how many items are submitted beyond the one whose result is waited for; None submits all of them at once.
    An exception of `function` is raised where its result would be returned.
    """
    with helper_threads(workers) as threads:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(threads.submit(function, item))
            if ahead is not None and len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
