"""The lock of a run directory: one run at a time writes to it. It is free as soon as its processes have ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO

from hark.grpo.config import ConfigError
from hark.grpo.runtime.collectives import World, exchange_rows

NAME = "run.lock"
PATIENCE = 15.0  # seconds until the processes of an earlier run have ended, whose launcher was killed


@contextmanager
def locked(directory: Path, world: World, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock of a run directory in the block, on all ranks. Raises ConfigError if another run holds it.

    Rank 0 locks the file exclusively, which fails while any process of another run holds it. Then every rank holds it
    together with the others, so that it is free only when all of them have ended. A disk without locks is said.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / NAME).open("a+") as file:
        problem = ""
        if world.is_main:
            problem = _taken(fcntl, file, directory, patience)
        problem = exchange_rows([problem] if world.is_main else [], world)[0]
        if problem:
            raise ConfigError(problem)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError as error:
            if world.is_main:
                print(f"warning: {directory} cannot be locked ({error.strerror}); start no other run in it", flush=True)
        if world.is_main:
            file.truncate(0)
            file.write(f"{os.getpid()} on {os.uname().nodename}: {' '.join(sys.argv)[:500]}\n")
            file.flush()
        exchange_rows([], world)  # none goes on before all have it
        yield


def _taken(fcntl: ModuleType, file: IO[str], directory: Path, patience: float) -> str:
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
                    f"{directory} is in use by another run{f' (process {owner})' if owner else ''}; wait for its end, "
                    "or choose another run.directory"
                )
            time.sleep(0.2)
        except OSError:  # this disk has no locks; said where it is shared
            return ""
