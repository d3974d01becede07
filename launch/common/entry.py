"""Runs a program, prints its errors and ends the process."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from hark import UserError
from hark.grpo.runtime.leaving import claim_report, report
from hark.grpo.runtime.out_of_memory import is_out_of_memory, reason
from hark.shown import say, shown

# Seconds until one of several processes reports an unexpected error. If the cause is that another process has ended,
# the launcher ends this one before that.
PATIENCE = 3.0
LINES, LONGEST = 20, 1000  # of an error's message: lines, and characters of each
PANIC = "PanicException"  # of code in Rust, such as the tokenizers; its class has no module to import it from
# Errors of a disk that takes nothing more, or not from this user, or that fails.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line, then end the process: status 0, 1 after an error, 128 + a signal's number.

    A UserError is printed as one line, another error with its traceback. Of several processes one prints.
    """
    try:
        status = _status(main)
    except KeyboardInterrupt as interrupt:  # also one that came while `_status` handled an error
        status = 128 + getattr(interrupt, "signal", signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":
            claim_report()
            say(str(interrupt) or "interrupted", file=sys.stderr)
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        status = 1
        claim_report()
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
    except SystemExit as end:  # argparse has printed its message
        status = end.code if isinstance(end.code, int) else _report(end.code) if end.code else 0
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except BaseException as error:  # some of torch's errors are no Exception
        said = sentence(error)
        text = traceback.format_exc().rstrip() if said is None else f"error: {said}"
        if said is None and "TORCHELASTIC_ERROR_FILE" in os.environ:
            time.sleep(PATIENCE)
        status = _report(text)
    sys.stdout.flush()
    return status


def sentence(error: BaseException) -> str | None:
    """What a command says of an error that its user can mend; None for any other."""
    if isinstance(error, UserError):
        return in_lines(error)
    if isinstance(error, OSError) and error.errno in DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; make room or give access there, or choose another directory"
    if is_out_of_memory(error):
        return f"out of memory ({reason(error)}); `hark plan` says what to change"
    if type(error).__name__ == PANIC:
        said = shown(" ".join(str(error).split()), LONGEST)
        return f"compiled code gave up ({said}); the tokenizer of the model may be damaged"
    return None


def in_lines(error: UserError) -> str:
    """The message of an error as a terminal may show it: it may quote what came from a data set or a model."""
    first = str(error).split("\n")[:LINES]
    return "\n".join(shown(line, LONGEST) for line in first)


def _report(text: str) -> int:
    report(text)
    return 1
