"""Evaluation is greedy, complete, and does not depend on how the questions are batched."""

from types import SimpleNamespace

import pytest

from hark.data.benchmarks.report import row_of
from hark.grpo.evaluate import evaluate
from hark.grpo.runtime.collectives import World
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from tests.ranks import on_ranks

LIMIT = 8


def answers(world: World, case, sizes) -> list[dict]:
    pairs = [(SimpleNamespace(id=f"q{n}", task="t", category=""), prompt) for n, prompt in enumerate(case.prompts)]
    batches, first = [], 0
    for size in sizes:
        batches.append(pairs[first : first + size])
        first += size

    def to_row(example, completion: str, stopped: bool, confidence: float) -> dict:
        row = row_of(example, prediction=completion, correct=example.id == "q1", stopped=stopped)
        return row | {"confidence": confidence}

    return evaluate(case.policy, batches, to_row, world, max_new_tokens=LIMIT, batch=2)


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1)])
def test_every_question_is_answered_greedily_whatever_the_batches(sizes, case):
    def run(world: World) -> None:
        rows = answers(world, case, sizes)
        rollout = sample(case.policy, case.prompts, group_size=1, max_new_tokens=LIMIT, temperature=0)
        assert [row["prediction"] for row in rows] == case.policy.completion_texts(rollout.tokens, rollout.mask)
        assert [row["stopped"] for row in rows] == rollout.stopped.tolist()
        scored, _ = score(case.policy, rollout.prompts, rollout.tokens, rollout.mask, group_size=1)
        probabilities = (scored * rollout.mask).sum(dim=1).exp().tolist()
        assert [row["confidence"] for row in rows] == pytest.approx(probabilities, rel=1e-4)
        assert [(row["id"], row["correct"]) for row in rows] == [("q0", False), ("q1", True), ("q2", False)]

    on_ranks(1, run)
