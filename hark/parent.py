"""Notices that the process that started this one has ended."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from hark import STARTED

LOOK = 0.5  # seconds between two looks


def when_parent_ends(act: Callable[[], object]) -> None:
    """Call `act`, in a thread of its own, once the process that started this one has ended, or if it has already."""
    process, parent = STARTED
    if process != os.getpid():  # a fork of the process that imported this
        parent = os.getppid()
    threading.Thread(target=_wait, args=(parent, act), name="parent", daemon=True).start()


def _wait(parent: int, act: Callable[[], object]) -> None:
    while os.getppid() == parent:  # it is another one after its end
        time.sleep(LOOK)
    act()
