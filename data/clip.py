"""Where the clip of a question is: a file or a cell of a table, and a window of it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Cell(Protocol):
    """A cell of a table that holds an encoded clip. It is hashable, can be pickled, and `str` names it."""

    @property
    def key(self) -> str:
        """A name that does not depend on the working directory, where that is possible."""

    @property
    def file(self) -> Path | None:
        """The file whose size and time change with the cell; None where there is no such file."""

    def read(self) -> bytes:
        """The encoded clip, which is read from the table at each call; AudioError if there is none."""


@dataclass(frozen=True)
class Clip:
    """Where a clip is, a file or a cell of a table, and which window of it is meant, in seconds."""

    source: Path | Cell
    start: float = 0.0
    end: float | None = None  # None is the end of the file

    def __str__(self) -> str:
        """The name for messages: "clips/a.wav", or "clips/a.wav (2 to 3.5 s)"."""
        return f"{self.source}{self._window()}"

    @property
    def key(self) -> str:
        """A name that is the same in every working directory."""
        source = os.path.abspath(self.source) if isinstance(self.source, Path) else self.source.key
        return f"{source}{self._window()}"

    @property
    def seconds(self) -> float | None:
        """The length of the window; None where only the file tells it."""
        return None if self.end is None else self.end - self.start

    @property
    def is_window(self) -> bool:
        return bool(self.start) or self.end is not None

    def _window(self) -> str:
        if not self.is_window:
            return ""
        return f" ({self.start:.15g} s to {'the end' if self.end is None else f'{self.end:.15g} s'})"


@dataclass(frozen=True)
class Held:
    """A cell whose encoded clip was read, for a process that has no table."""

    name: str
    content: bytes
    file: Path | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        return self.name

    def read(self) -> bytes:
        return self.content
