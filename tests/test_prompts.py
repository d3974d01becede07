"""data/prompts.py: R1-AQA's three prompts word for word, and what SFT trains on."""

import pytest

from hark.data.choices import extract_answer
from hark.data.examples import Example
from hark.data.prompts import TEMPLATES, Template, render, target

EXAMPLE = Example("1", (), "What {is} it?", ("a car", "the dog's bark"), 1)
ASK = "What {is} it? Please choose the answer from the following options: ['a car', \"the dog's bark\"]."


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain", ASK),
        ("answer", ASK + " Output the final answer in <answer> </answer>."),
        (
            "think",
            ASK + " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
        ),
    ],
)
def test_prompts_are_those_of_r1_aqa_and_braces_in_a_question_stay(template, text):
    assert render(EXAMPLE, template) == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain", "the dog's bark"),
        ("answer", "<answer>the dog's bark</answer>"),
        ("think", "<answer>the dog's bark</answer>"),
        ("open", "the dog's bark"),
    ],
)
def test_the_sft_target_is_the_right_choice_in_the_templates_tags(template, text):
    assert target(EXAMPLE, template) == text
    assert extract_answer(text) == EXAMPLE.answer_text


def test_an_open_question_does_not_say_its_choices():
    assert render(EXAMPLE, "open") == "What {is} it?"


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(ValueError, match="unknown template 'thnik'; did you mean 'think'"):
        render(EXAMPLE, "thnik")


def test_a_users_template_is_found_by_its_name(monkeypatch):
    monkeypatch.setitem(TEMPLATES, "short", Template("{question} {choices}", "It is {answer}"))
    assert target(EXAMPLE, "short") == "It is the dog's bark"


@pytest.mark.parametrize(("prompt", "answer"), [("{choices}", "{answer}"), ("{question} {audio}", "{answer}"),
                                                ("{question}", "yes")])  # fmt: skip
def test_a_template_with_missing_or_unknown_fields_is_refused_when_made(prompt, answer):
    with pytest.raises(ValueError, match="expected .* in braces"):
        Template(prompt, answer)
