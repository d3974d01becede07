"""Bounds of what this process takes: of its memory, and of files that it reads at once."""

from __future__ import annotations

import stat
from pathlib import Path


def limit_memory(more: int) -> None:
    """Let this process take at most `more` bytes beyond what it has, in compiled code too; on Linux only.

    Counted is what may be written to. Libraries, files that are mapped to be read, and addresses that are only
    reserved, of which CUDA takes hundreds of gigabytes, are not.
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        most = int(statm.read_text().split()[5]) * resource.getpagesize() + more
        before = resource.getrlimit(resource.RLIMIT_DATA)[1]  # which no process may raise
        most = most if before == resource.RLIM_INFINITY else min(most, before)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def is_plain(path: Path, most: float) -> bool:
    """Whether a path leads to a file of at most `most` bytes: no pipe or device, on which a reader would wait or never
    end. Raises OSError if there is nothing, or if it cannot be looked at."""
    status = path.stat()
    return stat.S_ISREG(status.st_mode) and status.st_size <= most
