"""Finds the choice that an answer names, and the choices that are part of a question's text."""

import re
from collections.abc import Sequence

from hark.data.choices import normalise
from hark.data.sources.rows import SourceError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LABEL = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s*(.*)", re.DOTALL)  # "(A) x", "A. x", "A) x", "A: x"
# Options in a text: "(A) x" anywhere, or "A. x" or "A) x" at the beginning of a line.
OPTIONS = (re.compile(r"(?<!\S)\(([A-Z])\)\s*"), re.compile(r"(?m)^[ \t]*([A-Z])[.)][ \t]*"))
HEADING = re.compile(
    r"\s*(?:(?:please )?choose (?:the )?\w+ (?:option|answer|choice)\b[^.?!\n]*[:.]|choices:|options:)\s*$",
    re.IGNORECASE,
)


def find_answer(answer: str, choices: Sequence[str]) -> int:
    """The index of the choice that an answer names: by its text, else by its letter ("B", "(B)", "B. text").

    Texts are compared exactly first, then normalised. A text that follows the letter must be that of its choice.
    SourceError where the answer names no choice, or several different ones.
    """
    for same in (str.strip, normalise):
        matches = [index for index, choice in enumerate(choices) if same(choice) == same(answer)]
        if matches and len({choices[index] for index in matches}) == 1:
            return matches[0]
    letter, rest = split_label(answer)
    index = LETTERS.find(letter) if letter else len(choices)
    if index < len(choices) and (not normalise(rest) or normalise(rest) == normalise(choices[index])):
        return index
    raise SourceError("answer not among the choices", f"the answer {answer!r} is none of the choices {list(choices)}")


def benchmark_answer(answer: str, choices: Sequence[str]) -> int | str | None:
    """The index of a benchmark's answer; its text if it is none of the choices; None if it is empty.

    A benchmark's question is never left out because of its answer, since the official script counts it as well.
    """
    if not answer.strip():
        return None
    try:
        return find_answer(answer, choices)
    except SourceError:
        return answer


def split_label(answer: str) -> tuple[str, str]:
    """("B", "text") of "B. text"; ("B", "") of a letter alone; ("", text) of a text without a letter."""
    answer = answer.strip()
    if len(answer) == 1 and answer in LETTERS:
        return answer, ""
    found = LABEL.fullmatch(answer)
    return (found[1] or found[2], found[3].strip()) if found else ("", answer)


def unlabelled(choices: Sequence[str]) -> list[str]:
    """The choices without "A. ", "B. ", ... if all have their letter, in order, and a text; else unchanged."""
    split = [split_label(choice) for choice in choices]
    labels = "".join(letter or "-" for letter, _ in split)
    return [rest for _, rest in split] if LETTERS.startswith(labels) and all(rest for _, rest in split) else [*choices]


def split_options(text: str) -> tuple[str, list[str]]:
    """The question and the choices of a text that ends with options; SourceError where there are none.

    The last option is its first line only, since instructions to the model may follow.
    """
    for pattern in OPTIONS:
        found = list(pattern.finditer(text))
        starts = [index for index, option in enumerate(found) if option[1] == "A"]
        run = found[starts[-1] :] if starts else []
        if len(run) < 2 or not LETTERS.startswith("".join(option[1] for option in run)):
            continue
        ends = [option.start() for option in run[1:]] + [len(text)]
        choices = [text[option.end() : end].strip() for option, end in zip(run, ends, strict=True)]
        choices[-1] = choices[-1].split("\n")[0].strip()
        return HEADING.sub("", text[: run[0].start()]).strip(), choices
    raise SourceError("no options in the question", f"{text!r} ends in no options; expected (A) ... or A. ...")
