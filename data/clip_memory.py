"""Remembers what decoding found in each clip, in an SQLite file of the user, so that no clip is decoded twice."""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

BLOCK = 2**20  # bytes read at a time
WAIT = 10.0  # seconds for another process that writes
TABLE = """CREATE TABLE IF NOT EXISTS clips (
    path TEXT, rules TEXT, size INTEGER, mtime_ns INTEGER, digest TEXT, found TEXT, PRIMARY KEY (path, rules))"""


@dataclass(frozen=True)
class State:
    """What tells whether a file is the one that was decoded. The content decides where only the time differs."""

    size: int
    mtime_ns: int
    digest: str


class ClipMemory:
    """Texts about files, by path and by `rules`, a text that names all that they depend on beside the file.

    A memory that cannot be read or written remembers nothing, and `problem` says why. Several processes may use it.
    """

    def __init__(self, rules: str, path: Path | None = None) -> None:
        self.path = path or default_path()
        self.problem = ""
        self._rules = rules

    def recall(self, paths: Iterable[Path]) -> dict[Path, tuple[State, str]]:
        """What is known of each file, and the state in which it was then; of other files there is no entry."""
        query = "SELECT size, mtime_ns, digest, found FROM clips WHERE path = ? AND rules = ?"
        known = {}

        def read(database: sqlite3.Connection) -> None:
            for path in paths:
                row = database.execute(query, (os.path.abspath(path), self._rules)).fetchone()
                if row:
                    known[path] = State(*row[:3]), row[3]

        self._try(read)
        return known

    def remember(self, found: Mapping[Path, tuple[State, str]]) -> None:
        """Add what was found, or replace what was known."""
        rows = [
            (os.path.abspath(path), self._rules, state.size, state.mtime_ns, state.digest, text)
            for path, (state, text) in found.items()
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


def state_of(path: Path, before: State | None) -> State:
    """The state of a file, whose content is read only if its size or its time differ from those before."""
    now = path.stat()
    if before and (before.size, before.mtime_ns) == (now.st_size, now.st_mtime_ns):
        return before
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return State(now.st_size, now.st_mtime_ns, digest.hexdigest())
