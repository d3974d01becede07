"""Texts of others, such as completions, ids and names in files, as a terminal and a message show them."""

from __future__ import annotations

from typing import TextIO

GAP = " ... "
LONGEST, LONGEST_NAME = 2000, 200  # characters of a printed line, and of a name or a reason in one


def shown(text: object, longest: int) -> str:
    """A text on one line of at most `longest` characters, its middle left out if it has more.

    Control characters are escaped, because they could steer a terminal: move its cursor, hide lines, set its title.
    """
    line = str(text)
    if len(line) > 2 * longest:  # the middle of a huge text is never looked at
        line = line[:longest] + line[-longest:]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    half = (longest - len(GAP)) // 2
    return line if len(line) <= longest else line[:half] + GAP + line[-half:]


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print each text on a line of its own, as `shown` gives it: a line break in a text is escaped too.

    They are written in one piece, as other processes may print too.
    """
    print("\n".join(shown(line, LONGEST) for line in lines) + "\n", end="", file=file, flush=True)


def say_text(text: str, file: TextIO | None = None) -> None:
    """Print a text of several lines, such as a table, each line as `say` prints it."""
    say(*text.split("\n"), file=file)
