"""Ctrl-C in a run on several processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(say: Callable[[], str]) -> Iterator[None]:
    """In the block, Ctrl-C leads to a KeyboardInterrupt with the text of `say`, whatever error comes of it.

    The error may be one of torch that hides the KeyboardInterrupt, or that of a collective because another rank, which
    was interrupted too, has ended.
    """
    received = []

    def receive(*_: object) -> None:
        received.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield
    except BaseException as error:
        if received or isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(say()) from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)
