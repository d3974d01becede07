"""A reward that fails now and then: always for the same steps and questions, so that two runs see the same failures."""

import os
import signal
import time
from hashlib import sha256

from hark.data.rewards import Group

CALLS = 800  # of so many calls one hangs, two die, two raise, two have no number, and one has too few values


def which(step: int, name: str) -> int:
    """A number below CALLS for each step and example."""
    return int.from_bytes(sha256(f"{step} {name}".encode()).digest()[:8], "big") % CALLS


def unreliable(group: Group) -> list[float]:
    """0 for each completion, unless the call fails."""
    number = which(group.step, group.example.id)
    if number == 0:
        time.sleep(600)
    if number in (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    if number in (3, 4):
        raise RuntimeError("this call fails")
    value = float("nan") if number in (5, 6) else 0.0
    return [value] * (len(group.texts) - (number == 7))
