"""How the processes of a run end: one of them reports, and none waits for another."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from hark.parent import when_parent_ends
from hark.shown import say_text

ORPHANED = (
    "error: the launcher of this process has died; give the same command again, for a training run with run.resume=true"
)


def claim_report() -> bool:
    """Whether this process is the first of its run on this machine to ask; later ones must not report their errors.

    torchrun gives each run a directory, in which the first one leaves a file.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own:
        return True
    try:
        (Path(own).parents[1] / "reported").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # two reports are better than none
        return True
    return True


def report(text: str) -> None:
    """Print an error unless another process of this run has printed one: the first error causes the others."""
    if claim_report():
        say_text(text, file=sys.stderr)


def leave(text: str, status: int) -> None:
    """Report and end this process at once, from any thread, whatever its main thread is waiting for."""
    report(text)
    os._exit(status)


def leave_with_launcher() -> None:
    """From now on, end this process within a second of the end of torchrun, if that has started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        when_parent_ends(lambda: leave(ORPHANED, 1))


def leave_within(seconds: float, text: str, status: int) -> threading.Timer:
    """Leave after so many seconds, unless the returned timer is cancelled."""
    timer = threading.Timer(seconds, leave, (text, status))
    timer.daemon = True
    timer.start()
    return timer
