"""Compares a completion with the choices or the accepted answers, for the accuracy reward and for evaluation."""

from collections.abc import Sequence

QUOTES = ('""', "''", "``", "“”", "‘’", "«»")


def extract_answer(completion: str) -> str | None:
    """The text inside the only `<answer>...</answer>`; the whole completion if it has no such tag.

    None where a tag is repeated, unclosed or out of order: the answer is ambiguous then, and a policy that puts every
    choice into a tag must not be rewarded.
    """
    opened, closed = completion.count("<answer>"), completion.count("</answer>")
    if opened == closed == 0:
        return completion.strip()
    before, _, rest = completion.partition("<answer>")
    inside, _, _ = rest.partition("</answer>")
    return inside.strip() if opened == closed == 1 and "</answer>" not in before else None


def normalise(text: str) -> str:
    """The text in lower case, without surrounding quotes and trailing dots, and with single spaces."""
    text = " ".join(text.casefold().split())
    start, end = 0, len(text)  # of what is left: a text of many quotes or dots is not copied for each of them
    while True:
        while start < end and text[end - 1] in ". ":
            end -= 1
        while start < end and text[start] == " ":
            start += 1
        if end - start < 2 or text[start] + text[end - 1] not in QUOTES:
            return text[start:end]
        start, end = start + 1, end - 1


def choice_of(completion: str, choices: Sequence[str]) -> int | None:
    """The index of the only choice that the completion's answer equals, all normalised; substrings do not count."""
    extracted = extract_answer(completion)
    given = "" if extracted is None else normalise(extracted)
    matches = [index for index, choice in enumerate(choices) if given and normalise(choice) == given]
    return matches[0] if len(matches) == 1 else None


def is_correct(completion: str, choices: Sequence[str], answer: int | None) -> bool:
    """Whether the completion's answer equals the right choice and no other."""
    return answer is not None and choice_of(completion, choices) == answer


def is_accepted(completion: str, accepted: Sequence[str]) -> bool:
    """Whether the completion's answer to an open question equals one of the accepted texts, all normalised."""
    extracted = extract_answer(completion)
    given = "" if extracted is None else normalise(extracted)
    return given != "" and given in map(normalise, accepted)
