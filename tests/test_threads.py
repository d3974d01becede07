"""Helper threads compute with one thread of OpenMP; decoding takes as many as pay, and none that changes a bit."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from hark.data.parallel import in_threads
from hark.grpo import branches as branches_module
from hark.grpo.runtime import threads as threads_module
from hark.grpo.runtime.threads import FIRST, IN_A_ROW, LONGEST, PayingThreads
from hark.grpo.sampler import sample
from hark.models.loading import load_policy
from hark.threads import helper_threads
from tests.conftest import Case

ROOT = Path(__file__).parents[1]
# Pools whose threads start processes, wait for them or compute digests, and never a tensor.
WITHOUT_TENSORS = {
    "data/rewards/judging.py", "data/worker.py", "launch/common/run_directory.py", "grpo/runtime/checkpoint.py",
    "grpo/runtime/export.py",
}  # fmt: skip


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_after_a_product(_: object) -> int:
    torch.ones(8, 8) @ torch.ones(8, 8)
    return torch.get_num_threads()


def test_helpers_compute_on_one_thread_and_the_main_thread_on_all(two_threads):
    with helper_threads(2, "helper") as helpers:
        assert list(helpers.map(threads_after_a_product, range(4))) == [1] * 4
    assert list(in_threads(threads_after_a_product, range(3), workers=2)) == [1] * 3
    assert threads_after_a_product(None) == 2


def test_all_threads_that_may_compute_are_such_helpers():
    made = {
        str(path.relative_to(ROOT))
        for part in ("data", "grpo", "models", "launch/common", "launch/page")
        for path in (ROOT / part).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ThreadPoolExecutor"
    }
    assert made == WITHOUT_TENSORS


class Machine:
    """A clock, and a step that takes a time which depends on the number of threads and writes bits that may do so."""

    def __init__(self, monkeypatch, seconds: dict[int, float], odd: frozenset[int] = frozenset()):
        self.seconds, self.odd, self.now, self.threads, self.done = seconds, odd, 0.0, 0, []
        self.result = torch.zeros(3)
        monkeypatch.setattr(threads_module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(self, "threads", count))

    def step(self) -> None:
        self.done.append(self.threads)
        self.now += self.seconds[self.threads]
        self.result.fill_(1 + 2**-20 * (self.threads in self.odd))

    def steps(self, paying: PayingThreads, count: int) -> list[int]:
        """On how many threads each of some steps was done; a trial counts as one step, by its last number."""
        found = []
        for _ in range(count):
            paying(self.step, self.result)
            found.append(self.done[-1])
        return found


def test_one_thread_of_several_is_taken_where_it_is_faster_and_all_are_set_again(monkeypatch):
    machine, paying = Machine(monkeypatch, {4: 3.0, 2: 2.0, 1: 2.5}), PayingThreads(4)
    paying(machine.step, machine.result)
    assert machine.done == [4, 4, 2, 2, 1, 1] and paying.best == 2
    assert machine.steps(paying, FIRST) == [2] * FIRST
    assert machine.threads == 4


def test_the_numbers_are_tried_again_when_a_step_has_become_slow(monkeypatch):
    machine, paying = Machine(monkeypatch, {2: 1.0, 1: 1.4}), PayingThreads(2)
    paying(machine.step, machine.result)
    assert paying.best == 2 and machine.steps(paying, 3) == [2] * 3
    machine.seconds = {2: 3.0, 1: 1.4}  # another program has come
    machine.steps(paying, IN_A_ROW + 1)
    assert paying.best == 1


def test_the_numbers_are_tried_again_less_and_less_often_and_an_idle_machine_is_noticed(monkeypatch):
    machine, paying = Machine(monkeypatch, {2: 3.0, 1: 1.4}), PayingThreads(2)
    machine.steps(paying, 2000)
    trials = machine.done.count(2) / 2
    assert 8 <= trials <= 13, "2000 steps / LONGEST, and some at the start"
    machine.seconds = {2: 1.0, 1: 1.4}
    assert 2 in machine.steps(paying, LONGEST + 2)
    assert paying.best == 2


def test_a_number_whose_result_has_other_bits_is_left_out_and_leaves_nothing_behind(monkeypatch):
    machine, paying = Machine(monkeypatch, {4: 3.0, 2: 1.0, 1: 2.0}, odd=frozenset({2, 1})), PayingThreads(4)
    paying(machine.step, machine.result)
    assert paying.counts == [4] and machine.done[-1] == 4 and torch.equal(machine.result, torch.ones(3))
    assert machine.steps(paying, 600) == [4] * 600


@pytest.mark.parametrize("dtype, adapts", [(torch.float32, True), (torch.bfloat16, False)])
def test_only_steps_in_float32_choose_their_threads(case: Case, monkeypatch, dtype, adapts):
    """In half precision a few bits depend on the number of threads, and a rollout would on how busy the machine was."""
    chosen = []
    monkeypatch.setattr(
        branches_module, "paying_threads", lambda most: lambda step, result: (step(), chosen.append(most))
    )
    policy = load_policy(case.directory, dtype=dtype, train="nothing")
    sample(policy, case.prompts, group_size=2, max_new_tokens=4, temperature=0)
    assert bool(chosen) == adapts


def test_a_rollout_has_the_same_bits_on_any_number_of_threads(case: Case, monkeypatch, two_threads):
    """And trials in the middle of it change nothing."""
    keys = [(0, 0, n) for n in range(len(case.prompts))]
    settings = dict(group_size=4, max_new_tokens=24, temperature=1.0, keys=keys, batch=2)
    rollouts = [sample(case.policy, case.prompts, **settings)]
    torch.set_num_threads(1)
    rollouts.append(sample(case.policy, case.prompts, **settings))
    torch.set_num_threads(2)
    paying = PayingThreads(2)
    monkeypatch.setattr(paying, "_seconds", lambda step, count: (torch.set_num_threads(count), step(), 1.0)[-1])
    monkeypatch.setattr(threads_module, "FIRST", 2)
    monkeypatch.setattr(branches_module, "paying_threads", lambda most: paying)
    rollouts.append(sample(case.policy, case.prompts, **settings))
    assert paying.counts == [2, 1]
    for other in rollouts[1:]:
        for name in ("tokens", "mask", "logprobs", "stopped"):
            assert torch.equal(getattr(other, name), getattr(rollouts[0], name)), name
