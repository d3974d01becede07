"""Errors in data. Every message says where the error is, what it is, what was expected and how to fix it."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from hark import UserError

T = TypeVar("T")


class DataError(UserError, ValueError):
    """A file, a line, a clip or an example cannot be used."""


class AudioError(DataError):
    """An audio file is missing, unreadable, empty, silent, cut off, not finite or too long."""


class MissingClipError(AudioError):
    """The file of a clip does not exist."""


class SilentClipError(AudioError):
    """The peak of a clip is below the threshold of silence."""


class CutClipError(AudioError):
    """A file ends before the sound that its header promises."""


class DecoderError(AudioError):
    """The process that decoded a clip crashed, did not end, or needed too much memory."""


class SkippedClipError(AudioError):
    """A clip is too long and the settings skip such clips: callers count it and go on."""


def named(table: Mapping[str, T], name: str, *, kind: str) -> T:
    """`table[name]`; an unknown name is a DataError that suggests the nearest name and lists all."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown {kind} {name!r}{hint} (known: {', '.join(table)})")
    return table[name]
