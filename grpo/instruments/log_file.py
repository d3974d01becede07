"""A log of JSON lines that grows, on a disk that may be full for a while."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from hark import UserError
from hark.files import sync
from hark.shown import say


class LogError(UserError, RuntimeError):
    """The log of a run cannot be written, or is not what was written."""


class LogFile:
    """Adds lines to a file. It is opened and closed for each, so that a later crash does not lose them.

    required: a line that cannot be written raises LogError; else it is kept, and written with the next one that can be.
    """

    def __init__(self, path: Path, *, required: bool = True):
        self.path, self._required = path, required
        self._waiting: list[bytes] = []  # lines that are not in the file

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; the record is of finite numbers."""
        self._waiting.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            if self._required:
                self._waiting.clear()
                raise self._unwritten(error) from error
            if len(self._waiting) == 1:
                say(f"warning: {self._reason(error)}; its lines are kept until they can be (checkpoint.required=false)")

    def sync(self) -> None:
        """Have on the disk what is written."""
        for path in (self.path, self.path.parent):
            try:
                if path.exists():
                    sync(path)
            except OSError as error:
                if self._required:
                    raise self._unwritten(error) from error

    def close(self) -> None:
        """Try once more to write what is kept, and say what is lost."""
        if self._waiting:
            try:
                self._write()
            except OSError as error:
                say(f"warning: {self._reason(error)}; lines that are lost: {len(self._waiting)}")

    def _write(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(self._waiting))
        except OSError:
            with suppress(OSError):  # a part of a line may be there
                os.truncate(self.path, size)
            raise
        self._waiting.clear()

    def _unwritten(self, error: OSError) -> LogError:
        return LogError(
            f"{self._reason(error)}; make room, or the directory again; the same command with run.resume=true goes on "
            "from the last checkpoint"
        )

    def _reason(self, error: OSError) -> str:
        return f"{self.path} cannot be written ({error.strerror})"
