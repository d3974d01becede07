"""Bounds of this process, which the system keeps also inside of compiled code."""

from __future__ import annotations

from pathlib import Path


def limit_memory(more: int) -> None:
    """Let this process take at most `more` bytes beyond what it has; on Linux only."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        most = int(statm.read_text().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
