"""How a program is started on several processes of this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys

from hark.shown import say


def torchrun(processes: int) -> list[str]:
    """The words of a command line that run a script, or a module after "-m", on so many processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def environment() -> dict[str, str]:
    """One thread per process unless the user says otherwise, as torchrun sets it, but without its warning."""
    return {"OMP_NUM_THREADS": "1"} | os.environ


def launch(processes: int, words: list[str]) -> int:
    """Run a script, or a module after "-m", as torchrun does; returns the exit status of the process that failed first.

    torchrun's own report of a failure is left out, because the process that failed has printed its error.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable()  # of this process, which only starts the others and waits for them
    os.environ.update(environment())
    try:
        run(parse_args([*torchrun(processes)[3:], *words]))
    except SignalException as stop:  # has been passed on to the processes
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        reason = "; the system does this when memory runs out, see `hark plan`" if name == "SIGKILL" else ""
        say(f"error: process {rank} was ended by {name}{reason}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0
