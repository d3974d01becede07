"""A reward of what a completion is decoded to, such as speech of codec tokens."""

from __future__ import annotations

from hark.data.rewards.group import Group
from hark.from_file import from_file


def artefact(group: Group, *, decode: str, score: str) -> list[float | None]:
    """score(waveform, rate, example) of (waveform, rate) = decode(ids) for each completion.

    decode, score: functions of your own files, path/to/file.py:name. decode: completion ids, the stop token included,
    -> (waveform (samples,) float32, sample rate in Hz). score: -> a number, or None.
    """
    to_sound, judge = from_file(decode), from_file(score)
    return [judge(*to_sound(ids), group.example) for ids in group.ids]
