"""The format reward of the recipe `open_rs`: a thought that is closed once."""

from hark.data.rewards.group import Group


def closed_thought(group: Group) -> list[float]:
    """1 if the closing tag of the thought stands alone on a line exactly once; the chat template has opened it."""
    return [float(text.count("\n</think>\n") == 1) for text in group.texts]
