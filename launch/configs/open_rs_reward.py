"""The format reward of the recipe `open_rs`: a thought that is closed once."""

from hark.data.examples import Example
from hark.data.prompts import Template


def closed_thought(example: Example, completion: str, template: Template) -> float:
    """1 if the closing tag of the thought stands alone on a line exactly once; the chat template has opened it."""
    return float(completion.count("\n</think>\n") == 1)
