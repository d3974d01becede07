"""Processes that run rewards, so that one that hangs or dies is ended and replaced.

Such a process is a new interpreter, not a fork. Libraries get one thread each.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from hark.data.rewards.group import Group
from hark.data.rewards.serving import Reply

START = 300.0  # seconds until a new process is ready; files of the user's own may load a model
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# A worker needs no ranks of its own, and no GPU unless the user's file asks for one.
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Worker:
    """One process, started at its first call, and again after it was ended. Calls come from one thread at a time."""

    def __init__(self, options: Mapping[str, Mapping[str, Any]]):
        self._options = {name: dict(own) for name, own in options.items()}
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def call(self, name: str, group: Group, timeout: float) -> Reply:
        """The reward `name` of a group, or why there is none after `timeout` seconds."""
        extra = dict(group.example.extra)
        try:
            sent = pickle.dumps(
                (name, dataclasses.replace(group, example=dataclasses.replace(group.example, extra=extra)))
            )
        except Exception as error:
            return Reply(
                reason=f"the example cannot be sent to the process of rewards: {type(error).__name__}: {error}"
            )
        try:
            pipe = self._ready()
            pipe.send_bytes(sent)
            if pipe.poll(timeout):
                return Reply(*pipe.recv())
            reason = f"not finished after {timeout:g} s (reward.timeout); its process was ended"
        except (EOFError, OSError):
            reason = f"its process died{self._status()}"
        self.close()
        return Reply(reason=reason)

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            _end(self._process)
        self._process = self._pipe = None

    def _ready(self) -> Connection:
        if self._pipe is None:
            own, other = socket.socketpair()
            with other:
                command = [sys.executable, "-m", "hark.data.rewards.serving", str(other.fileno())]
                environment = {k: v for k, v in os.environ.items() if k not in RANKS} | ONE_THREAD
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    pass_fds=[other.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            weakref.finalize(self, _end, self._process)
            self._pipe = Connection(own.detach())
            self._pipe.send(self._options)
            if not self._pipe.poll(START):
                raise EOFError
            self._pipe.recv()
        return self._pipe

    def _status(self) -> str:
        if self._process is None:
            return ""
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return ""
        return f" of signal {-code}" if code < 0 else f" with status {code}"


def _end(process: subprocess.Popen) -> None:
    """Kill a process and those that it started."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass
        process.wait()
