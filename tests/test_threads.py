"""Helper threads compute with one thread of OpenMP, and leave the main thread its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from hark.data.parallel import in_threads
from hark.threads import helper_threads

ROOT = Path(__file__).parents[1]
# Pools whose threads wait for processes or compute digests, and never a tensor.
WITHOUT_TENSORS = {"data/rewards/judging.py", "launch/common/run_directory.py", "grpo/runtime/checkpoint.py"}


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
