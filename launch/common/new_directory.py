"""The directory that a program writes."""

from pathlib import Path

from hark.data.errors import DataError


def check_new(out: Path) -> None:
    """DataError if something is there that would be overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not an empty directory; name another one with --out")
