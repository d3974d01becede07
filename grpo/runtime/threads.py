"""As many threads as pay for the many small products of decoding, on the CPU.

OpenMP's threads wait for one another after each product. Where another program takes one of their cores, each wait
lasts until the scheduler gives it back: beside one busy process, decoding on two threads takes several times as long as
on one, while on an idle machine it takes less (`hark benchmark --busy`).

The passes of the reference and of the update take all threads, because a resumed run has to have the same bits: the
gradient of a LayerNorm is summed by thread, and on some numbers of threads the products have other bits too. So do
decode steps in half precision: oneDNN's products round a few values otherwise on another number of threads, too few for
a trial to find. Beside a busy process it helps them that threads which wait sleep soon (hark/__init__.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

FIRST, LONGEST = 16, 256  # steps between two trials: doubled after each that changed nothing
SLOW, IN_A_ROW = 1.5, 3  # so many steps that take so many times what they did in the last trial begin another


class PayingThreads:
    """Calls a step again and again, on the number of threads on which it is fastest.

    The numbers are tried at the first call, again when the step has become slow, and from time to time, as a busy
    machine may have become idle. In a trial the same step is done on each number; a number is left out for good if its
    result has other bits than on all threads, because then a rollout would depend on how busy the machine was.

    most: the threads that there are; they are set again after each call.
    """

    def __init__(self, most: int):
        self.counts = [most, *(count for n in range(most.bit_length() - 1, -1, -1) if (count := 1 << n) < most)]
        self.best = most
        self._most = most
        self._usual = 0.0  # seconds of a step
        self._slow = 0  # steps in a row that took longer
        self._left, self._pause = 0, FIRST  # steps until the next trial, and between this one and the last

    def __call__(self, step: Callable[[], None], result: torch.Tensor) -> None:
        """Do a step, which writes to `result`; done again it writes the same."""
        if len(self.counts) == 1:
            step()
            return
        if not self._left or self._slow == IN_A_ROW:
            self._try(step, result)
            return
        seconds = self._seconds(step, self.best)
        self._slow = self._slow + 1 if seconds > SLOW * self._usual else 0
        self._left -= 1

    def _try(self, step: Callable[[], None], result: torch.Tensor) -> None:
        """Do a step twice on each number of threads; the first time may include what a new number needs."""
        before, seconds, expected = self.best, dict[int, float](), None
        for count in self.counts:
            twice = self._seconds(step, count), self._seconds(step, count)
            expected = result.clone() if expected is None else expected
            if torch.equal(result, expected):
                seconds[count] = min(twice)
        if len(seconds) < len(self.counts):
            self._seconds(step, self._most)  # the others may have written other bits
        self.counts, self.best = list(seconds), min(seconds, key=seconds.__getitem__)
        self._usual, self._slow = seconds[self.best], 0
        self._pause = FIRST if self.best != before else min(2 * self._pause, LONGEST)
        self._left = self._pause

    def _seconds(self, step: Callable[[], None], count: int) -> float:
        """Seconds of a step on so many threads."""
        torch.set_num_threads(count)
        try:
            began = time.perf_counter()
            step()
            return time.perf_counter() - began
        finally:
            torch.set_num_threads(self._most)


@cache
def paying_threads(most: int) -> PayingThreads:
    """Those of this process, so that a rollout knows what the one before it has found."""
    return PayingThreads(most)
