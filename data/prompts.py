"""Named prompt templates: the text of a prompt, the target of SFT, and the tags that a completion must have.

A name `path/to/file.py:short` is the Template `short` of your own file.
"""

import string
from collections.abc import Iterable
from dataclasses import dataclass

from hark.data.chat import Chat, Turn
from hark.data.errors import DataError, named
from hark.data.examples import Example
from hark.from_file import from_file, is_in_file

ASK = "{question} Please choose the answer from the following options: {choices}."
ANSWER = " Output the final answer in <answer> </answer>."
THINK = " Output the thinking process in <think> </think> and final answer in <answer> </answer>."

THINK_50 = (
    " Output the thinking process (less than 50 words) in <think> </think> and final answer in <answer> </answer>."
)


@dataclass(frozen=True)
class Template:
    """The formats of str.format: `prompt` with {question} and {choices} (a Python list), `target` with {answer}.

    `tags` are the elements that a well-formed completion consists of, in order; the format reward reads them. `open` is
    the prompt of a question without choices, with {question}; without it, that is `prompt`, which must not name the
    choices then. A literal brace is written twice.
    """

    prompt: str
    target: str = "{answer}"
    tags: tuple[str, ...] = ()
    open: str | None = None

    def __post_init__(self) -> None:
        _check_fields("prompt", self.prompt, allowed={"question", "choices"}, needed={"question"})
        _check_fields("target", self.target, allowed={"answer"}, needed={"answer"})
        if self.open is not None:
            _check_fields("open", self.open, allowed={"question"}, needed={"question"})

    def ask(self, example: Example) -> str:
        """The text of a question; DataError for an open one if the template has no prompt for it."""
        prompt = self.prompt if example.choices else self.open or self.prompt
        if not example.choices and "choices" in _fields(prompt):
            raise DataError(
                f"{example.line or example.id}: the question has no choices, and the prompt {prompt!r} names them; "
                "give the template a prompt for such questions: Template(..., open='{question}')"
            )
        return prompt.format(question=example.question, choices=list(example.choices))


def _fields(text: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}


def _check_fields(name: str, text: str, *, allowed: set[str], needed: set[str]) -> None:
    fields = _fields(text)
    if not needed <= fields <= allowed:
        raise ValueError(f"template {name} {text!r} names {sorted(fields)}; expected {sorted(allowed)} in braces")


# The first three are the prompts of R1-AQA (Li et al. 2025, arXiv:2503.11197), unchanged, and for open questions their
# part without the choices.
TEMPLATES: dict[str, Template] = {
    "plain": Template(ASK, open="{question}"),
    "answer": Template(ASK + ANSWER, "<answer>{answer}</answer>", ("answer",), "{question}" + ANSWER),
    "think": Template(ASK + THINK, "<answer>{answer}</answer>", ("think", "answer"), "{question}" + THINK),
    # The prompt of Ke-Omni-R (github.com/shuaijiang/Ke-Omni-R, src/dataset/dataset.py).
    "think_50": Template(f"{ASK}{THINK_50}", "<answer>{answer}</answer>", ("think", "answer"), "{question}" + THINK_50),
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


def render(example: Example, template: str) -> Chat:
    """The prompt for `prepare`: a text, or the turns where there is a system prompt or an earlier turn."""
    question = find_template(template).ask(example)
    if not example.system and not example.messages:
        return question
    system = [Turn("system", example.system)] if example.system else []
    return (*system, *example.messages, Turn("user", question))


def text_of(chat: Chat) -> str:
    """All texts of a prompt, one turn per line."""
    return chat if isinstance(chat, str) else "\n".join(turn.text for turn in chat)


def target(example: Example, template: str) -> str:
    """The completion that SFT trains on: the example's own target, or else its right answer."""
    return example.target or right_answer(example, template)


def right_answer(example: Example, template: str) -> str:
    """The shortest right completion in the form of the template; of several accepted answers, the first."""
    return find_template(template).target.format(answer=example.answer_text)


def texts_of(examples: Iterable[Example], template: str) -> list[str]:
    """The prompt and the target, if there is one, of each example: what a tokenizer of these examples is trained on."""
    chosen: list[str] = []
    for example in examples:
        chosen.append(text_of(render(example, template)))
        chosen += [target(example, template)] if example.target or example.has_answer else []
    return chosen
