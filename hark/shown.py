"""Texts of others, such as completions, ids and names in files, as a terminal and a message show them."""

from __future__ import annotations

GAP = " ... "


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
