"""Evaluation is greedy, complete, and does not depend on how the questions are batched."""

from types import SimpleNamespace

import pytest

from hark.data.benchmarks.report import accuracies, blank_row, row_of
from hark.data.examples import BadExample
from hark.grpo.evaluate import evaluate
from hark.grpo.runtime.collectives import World
from hark.grpo.sampler import sample
from tests.ranks import on_ranks

LIMIT = 8


def answers(world: World, case, sizes) -> list[dict]:
    pairs = [(SimpleNamespace(id=f"q{n}", task="t", category=""), prompt) for n, prompt in enumerate(case.prompts)]
    batches, first = [], 0
    for size in sizes:
        batches.append(pairs[first : first + size])
        first += size

    def to_row(example, completion: str, stopped: bool) -> dict:
        return row_of(example, prediction=completion, correct=example.id == "q1", stopped=stopped)

    return evaluate(case.policy, batches, to_row, world, max_new_tokens=LIMIT, batch=2)


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1)])
def test_every_question_is_answered_greedily_whatever_the_batches(sizes, case):
    def run(world: World) -> None:
        rows = answers(world, case, sizes)
        rollout = sample(case.policy, case.prompts, group_size=1, max_new_tokens=LIMIT, temperature=0)
        assert [row["prediction"] for row in rows] == case.policy.completion_texts(rollout.tokens, rollout.mask)
        assert [row["stopped"] for row in rows] == rollout.stopped.tolist()
        assert [(row["id"], row["correct"]) for row in rows] == [("q0", False), ("q1", True), ("q2", False)]

    on_ranks(1, run)


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


def test_a_question_that_could_not_be_asked_is_wrong_unless_its_answer_is_hidden():
    asked = SimpleNamespace(id="q", task="sound", category="c", sub_category="s", difficulty="hard", answer=0)
    asked.truth = ""
    row = {"id": "q", "task": "sound", "category": "c", "sub_category": "s", "difficulty": "hard"}
    assert blank_row(asked) == row | {"prediction": "", "correct": False, "stopped": None}
    asked.answer = None
    assert blank_row(asked)["correct"] is None
    asked.truth = "none of the choices"
    assert blank_row(asked)["correct"] is False
    assert blank_row(BadExample("test.jsonl:3", "q", "no JSON"))["correct"] is False


def test_a_row_whose_answer_is_hidden_is_in_no_accuracy():
    rows = [{"task": "sound", "correct": None}, {"task": "music", "correct": True}]
    assert accuracies(rows, "task") == {"accuracy": 1.0, "accuracy/task/music": 1.0}
    assert accuracies(rows[:1], "task") == {}
