"""Processes that make calls for this one, so that a call that hangs, crashes or takes too much memory ends only them.

Such a process is a new interpreter, `python -m hark.data.worker FD`, not a fork. Libraries get one thread each. It ends
with the process that started it; on Linux the system ends it, also in a call that lets no other thread run, such as a
regular expression that backtracks. It is no sandbox: it may do what this process may.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from hark.limits import limit_memory
from hark.parent import when_parent_ends

START = 300.0  # seconds until a new process has made its first call
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# pyarrow's own allocator takes addresses by the GiB, which count for the bound of memory.
OF_ARROW = {"ARROW_DEFAULT_MEMORY_POOL": "system"}
# A worker needs no ranks of its own, and no GPU unless a file of the user's asks for one.
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PR_SET_PDEATHSIG = 1  # of prctl, on Linux: the signal that a process gets when the thread that started it ends


class WorkerError(Exception):
    """Why a process has no result, as the end of a sentence that begins with "its process"."""


class LateError(WorkerError):
    """The call took too long."""


class Worker:
    """One process, started at its first call, and again after it was ended. Calls come from one thread at a time.

    module: what a new process imports, whose time does not count as that of a call. memory: bytes that it may take
    beyond what it has then (`limit_memory`); a call that needs more raises MemoryError. None is no limit.
    """

    def __init__(self, module: str, *, memory: int | None = None):
        self._first = pickle.dumps((prepare, (module, memory)))
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """What a function of a module returns or raises; WorkerError if it does neither within `timeout` seconds."""
        try:
            sent = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise WorkerError(f"cannot be given the call: {type(error).__name__}: {error}") from error
        if self._pipe is None:
            self._start()
            self._reply(self._first, START)
        return self._reply(sent, timeout)

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            _end(self._process)
        self._process = self._pipe = None

    def _start(self) -> None:
        own, other = socket.socketpair()
        with other:
            environment = {k: v for k, v in os.environ.items() if k not in RANKS} | ONE_THREAD | OF_ARROW
            start = partial(
                subprocess.Popen,
                [sys.executable, "-m", "hark.data.worker", str(other.fileno())],
                env=environment,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._process = _starter(os.getpid()).submit(start).result()
        weakref.finalize(self, _end, self._process)
        self._pipe = Connection(own.detach())

    def _reply(self, sent: bytes, timeout: float) -> Any:
        """What a call returns or raises. Without a reply the process is ended."""
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(sent)
            reply = self._pipe.recv_bytes() if self._pipe.poll(timeout) else b""
            failure: WorkerError = LateError(f"was not finished after {timeout:g} s and was ended")
        except (EOFError, OSError):
            reply, failure = b"", WorkerError(f"died{self._status()}")
        if not reply:
            self.close()
            raise failure
        returned, value = pickle.loads(reply)
        if returned:
            return value
        raise value

    def _status(self) -> str:
        if self._process is None:
            return ""
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return ""
        return f" of signal {-code}" if code < 0 else f" with status {code}"


@cache
def _starter(process: int) -> ThreadPoolExecutor:
    """The thread that starts the workers of a process. They end with their thread, so it is none that makes calls."""
    return ThreadPoolExecutor(1, "workers")


def prepare(module: str, memory: int | None) -> None:
    """What a new process does first."""
    import_module(module)
    if memory is not None:
        limit_memory(memory)


def serve(descriptor: int) -> None:
    """Make the calls that come in, until the other end is closed."""
    pipe = Connection(descriptor)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    when_parent_ends(lambda: os._exit(0))  # elsewhere, and where it has ended before
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            reply = pickle.dumps((True, function(*arguments)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            reply = _raised(error)
        try:
            pipe.send_bytes(reply)
        except OSError:
            return


def _raised(error: Exception) -> bytes:
    """An exception as a reply; one that cannot be sent becomes a RuntimeError."""
    try:
        reply = pickle.dumps((False, error))
        pickle.loads(reply)
        return reply
    except Exception:
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))


def _end(process: subprocess.Popen) -> None:
    """Kill a process and those that it started."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass
        process.wait()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
