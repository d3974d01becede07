"""Named prompt templates: the text of a prompt, the target of SFT, and the tags that a completion must have.

A name `path/to/file.py:short` is the Template `short` of your own file.
"""

import string
from collections.abc import Iterable
from dataclasses import dataclass

from hark.data.errors import DataError, named
from hark.data.examples import Example
from hark.from_file import from_file, is_in_file

ASK = "{question} Please choose the answer from the following options: {choices}."


@dataclass(frozen=True)
class Template:
    """The formats of str.format: `prompt` with {question} and {choices} (a Python list), `target` with {answer}.

    `tags` are the elements that a well-formed completion consists of, in order; the format reward reads them. A literal
    brace is written twice.
    """

    prompt: str
    target: str = "{answer}"
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_fields("prompt", self.prompt, allowed={"question", "choices"}, needed={"question"})
        _check_fields("target", self.target, allowed={"answer"}, needed={"answer"})


def _check_fields(name: str, text: str, *, allowed: set[str], needed: set[str]) -> None:
    fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    if not needed <= fields <= allowed:
        raise ValueError(f"template {name} {text!r} names {sorted(fields)}; expected {sorted(allowed)} in braces")


# The first three are the prompts of R1-AQA (Li et al. 2025, arXiv:2503.11197), unchanged.
TEMPLATES: dict[str, Template] = {
    "plain": Template(ASK),
    "answer": Template(
        ASK + " Output the final answer in <answer> </answer>.", "<answer>{answer}</answer>", ("answer",)
    ),
    "think": Template(
        ASK + " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
        "<answer>{answer}</answer>",
        ("think", "answer"),
    ),
    "open": Template("{question}"),  # the choices are not said
}


def find_template(name: str) -> Template:
    """The template of that name, or of `path/to/file.py:name`; an unknown name is an error that says the nearest."""
    if not is_in_file(name):
        return named(TEMPLATES, name, kind="template")
    template = from_file(name)
    if not isinstance(template, Template):
        raise DataError(f"template {name!r} is a {type(template).__name__}; expected a hark.data.prompts.Template")
    return template


def render(example: Example, template: str) -> str:
    """The text of the user's turn. The audio is added by `prepare`."""
    return find_template(template).prompt.format(question=example.question, choices=list(example.choices))


def target(example: Example, template: str) -> str:
    """The completion that SFT trains on."""
    return find_template(template).target.format(answer=example.answer_text)


def texts_of(examples: Iterable[Example], template: str) -> list[str]:
    """The prompt and the target of each example: what a tokenizer of these examples is trained on."""
    return [text for example in examples for text in (render(example, template), target(example, template))]
