"""Decodes clips and says how far it is."""

from __future__ import annotations

from collections.abc import Sequence

from hark.data.clip import Clip
from hark.data.clips import Finding, Rules, inspect_all, memory_of
from hark.launch.common.progress import counted
from hark.shown import say


def decoded(
    clips: Sequence[Clip], rules: Rules, *, workers: int, what: str = "clips checked", show: bool = True
) -> dict[Clip, Finding]:
    """What decoding finds in each clip; those that the user's memory knows are not decoded again.

    what: the name of the clips for the lines that say how many are done. show: whether to print anything.
    """
    memory = memory_of(rules)
    inspected = inspect_all(clips, rules, workers=workers, memory=memory)
    found = dict(counted(inspected, len(clips), what, show=show))
    if memory.problem and show:
        say(memory.advice())
    return found
