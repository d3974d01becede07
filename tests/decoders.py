"""A decoder that fails on clips of certain names as damaged files have made decoders fail. It imports no torch."""

from __future__ import annotations

import mmap
import os
import re
import signal
import sys
import time

from hark.data import decoding
from hark.data.clip import Clip


class OddError(Exception):
    """An exception that cannot be made from its message alone."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} and {second}")


def raises_odd() -> None:
    raise OddError("one", "two")


def reserves(size: int) -> None:
    """Take addresses without memory."""
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)


def maps(path: str) -> None:
    """Map a file to be read, as libraries are."""
    with open(path, "rb") as file:
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def backtracks() -> None:
    """Never returns, and lets no other thread of Python run meanwhile."""
    print("stuck", flush=True)
    re.fullmatch("(a+)+b", "a" * 100)


def exits(*_: object) -> None:
    os._exit(3)


def attempt(clip: Clip, *rest: object) -> decoding.Attempt:
    assert "torch" not in sys.modules, "a process that decodes would take seconds to start"
    name = str(clip.source)
    if "hangs" in name:
        time.sleep(1000)
    if "crashes" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "swells" in name:
        bytearray(8 << 30)
    return decoding.attempt(clip, *rest)
