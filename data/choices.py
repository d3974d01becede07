"""The one matcher of a completion with the choices, shared by reward and evaluation."""

from collections.abc import Sequence

QUOTES = ('""', "''", "``", "“”", "‘’", "«»")


def extract_answer(completion: str) -> str | None:
    """The text inside the only `<answer>...</answer>`; without any tag, the whole completion.

    None where the tags are doubled, unclosed or out of order: which answer is meant cannot be known, and a policy that
    tags every choice must not be paid for it.
    """
    opened, closed = completion.count("<answer>"), completion.count("</answer>")
    if opened == closed == 0:
        return completion.strip()
    before, _, rest = completion.partition("<answer>")
    inside, _, _ = rest.partition("</answer>")
    return inside.strip() if opened == closed == 1 and "</answer>" not in before else None


def normalise(text: str) -> str:
    """Case, runs of whitespace, surrounding quotes and trailing dots do not distinguish two answers."""
    text = " ".join(text.casefold().split())
    while True:
        bare = text.rstrip(".").strip()
        if len(bare) >= 2 and bare[0] + bare[-1] in QUOTES:
            bare = bare[1:-1].strip()
        if bare == text:
            return text
        text = bare


def is_correct(completion: str, choices: Sequence[str], answer: int) -> bool:
    """Whether the completion's answer equals the right choice and no other, both normalised; never by containment."""
    extracted = extract_answer(completion)
    if extracted is None:
        return False
    given = normalise(extracted)
    matches = [index for index, choice in enumerate(choices) if normalise(choice) == given]
    return given != "" and matches == [answer]
