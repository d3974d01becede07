"""model.compile: a step with compiled layers has the gradients, and draws the completions, of one without."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from hark.grpo.runtime.collectives import World
from tests.ranks import on_ranks
from tests.runs import ROUNDING, gradients, largest_difference, largest_gap, read_metrics, train

CASES = {  # by the number of ranks
    1: ["lora.rank=4", "lora.targets=[q_proj, o_proj, gate_proj]", "rollout.keep_prefill=true"],
    2: ["model.recompute=true", "loss.beta=0"],
}


def compare(world: World, words: list[str]) -> None:
    """Compare the graphs that torch traces, run operator by operator, because generating code takes minutes."""
    counters.clear()
    plain, compiling = gradients(world, words), torch.compile
    assert not counters["stats"]
    torch.compile = partial(compiling, backend="eager")
    try:
        assert largest_gap(plain, gradients(world, [*words, "model.compile=true"])) < ROUNDING
    finally:
        torch.compile = compiling
    # Without and with gradients: parts before and after attention, of prompts, of single tokens and of rows.
    assert 6 <= counters["stats"]["unique_graphs"] <= 40, "not one for each layer or length"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", CASES)
def test_the_gradients_are_the_same(ranks, settings, tmp_path):
    on_ranks(ranks, compare, [*settings, *CASES[ranks], f"run.directory={tmp_path}/run"])


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_a_run_with_generated_code_ends_with_the_same_weights(settings, tmp_path):
    """And its sampler and its scorer agree at every step: both run the compiled layers."""
    for name in ("plain", "compiled"):
        on_ranks(1, train, [*settings, f"run.directory={tmp_path}/{name}", f"model.compile={name == 'compiled'}"])
    assert largest_difference(tmp_path / "plain", tmp_path / "compiled") < ROUNDING
    assert all(line["sampler_gap"] < ROUNDING for line in read_metrics(tmp_path / "compiled"))
