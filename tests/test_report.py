"""Reports: intervals that are right for few and extreme figures, and a table in which every row is counted."""

import math

import pytest

from hark.data.benchmarks.baselines import baseline_figures
from hark.data.benchmarks.report import (
    Share,
    accuracies,
    answer_shares,
    blank_row,
    figures,
    grouped,
    row_of,
    share,
    table,
)
from hark.data.examples import BadExample, Example


def row(correct, task="sound", category="", sub_category="", difficulty="", stopped=None, choice=None):
    return locals()


ROWS = [row(True), row(False, "sound", "A, B"), row(None, "music"), row(True, "speech", "A, B", "deep", "hard")]
EXAMPLES = [Example(str(n), (), "?", ("a", "bell", "rain"), answer) for n, answer in enumerate((0, 1, None, 1))]


def test_the_interval_solves_the_equation_it_comes_from():
    # Wilson: the ends are the p whose distance from the observed share is 1.96 of their own standard errors.
    for right, total in [(1, 7), (123, 480), (5, 6), (480, 1000)]:
        for end in Share(right, total).interval:
            assert abs(right / total - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / total), rel=1e-9)


def test_the_interval_is_within_0_and_1_and_not_empty_at_the_extremes():
    assert Share(0, 10).interval == (0.0, pytest.approx(0.27753, abs=1e-5))
    assert Share(10, 10).interval == (pytest.approx(0.72247, abs=1e-5), 1.0)
    assert Share(0, 0).interval is None and Share(0, 0).accuracy is None


def test_rows_without_a_known_answer_are_left_out_of_every_figure():
    assert share(ROWS) == (2, 3)
    assert grouped(ROWS, "task") == {"sound": (1, 2), "speech": (1, 1)}
    assert grouped(ROWS, "category") == {"A, B": (1, 2)}
    assert baseline_figures(EXAMPLES) == {
        "always_first_accuracy": pytest.approx(1 / 3),
        "longest_choice_accuracy": pytest.approx(2 / 3),  # the first of the two choices of four letters
        "chance": pytest.approx(1 / 3),
    }
    assert baseline_figures(EXAMPLES[2:3]) == {}


def test_the_figures_hold_each_share_with_its_interval():
    result = figures(ROWS, EXAMPLES, {"silent": Share(1, 3)})
    assert (result["accuracy"], result["right"], result["total"]) == (pytest.approx(2 / 3), 2, 3)
    assert result["silent_accuracy"] == pytest.approx(1 / 3)
    assert result["silent_accuracy_interval"] == Share(1, 3).interval
    assert (result["silent_right"], result["silent_total"]) == (1, 3)
    assert result["accuracy/task/sound"] == 0.5 and result["groups"]["difficulty"]["hard"]["total"] == 1


def test_the_table_is_aligned_and_shows_differences_of_controls_only():
    lines = table(ROWS, EXAMPLES, {"official": Share(2, 2), "strict": Share(1, 3), "silent": Share(1, 3)}).splitlines()
    assert [name.strip() for name in lines if name and not name[26:].strip()] == [
        "task", "category", "sub-category", "difficulty", "baselines",
    ]  # fmt: skip
    figure = {line[:24].strip(): line.split() for line in lines if "/" in line and "right" not in line}
    assert figure["all"][-5:] == ["2/3", "66.7", "20.8", "-", "93.9"]
    assert figure["by the strict rule"][-5:] == ["1/3", "33.3", "6.1", "-", "79.2"]
    assert figure["by the official script"][-5:] == ["2/2", "100.0", "34.2", "-", "100.0"]
    assert figure["sound removed"][-1] == "-33.3"
    ends = {
        line.index("/") - len(line.split("/")[0].split()[-1]) for line in lines if "/" in line and "right" not in line
    }
    assert len(ends) == 1, "counts of equal width end in one column"


def test_accuracies_worked_by_hand():
    rows = [
        {"task": "sound", "category": "speech", "correct": True},
        {"task": "sound", "category": "", "correct": False},
        {"task": "speech", "category": "speech", "correct": False},
        {"task": "speech", "category": "speech", "correct": False},
    ]
    assert accuracies(rows, "task", "category") == {
        "accuracy": 0.25,
        "accuracy/task/sound": 0.5,
        "accuracy/task/speech": 0.0,
        "accuracy/category/speech": pytest.approx(1 / 3),
    }


def test_a_row_whose_answer_is_hidden_is_in_no_accuracy():
    rows = [{"task": "sound", "correct": None}, {"task": "music", "correct": True}]
    assert accuracies(rows, "task") == {"accuracy": 1.0, "accuracy/task/music": 1.0}
    assert accuracies(rows[:1], "task") == {}


def question(**changes) -> Example:
    values = {"task": "sound", "category": "c", "sub_category": "s", "difficulty": "hard", "answer": 0, **changes}
    return Example("q", (), "?", ("a", "b"), **values)


def test_a_question_that_could_not_be_asked_is_wrong_unless_its_answer_is_hidden():
    row = {"id": "q", "task": "sound", "category": "c", "sub_category": "s", "difficulty": "hard"}
    assert blank_row(question()) == row | {"prediction": "", "correct": False, "stopped": None, "choice": None}
    assert blank_row(question(answer=None))["correct"] is None
    assert blank_row(question(answer=None, accepted=("none of the choices",)))["correct"] is False
    assert blank_row(BadExample("test.jsonl:3", "q", "no JSON"))["correct"] is False


def test_a_row_has_the_labels_of_its_question_and_a_bad_line_has_none():
    outcome = {"prediction": "a", "correct": True, "stopped": False, "choice": 0}
    labels = {"task": "sound", "category": "c", "sub_category": "s", "difficulty": "hard"}
    assert row_of(question(), **outcome) == {"id": "q"} | labels | outcome
    assert (
        row_of(BadExample("test.jsonl:3", "q", "no JSON"), **outcome)
        == {"id": "q"} | dict.fromkeys(labels, "") | outcome
    )


def test_the_shares_of_other_answers_are_of_the_questions_that_were_asked():
    rows = [row(True, stopped=True, choice=1), row(False, stopped=False), row(None, stopped=True), row(False)]
    rows.append(row(False, stopped=False, choice=0))
    assert answer_shares(rows) == {"no_choice_share": 0.5, "cut_off_share": 0.5}
    result = figures(rows, EXAMPLES, {})
    assert (result["no_choice_share"], result["cut_off_share"]) == (0.5, 0.5)
    lines = {" ".join(line.split()) for line in table(rows, EXAMPLES, {}).splitlines()}
    assert "none of the choices 2/4 50.0 15.0 - 85.0" in lines
    assert answer_shares(ROWS) == {} and "none of the choices" not in table(ROWS, EXAMPLES, {})
