"""Runs a program, prints its errors and ends the process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from hark import UserError


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line, then end the process. A UserError is printed as one line, not a traceback."""
    status = 0
    try:
        main(sys.argv[1:])
    except UserError as error:
        rank = os.environ.get("RANK")
        print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        status = 1
    # Not by sys.exit: FSDP holds references to the process group until the interpreter is finalised. A gloo thread may
    # then abort the process (observed in 3 of 25 runs), and NCCL may wait for ranks that have failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
