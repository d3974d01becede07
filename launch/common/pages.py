"""Tables that a program writes into a page of the documentation, between two marker lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Markers(NamedTuple):
    """The lines before and after what a program writes."""

    begin: str
    end: str = "<!-- to here -->"

    @classmethod
    def of(cls, program: str) -> Markers:
        return cls(f"<!-- {program} writes from here -->")

    def are_in(self, page: str) -> bool:
        _, begin, rest = page.partition(self.begin)
        return bool(begin) and self.end in rest

    def filled(self, page: str, text: str) -> str:
        """The page with this text between the marker lines."""
        before, _, rest = page.partition(self.begin)
        return f"{before}{self.begin}\n\n{text}\n\n{self.end}{rest.partition(self.end)[2]}"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, its cells to the right."""
    lines = [heading, ["--:"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
