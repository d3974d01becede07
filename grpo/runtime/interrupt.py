"""SIGTERM and SIGINT: a run finishes its micro-batch, saves and leaves; a second signal ends it at once."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from hark.grpo.runtime.leaving import leave, leave_within

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Signals within so many seconds count as one: a terminal sends Ctrl-C to torchrun and to its processes, and torchrun
# passes it on.
ONE = 1.0
GO_ON = "the same command with run.resume=true goes on from the last checkpoint"


class Interrupted(KeyboardInterrupt):
    """A signal has asked the program to end; `signal` is its number, and the text is what to say at the end."""

    def __init__(self, text: str, number: int = signal.SIGINT):
        super().__init__(text)
        self.signal = number


class Interruption:
    """The signal that this process has received; 0 is none."""

    signal = 0
    _since = 0.0  # when it came

    def received(self) -> bool:
        """Whether there was one."""
        return self.signal > 0

    @contextmanager
    def noted(self, *, grace: float, signals: Collection[int] = SIGNALS) -> Iterator[None]:
        """Note SIGTERM and SIGINT in the block, whose code must look at `signal` and leave.

        grace: seconds after the signal until the process ends, if it has not left before. signals: which are noted; the
        others are left alone, and all of them where the block is not run by the main thread. Within a block another may
        note them instead.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        own, other = socket.socketpair()
        other.setblocking(False)
        # The descriptor is written to while the main thread waits in a library, when no handler of Python can run.
        before = signal.set_wakeup_fd(other.fileno(), warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in signals}
        thread = threading.Thread(target=self._listen, args=(own, grace, signals), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            other.close()
            thread.join()
            own.close()

    def _listen(self, pipe: socket.socket, grace: float, signals: Collection[int]) -> None:
        timer = None
        while received := pipe.recv(1):
            number = received[0]
            if number not in signals:
                continue
            name = signal.Signals(number).name
            if not self.signal:
                self.signal, self._since = number, time.monotonic()
                late = f"not left within run.grace, {grace:g} s; " if grace else ""
                timer = leave_within(grace, f"{name}: {late}ended at once; {GO_ON}", 128 + number)
            elif time.monotonic() - self._since > ONE:
                leave(f"{name}: ended at once by a second signal; {GO_ON}", 128 + number)
        if timer is not None:
            timer.cancel()


@contextmanager
def interruptible(say: Callable[[], str]) -> Iterator[None]:
    """In the block, Ctrl-C leads to an Interrupted with the text of `say`, whatever error comes of it.

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
            raise Interrupted(say()) from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)
