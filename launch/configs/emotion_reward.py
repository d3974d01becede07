"""The reward and the template of the recipe `emotion`: what is said, and in which style."""

import re
from pathlib import Path

from hark.data.examples import Example
from hark.data.prompts import Template
from hark.data.rewards.group import Group
from hark.from_file import from_file

WER = f"{Path(__file__).with_name('tts_reward.py')}:word_error_rate"
FORM = " Output the style in <style> </style> and the words in <answer> </answer>."

styled = Template("{question}" + FORM, "{answer}", ("style", "answer"))


def style_and_words(group: Group) -> list[float]:
    """Half of: the style is that of the row's "style"; and max(0, 1 - WER) of the words, its answer."""
    return [_judged(group.example, text, group.template) for text in group.texts]


def _judged(example: Example, completion: str, template: Template) -> float:
    style, words = (_inside(completion, tag) for tag in template.tags)
    right = style.lower() == str(example.extra["style"]).lower()
    return 0.5 * right + 0.5 * max(0.0, 1.0 - from_file(WER)(example.answer_text, words))


def _inside(completion: str, tag: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", completion, re.DOTALL)
    return found[1].strip() if found else ""
