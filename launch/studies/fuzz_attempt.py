"""One input of the fuzzing: change a file, read it as a command does, and say what became of it."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hark.launch.common.entry import sentence
from hark.launch.studies.fuzz_inputs import TARGETS, Input, NonsenseError, changed_files
from hark.launch.studies.mutations import of_file, restored


class Outcome(NamedTuple):
    """What became of an input. text: the sentence that refused it, or the traceback."""

    kind: str
    text: str
    seconds: float


@functools.lru_cache(maxsize=1)
def good_files(name: str, root: Path) -> tuple[Path, dict[Path, bytes]]:
    """The directory of this process with the good files of a target, and those of which one is changed."""
    place = root / "places" / f"{name.replace(' ', '-')}-{os.getpid()}"
    place.mkdir(parents=True)
    TARGETS[name].begin(root / "project", place)
    return place, {path: path.read_bytes() for path in changed_files(TARGETS[name], place)}


def attempt(name: str, root: Path, seed: int, number: int) -> Outcome:
    """Change one file, read the files as a command does, and put the good file back."""
    place, files = good_files(name, root)
    chance = random.Random(f"{seed} {name} {number}")
    path = chance.choice(list(files))
    of_file(path, files[path], chance)
    started = time.monotonic()
    kind, text = "accepted", ""
    try:
        with quiet():
            TARGETS[name].read(Input(place, path, files[path], chance))
    except NonsenseError as error:
        kind, text = "nonsense", f"{path.name}: {error}"
    except MemoryError:
        kind, text = "memory", traceback.format_exc()
    except BaseException as error:
        said = sentence(error)
        kind, text = ("refused", said) if said else ("traceback", traceback.format_exc())
    finally:
        seconds = time.monotonic() - started
        restored(path, files[path])
    return Outcome(kind, text, seconds)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries write to the error output, also from compiled code."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
