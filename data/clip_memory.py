"""Remembers what decoding found in each clip, in an SQLite file of the user, so that no clip is decoded twice."""

import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from hark.data.clip import Cell

BLOCK = 2**20  # bytes read at a time
WAIT = 10.0  # seconds for another process that writes
TABLE = """CREATE TABLE IF NOT EXISTS clips (
    path TEXT, rules TEXT, size INTEGER, mtime_ns INTEGER, digest TEXT, found TEXT, PRIMARY KEY (path, rules))"""


@dataclass(frozen=True)
class State:
    """What tells whether a file is the one that was decoded. The content decides where the size or the time differs.

    The size and the time of a cell are those of the file of its table; without such a file they are 0.
    """

    size: int
    mtime_ns: int
    digest: str


class ClipMemory:
    """Texts about clips, by key and by `rules`, a text that names all that they depend on beside the clip.

    A memory that cannot be read or written remembers nothing, and `problem` says why. Several processes may use it.
    """

    def __init__(self, rules: str, path: Path | None = None) -> None:
        self.path = path or default_path()
        self.problem = ""
        self._rules = rules

    def recall(self, keys: Iterable[str]) -> dict[str, tuple[State, str]]:
        """What is known of each clip, and the state in which it was then; of other clips there is no entry."""
        query = "SELECT size, mtime_ns, digest, found FROM clips WHERE path = ? AND rules = ?"
        known = {}

        def read(database: sqlite3.Connection) -> None:
            for key in keys:
                row = database.execute(query, (key, self._rules)).fetchone()
                if row:
                    known[key] = State(*row[:3]), row[3]

        self._try(read)
        return known

    def remember(self, found: Mapping[str, tuple[State, str]]) -> None:
        """Add what was found, or replace what was known."""
        rows = [
            (key, self._rules, state.size, state.mtime_ns, state.digest, text) for key, (state, text) in found.items()
        ]
        self._try(lambda base: base.executemany("INSERT OR REPLACE INTO clips VALUES (?, ?, ?, ?, ?, ?)", rows))

    def advice(self) -> str:
        """What to do about the problem."""
        return (
            f"{self.path}: cannot be used ({self.problem}), so clips are decoded at every start; delete the file, or "
            "set XDG_CACHE_HOME to a directory that can be written"
        )

    def _try(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Do something with the database in one transaction; after a problem, nothing more."""
        if self.problem:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=WAIT)) as database, database:
                database.execute(TABLE)
                work(database)
        except (sqlite3.Error, OSError) as error:
            self.problem = str(error)


def default_path() -> Path:
    """clips.sqlite in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "hark" / "clips.sqlite"


def state_of(source: Path | Cell, before: State | None) -> State:
    """The state of a file or a cell. Its content is read only if the size or the time differ from those before."""
    file = source if isinstance(source, Path) else source.file
    size, mtime_ns = (file.stat().st_size, file.stat().st_mtime_ns) if file else (0, 0)
    if file and before and (before.size, before.mtime_ns) == (size, mtime_ns):
        return before
    return State(size, mtime_ns, _digest(source) if isinstance(source, Path) else sha256(source.read()).hexdigest())


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
