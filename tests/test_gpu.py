"""The checks for a GPU, on the CPU as far as that goes: they run, and find nothing wrong where nothing is."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from tests import conftest  # noqa: F401  (hides GPUs)
from tests.gpu import Report, check, check_ranks
from tests.ranks import as_torchrun, on_ranks

pytestmark = pytest.mark.slow


def test_all_checks_pass_on_the_cpu(monkeypatch, capsys):
    # The uncompiled reference of FlexAttention, as in test_attention.py.
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # generates no code
    precision = torch.get_float32_matmul_precision()
    failed = []
    on_ranks(1, lambda world: failed.extend(check(world, hidden=64, layers=2, limits=(6, 9), waits=0).failed))
    torch.set_float32_matmul_precision(precision)
    assert failed == []
    said = capsys.readouterr().out
    flex_checked = "flex against sdpa, windows, torch.bfloat16, recomputed: gradients", "in a window, apart"
    for checked in (*flex_checked, "logprobs of compiled layers"):
        assert checked in said


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_a_figure_beyond_its_bound_fails(value):
    report = Report()
    report.at_most(1, "a figure", value)
    report.exactly(1, "a count", value)
    assert report.failed == ["a figure", "a count"]


def test_two_ranks_pass_their_checks(tmp_path):
    as_torchrun(2, check_ranks, str(tmp_path))


def test_without_a_gpu_it_says_so_in_one_line_and_fails():
    result = subprocess.run([sys.executable, "-m", "tests.gpu"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == "tests/gpu.py: no CUDA device here, so nothing was checked"
