"""The lock of a run directory or of a file: one run at a time writes there. It is free once that has ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO

from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import World, exchange_rows
from hark.shown import say

NAME = "run.lock"
PATIENCE = 15.0  # seconds until the processes of an earlier run have ended, whose launcher was killed


def locked(directory: Path, world: World, *, patience: float = PATIENCE) -> AbstractContextManager[None]:
    """Hold the lock of a run directory in the block, on all ranks. Raises ConfigError if another run holds it."""
    return _locked(directory, directory / NAME, "another run.directory", world, patience)


def locked_file(path: Path, world: World, *, patience: float = PATIENCE) -> AbstractContextManager[None]:
    """The same for a file that is added to; its lock is the file PATH.lock."""
    return _locked(path, path.with_name(f"{path.name}.lock"), "another file", world, patience)


@contextmanager
def _locked(place: Path, lock: Path, instead: str, world: World, patience: float) -> Iterator[None]:
    """Hold a lock.

    Rank 0 locks the file exclusively, which fails while any process of another run holds it. Then every rank holds it
    together with the others, so that it is free only when all of them have ended. A disk without locks is said.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        opened = lock.open("a+")
    except OSError as error:
        raise ConfigError(f"{lock}: cannot be written ({error.strerror}); choose {instead}") from error
    with opened as file:
        problem = ""
        if world.is_main:
            problem = _taken(fcntl, file, place, instead, patience)
        problem = exchange_rows([problem] if world.is_main else [], world)[0]
        if problem:
            raise ConfigError(problem)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError as error:
            if world.is_main:
                say(f"warning: {place} cannot be locked ({error.strerror}); start no other run with it")
        if world.is_main:
            file.truncate(0)
            file.write(f"{os.getpid()} on {os.uname().nodename}: {' '.join(sys.argv)[:500]}\n")
            file.flush()
        exchange_rows([], world)  # none goes on before all have it
        yield


def _taken(fcntl: ModuleType, file: IO[str], place: Path, instead: str, patience: float) -> str:
    """Take the lock alone; returns why it cannot be had, or ""."""
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            if time.monotonic() > until:
                file.seek(0)
                owner = file.read(600).strip()
                return (
                    f"{place} is in use by another run{f' (process {owner})' if owner else ''}; wait for its end, or "
                    f"choose {instead}"
                )
            time.sleep(0.2)
        except OSError:  # this disk has no locks; said where it is shared
            return ""
