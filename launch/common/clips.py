"""Decodes clips and says how far it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hark.data.clips import Clip, Rules, inspect_all, memory_of
from hark.data.examples import Example
from hark.launch.common.progress import counted


def paths_of(examples: Iterable[Example]) -> list[Path]:
    """The clips of the examples, each once, in order."""
    return list(dict.fromkeys(example.audio_path for example in examples if example.audio_path))


def decoded(
    paths: Sequence[Path], rules: Rules, *, workers: int, what: str = "clips checked", show: bool = True
) -> dict[Path, Clip]:
    """What decoding finds in each clip; those that the user's memory knows are not decoded again.

    what: the name of the clips for the lines that say how many are done. show: whether to print anything.
    """
    memory = memory_of(rules)
    clips = inspect_all(paths, rules, workers=workers, memory=memory)
    found = dict(counted(clips, len(paths), what, show=show))
    if memory.problem and show:
        print(memory.advice(), flush=True)
    return found
