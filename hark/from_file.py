"""Objects of a user's own files, which a configuration names as `path/to/file.py:name`.

Such a configuration names code that will be run: use only configurations whose files you trust.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import itertools
import os
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from hark import UserError

_MODULES: dict[str, ModuleType] = {}  # by absolute path
_NUMBERS = itertools.count()  # in the names of modules: two files may have one name
_TEXTS: dict[str, str] = {}  # of the files that were run, by absolute path
_LOCK = threading.RLock()  # rewards are looked up in a thread of their own; a file that is run may call from_file


class OwnFileError(UserError, ValueError):
    """A file of the user's own is missing, cannot be run, or does not have the name."""


def is_in_file(name: str) -> bool:
    """Whether a name is that of an object in a file: `path/to/file.py:name`."""
    return ".py:" in name


def short_name(name: str) -> str:
    """`name` of `path/to/file.py:name`; another name unchanged."""
    return name.rpartition(":")[2] if is_in_file(name) else name


def from_file(name: str) -> Any:
    """The object that `path/to/file.py:name` names; the path is relative to the working directory.

    In a configuration file the path may also be relative to the directory of that file; reading the configuration
    replaces it by a path from the working directory.

    A file is run once, whatever number of its objects is used. OwnFileError says what is wrong with it.
    """
    path, _, key = name.rpartition(":")
    module = _module(path)
    if not hasattr(module, key):
        defined = [other for other in vars(module) if not other.startswith("_")]
        near = difflib.get_close_matches(key, defined, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(defined) or 'nothing'}"
        raise OwnFileError(f"{path}: has no {key!r}{hint}")
    return getattr(module, key)


def own_digests() -> dict[str, str]:
    """The SHA-256 of each file that was run, by its name without the directory; one for all files of the same name."""
    digests: dict[str, Any] = {}
    for path, text in sorted(_TEXTS.items()):
        digests.setdefault(Path(path).name, hashlib.sha256()).update(text.encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def save_own_files(directory: Path) -> None:
    """Write the text of each file that was run to `directory`, as it was then; beside another text of that name."""
    for path, text in _TEXTS.items():
        directory.mkdir(parents=True, exist_ok=True)
        name = Path(path)
        places = (directory / f"{name.stem}{'' if n == 1 else f'-{n}'}{name.suffix}" for n in itertools.count(1))
        place = next(place for place in places if not place.exists() or place.read_text(encoding="utf-8") == text)
        place.write_text(text, encoding="utf-8")


def _module(path: str) -> ModuleType:
    absolute = os.path.abspath(os.path.expanduser(path))
    with _LOCK:
        if absolute not in _MODULES:
            if not os.path.isfile(absolute):
                raise OwnFileError(f"{path}: no such file (working directory {os.getcwd()})")
            text = Path(absolute).read_text(encoding="utf-8", errors="replace")
            _run(absolute, path)
            _TEXTS[absolute] = text
        return _MODULES[absolute]


def _run(absolute: str, path: str) -> None:
    """Run a file as a module. It is in sys.modules from before the run on; dataclasses and pickle need that.

    It is in _MODULES from before the run on too. So two files can use each other: each sees what the other has defined
    so far, as with Python's imports.
    """
    name = f"hark_own_file_{next(_NUMBERS)}_{Path(absolute).stem}"
    spec = importlib.util.spec_from_file_location(name, absolute)
    if spec is None or spec.loader is None:
        raise OwnFileError(f"{path}: not a Python file")
    module = _MODULES[absolute] = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name], _MODULES[absolute]
        raise OwnFileError(f"{path}:{_line(error, absolute)}: {type(error).__name__}: {error}") from error


def _line(error: BaseException, path: str) -> int:
    """The last line of the file that was being run when it failed."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno or 1
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return next((line for line in reversed(lines) if line), 1)
