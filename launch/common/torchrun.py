"""How a program is started on several processes of this machine."""

import os
import sys


def torchrun(processes: int) -> list[str]:
    """The words of a command line that run a script, or a module after "-m", on so many processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def environment() -> dict[str, str]:
    """One thread per process unless the user says otherwise, as torchrun sets it, but without its warning."""
    return {"OMP_NUM_THREADS": "1"} | os.environ
