"""The reward of the style and the template of the recipe `emotion`; the words have the reward `wer`."""

import re

from hark.data.prompts import Template
from hark.data.rewards.group import Group

FORM = " Output the style in <style> </style> and the words in <answer> </answer>."

styled = Template("{question}" + FORM, "{answer}", ("style", "answer"))


def style(group: Group) -> list[float]:
    """1 if the style in the completion's tag is the "style" of the row, whatever the case; else 0."""
    right = str(group.example.extra["style"]).lower()
    return [float(_style(text).lower() == right) for text in group.texts]


def _style(text: str) -> str:
    found = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    return found[1].strip() if found else ""
