"""Rewards in processes, and rewards that fail in a training step of two ranks."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import time
import traceback
from pathlib import Path

import pytest
import torch

from hark import UserError
from hark.data.examples import Example
from hark.data.rewards import REWARDS, Failure, Judged, RewardError, judging
from hark.data.rewards.judging import Judge
from hark.data.rewards.table import is_foreign
from hark.grpo.config import RewardConfig
from hark.grpo.rewards import WINDOW, StepRewards
from hark.grpo.runtime.collectives import World, exchange_rows
from hark.grpo.shared_data import OtherRankError, on_all
from hark.grpo.types import Rollout
from hark.launch.common.config_file import load_config
from hark.launch.common.entry import sentence
from hark.launch.common.questions import rewards_of
from tests.clips import HOSTILE
from tests.ranks import on_ranks
from tests.runs import build

EXAMPLES = [Example(str(n), (), "Which?", ("dog", "car"), n % 2) for n in range(4)]
OWN = """
import fcntl, os, subprocess

kept = []

def swells(group):
    kept.append(bytearray(1 << (27 if group.texts[0] == "little" else 30)))
    return [os.getpid()] * len(group.texts)

def process(group):
    if group.texts[0] == "die":
        os._exit(3)
    return [os.getpid()] * len(group.texts)

def odd(group):
    return {"nothing": None, "text": "high", "texts": ["high", 1.0], "few": [1.0], "many": [1.0] * 3, "one": 1.0,
            "nan": [float("nan"), 2.0], "none": [None, 2.0], "true": [True, False]}[group.texts[0]]

def raises(group):
    raise KeyError("caption")

def starts(group):
    lock = open(group.texts[0], "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()]).wait()
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def test_two_workers_give_the_columns_of_one_and_a_dead_one_is_replaced(own):
    names, ids, stopped = [f"{own}:process", "accuracy", "length_median"], [[1], [1, 2]] * 4, [True] * 8
    with Judge(names, "plain", on_error="none", workers=2) as judge:
        found = [judge(EXAMPLES, [first, "car"] * 4, ids, stopped, 0) for first in ("dog", "die", "dog")]
    with Judge(names[1:], "plain") as judge:
        expected = judge(EXAMPLES, ["dog", "car"] * 4, ids, stopped, 0).columns
    before, between, after = ({int(p) for p in judged.columns[:, 0] if not p.isnan()} for judged in found)
    assert len(before) in (1, 2) and between == set()  # as fast as calls are, one process may do all of them
    assert after and not after & before
    assert torch.equal(found[0].columns[:, 1:], expected) and torch.equal(found[2].columns[:, 1:], expected)
    assert [len(judged.failures) for judged in found] == [0, 4, 0] == [judged.failed for judged in found]
    assert all("died with status 3" in failure.reason for failure in found[1].failures)


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("nothing", [None, None], "returned None; expected 2 numbers or None"),
        ("text", [None, None], "returned 'high'; expected 2 numbers"),
        ("texts", [None, None], "returned \\['high', 1.0\\]; expected 2 numbers"),
        ("few", [None, None], "returned 1 values; expected 2 numbers"),
        ("many", [None, None], "returned 3 values; expected 2 numbers"),
        ("one", [None, None], "returned 1.0; expected 2 numbers"),
        ("nan", [None, 2], "for the completion 'nan' is nan; expected a finite number or None"),
        ("none", [None, 2], None),
        ("true", [1, 0], None),
        ("unknown", [None, None], "failed: KeyError: 'unknown'"),
    ],
)
def test_what_is_no_number_is_none_and_one_failure(kind, values, said, monkeypatch, own, capsys):
    space: dict = {}
    exec(OWN, space)
    monkeypatch.setitem(REWARDS, "odd", space["odd"])
    example, rest = EXAMPLES[:1], (["x"] * 2, [True] * 2, 0)
    with Judge(["odd"], "plain", on_error="none") as judge:
        judged = judge(example, [kind, "b"], *rest)
    assert [None if math.isnan(value) else value for value in judged.columns[:, 0].tolist()] == values
    assert len(judged.failures) == (said is not None)
    with Judge(["odd"], "plain") as judge:
        if said is None:
            judge(example, [kind, "b"], *rest)
        else:
            with pytest.raises(RewardError, match=said):
                judge(example, [kind, "b"], *rest)


def test_the_warning_of_a_failing_reward_cannot_steer_the_terminal_and_is_cut(monkeypatch, capsys):
    def raises(completions: list[str], **_) -> list[float]:
        raise ValueError(completions[0])

    monkeypatch.setitem(REWARDS, "odd", raises)
    examples = [dataclasses.replace(EXAMPLES[0], id=f"{n}{HOSTILE}") for n in range(4)]
    with Judge(["odd"], "plain", on_error="none") as judge:
        judge(examples, [HOSTILE] * 4, [[1]] * 4, [True] * 4, 0)
    lines = capsys.readouterr().err.split("\n")[:-1]
    assert len(lines) == 4 and lines[3] == "... and 1 more"
    assert all(line.isprintable() and len(line) < 1000 for line in lines)


def test_a_process_says_what_its_reward_returned_or_raised(own):
    names = [f"{own}:odd", f"{own}:raises"]
    with Judge(names, "plain", on_error="none") as judge:
        judged = judge(EXAMPLES[:1], ["texts", "b"], [[1], [1]], [True, True], 0)
    assert judged.columns.isnan().all()
    first, second = (failure.reason for failure in judged.failures)
    assert "returned ['high', 1.0]; expected 2 numbers" in first and "failed: KeyError: 'caption'" in second


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded on Linux only")
def test_a_reward_that_needs_more_memory_than_the_bound_is_one_failure(own, monkeypatch):
    """The process that it ran in is replaced, with what it kept."""
    monkeypatch.setattr(judging, "MEMORY", 1 << 28)
    with Judge([f"{own}:swells"], "plain", on_error="none") as judge:
        first, large, after = (
            judge(EXAMPLES[:1], [text, "b"], [[1], [1]], [True, True], 0) for text in ("little", "much", "little")
        )
    assert not first.failures and not after.failures and first.columns[0] != after.columns[0]
    assert large.columns.isnan().all() and large.failed == 1
    assert large.failures[0].reason.endswith("failed: its process needed more than 0.25 GiB")


def test_what_a_hanging_reward_started_ends_with_it(own, tmp_path):
    with Judge([f"{own}:starts"], "plain", on_error="none", timeout=0.5) as judge:
        judged = judge(EXAMPLES[:1], [f"{tmp_path}/lock"], [[1]], [True], 0)
    assert "not finished after 0.5 s" in judged.failures[0].reason
    with open(tmp_path / "lock") as lock:  # the process that was started holds it as long as it lives
        deadline = time.monotonic() + 10
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "options", "apart"),
    [
        ("cosine", {}, False),
        ("cosine", {"by": "accuracy"}, False),
        ("cosine", {"by": "math"}, True),
        ("math", {}, True),
        ("mine.py:brief", {}, True),
    ],
)
def test_what_may_not_end_runs_in_a_process_of_its_own(name, options, apart):
    assert is_foreign(name, options) is apart


def fails_once(calls: list[str]):
    def reward(group):
        calls.append(group.example.id)
        if len(calls) == 2:
            raise ValueError("no caption")
        return [len(text) % 7 / 7 for text in group.texts]

    return reward


def step_with_a_failing_reward(world: World, settings: list[str]) -> None:
    """Rank 1's second group has no reward: the run ends on both ranks, or goes on with the same metrics on both."""
    for on_error, limit in (("stop", 0.1), ("none", 0.1), ("none", 0.0)):
        more = ["reward.weights={odd: 1.0, format: 0.5}", f"reward.on_error={on_error}", f"reward.max_failed={limit}"]
        config = load_config([*settings, *more])
        calls: list[str] = []
        REWARDS["odd"] = fails_once(calls if world.rank == 1 else ["never"] * 9)
        try:
            with rewards_of(config) as rewards:
                learner = build(world, config, rewards=rewards)
                if on_error == "stop":
                    with pytest.raises(UserError, match="reward 'odd' of example .* failed: ValueError: no caption"):
                        learner.step(0)
                    continue
                if not limit:
                    with pytest.raises(UserError, match="more than reward.max_failed=0 .*ValueError: no caption"):
                        learner.step(0)
                    continue
                metrics = learner.step(0)
        finally:
            del REWARDS["odd"]
        assert metrics["reward_failures"] == 1
        seen = [metrics[name] for name in ("reward", "reward/odd", "grad_norm", "loss")]
        assert all(map(math.isfinite, seen))
        first, second = exchange_rows([seen], world)
        assert first == second
        again = build(world, config, rewards=rewards)
        again.restore(json.loads(json.dumps(learner.state())))
        assert again.rewards.failing == [[0, 1 / config.optim.prompts_per_step]]


def test_a_reward_that_fails_on_one_rank_stops_both_or_leaves_both_training(settings, tmp_path):
    on_ranks(2, step_with_a_failing_reward, [*settings, f"run.directory={tmp_path}/run", "loss.beta=0"])


def fails_differently(world: World) -> None:
    """A bug on rank 1, then an error of the user on rank 0."""

    def bug() -> int:
        return {}["caption"] if world.rank else 0

    with pytest.raises(KeyError if world.rank else OtherRankError) as caught:
        on_all(bug, world)
    shown = "".join(traceback.format_exception(caught.value))
    assert 'return {}["caption"]' in shown and "KeyError: 'caption'" in shown
    assert world.rank or str(caught.value) == "rank 1: KeyError: 'caption'"
    assert sentence(caught.value) is None, "no rank reports at once: the one that failed may be the first to report"

    def wrong() -> int:
        if not world.rank:
            raise UserError("a.jsonl:3: no such clip")
        return 0

    with pytest.raises(UserError, match=r"^(rank 0: )?a.jsonl:3: no such clip$") as caught:
        on_all(wrong, world)
    assert caught.value.__cause__ is None


def test_the_traceback_of_a_bug_on_one_rank_is_that_of_all_and_a_users_error_has_none():
    on_ranks(2, fails_differently)


def fail_in_steps(world: World, fails_in: range, limit: float) -> int | None:
    """The step that stops the run if, in some steps, rank 1 has no reward for one of its two questions."""

    def judge(examples, texts, ids, stopped, step):
        if world.rank != 1 or step not in fails_in:
            return Judged(torch.ones(2, 1))
        return Judged(torch.ones(2, 1), (Failure("judge", f"no reply in step {step}"),), failed=1)

    ones = torch.ones(2, 1, dtype=torch.long)
    rollout = Rollout((), 1, ones, ones, torch.zeros(2, 1), torch.ones(2))
    rewards = StepRewards(judge, RewardConfig(on_error="none", max_failed=limit), world)
    for step in range(2 * WINDOW):
        rewards.columns(rewards.start(EXAMPLES[:2], rollout, ["a", "b"], step))
        try:
            rewards.check_failures(step)
        except UserError as error:
            assert str(error).endswith(f"the last: no reply in step {step}")
            return step
    return None


def count_failures(world: World) -> None:
    assert fail_in_steps(world, range(50, 150), 0.02) == 58, "the ninth quarter of a step is more than two steps"
    assert fail_in_steps(world, range(2 * WINDOW), 0.25) is None, "a quarter of the questions is allowed"
    assert fail_in_steps(world, range(0, 2 * WINDOW, 10), 0.025) is None, "old failures are forgotten"


def test_rewards_that_fail_for_too_many_questions_of_late_stop_all_ranks_with_the_reason():
    on_ranks(2, count_failures)
