"""Runs a program, prints its errors and ends the process."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from hark import UserError
from hark.grpo.runtime.out_of_memory import is_out_of_memory, reason

# Seconds until one of several processes reports an unexpected error. If the cause is that another process has ended,
# the launcher ends this one before that.
PATIENCE = 3.0
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended: 128 + SIGINT


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line, then end the process: status 0, 1 after an error, 130 after Ctrl-C.

    A UserError is printed as one line, another error with its traceback. Of several processes one prints.
    """
    try:
        status = _status(main)
    except KeyboardInterrupt as interrupt:  # also one that came while `_status` handled an error
        status = INTERRUPTED
        if os.environ.get("RANK", "0") == "0":
            _claim_report()
            print(str(interrupt) or "interrupted", file=sys.stderr)
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        status = 1
        _claim_report()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # Not by sys.exit: FSDP holds references to the process group until the interpreter is finalised. A gloo thread may
    # then abort the process (observed in 3 of 25 runs), and NCCL may wait for ranks that have failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status(main: Callable[[list[str]], None]) -> int:
    """Call `main`, print its error if there is one, and return the exit status."""
    status = 0
    try:
        main(sys.argv[1:])
    except UserError as error:
        status = _report(f"error: {error}")
    except SystemExit as end:  # argparse has printed its message
        status = end.code if isinstance(end.code, int) else _report(end.code) if end.code else 0
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except BaseException as error:  # some of torch's errors are no Exception
        if is_out_of_memory(error):
            status = _report(f"error: out of memory ({reason(error)}); `hark plan` says what to change")
        else:
            text = traceback.format_exc().rstrip()
            if "TORCHELASTIC_ERROR_FILE" in os.environ:
                time.sleep(PATIENCE)
            status = _report(text)
    sys.stdout.flush()
    return status


def _report(text: str) -> int:
    """Print an error unless another process of this run has printed one: the first error causes the others."""
    if _claim_report():
        print(text, file=sys.stderr)
    return 1


def _claim_report() -> bool:
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
