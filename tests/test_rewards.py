"""data/rewards: rewards are what they say, one column each, and a broken one is never swallowed."""

import time

import pytest
import torch

from hark.data.examples import Example
from hark.data.prompts import TEMPLATES, target
from hark.data.rewards import REWARDS, RewardError
from tests.judged import columns_of

EXAMPLE = Example("7", (), "Which?", ("Car", "Dog"), 0)


def well_formed(completion, template):
    return columns_of([EXAMPLE], [completion], ["format"], template).item()


def test_the_matrix_has_one_row_per_completion_and_one_column_per_name_in_order():
    other = Example("8", (), "Which?", ("Car", "Dog"), 1)
    completions = ["<answer>car</answer>", "car", "<answer>car</answer>", "dog"]
    rewards = columns_of([EXAMPLE, other], completions, ["format", "accuracy"], "answer")
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [[1, 1], [0, 1], [1, 0], [0, 1]]


def test_no_completions_give_an_empty_matrix_with_its_columns():
    assert columns_of([], [], ["format", "accuracy"], "answer").shape == (0, 2)


@pytest.mark.parametrize(
    "completion", ["<answer>Car</answer>", " <answer>\nCar\n</answer>\n", "<answer>a < b</answer>"]
)
def test_the_answer_format_is_one_answer_and_nothing_else(completion):
    assert well_formed(completion, "answer") == 1


@pytest.mark.parametrize(
    "completion",
    [
        "", "Car", "so <answer>Car</answer>", "<answer>Car</answer> so", "<answer>Car", "<answer></answer>",
        "<answer> </answer>", "<answer>a</answer><answer>b</answer>", "<answer>a<answer>b</answer></answer>",
        "<answer><answer>b</answer>", "<think>x</think>", "<Answer>Car</Answer>",
    ],
)  # fmt: skip
def test_anything_else_is_not_the_answer_format(completion):
    assert well_formed(completion, "answer") == 0
    assert well_formed("<think>x</think>" + completion, "think") == 0


def test_thinking_belongs_to_the_think_template_and_only_there():
    thought = "<think>It\nhums, a < b.</think>\n<answer>Car</answer>"
    assert well_formed(thought, "think") == 1
    assert well_formed(thought, "answer") == 0
    assert well_formed("<answer>Car</answer>", "think") == 0
    assert well_formed("<answer>Car</answer><think>x</think>", "think") == 0
    assert well_formed("<think> </think><answer>Car</answer>", "think") == 0


def test_the_plain_format_is_text_without_tags():
    assert well_formed("Car", "plain") == 1
    assert well_formed("<answer>Car</answer>", "plain") == well_formed(" ", "plain") == 0


@pytest.mark.parametrize("template", ["plain", "answer"])
def test_what_sft_trains_on_earns_every_reward(template):
    rewards = columns_of([EXAMPLE], [target(EXAMPLE, template)], ["accuracy", "format", "mmau"], template)
    assert (rewards == 1).all()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["format"], " " * 100_000),
        (["format"], "a" + " " * 100_000 + "<answer>"),
        (["consistency", "format"], "<think>" * 15_000),
        (["accuracy"], '"' * 1_000_000),
        (["accuracy"], ". " * 500_000),
    ],
    ids=["blanks", "blanks before a tag", "tags that are not closed", "quotes", "dots"],
)
def test_a_long_completion_takes_a_time_in_proportion_to_its_length(names, text):
    started = time.monotonic()
    for template in ("plain", "answer", "think"):
        columns_of([EXAMPLE], [text], names, template)
    assert time.monotonic() - started < 20, "less than 2 seconds; in proportion to the square it takes minutes"


def test_a_long_completion_does_not_make_the_format_slow():
    assert well_formed("<think>" + "<a " * 50_000, "think") == 0


def test_blanks_around_the_elements_and_the_text_do_not_matter():
    assert well_formed(" \n<answer> Car </answer>\u3000", "answer") == well_formed("\x1c Car \t", "plain") == 1


def test_a_users_reward_is_one_line(monkeypatch):
    monkeypatch.setitem(REWARDS, "brief", lambda group: [len(text) < 5 for text in group.texts])
    assert columns_of([EXAMPLE], ["Car", "A longer one"], ["brief"], "plain").tolist() == [[1], [0]]


@pytest.mark.parametrize("result", [[float("nan")], [float("inf")], None, ["high"], [], [1, 1]])
def test_a_reward_that_is_no_finite_number_names_itself_the_example_and_the_completion(monkeypatch, result):
    monkeypatch.setitem(REWARDS, "odd", lambda group: result)
    with pytest.raises(RewardError, match="reward 'odd' of example '7' for the completion 'Car'"):
        columns_of([EXAMPLE], ["Car"], ["accuracy", "odd"], "plain")


def test_a_reward_that_throws_is_an_error_with_its_cause(monkeypatch):
    monkeypatch.setitem(REWARDS, "odd", lambda group: 1 / 0)
    with pytest.raises(RewardError, match="reward 'odd' of example '7' .*ZeroDivisionError"):
        columns_of([EXAMPLE], ["Car"], ["odd"], "plain")


def test_unknown_names_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="unknown reward 'acuracy'; did you mean 'accuracy'"):
        columns_of([EXAMPLE], ["Car"], ["acuracy"], "plain")
    with pytest.raises(ValueError, match="unknown template"):
        columns_of([EXAMPLE], ["Car"], ["accuracy"], "plane")
    with pytest.raises(ValueError, match="3 texts, 3 ids and 3 stopped for 2 examples"):
        columns_of([EXAMPLE] * 2, ["Car", "Dog", "Car"], ["accuracy"], "plain")
    assert set(TEMPLATES) >= {"plain", "answer", "think", "open"}
