"""`from hark import ...`: the step of docs/library.md runs as printed, and importing the package stays light."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import hark

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


def code() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return block


def test_the_step_of_the_page_runs_and_changes_the_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after = code().split("loss.backward()\n")
    names: dict = {}
    exec(compile(before, str(PAGE), "exec"), names)
    policy = names["policy"]
    weights = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    exec(compile(f"loss.backward()\n{after}", str(PAGE), "exec"), names)
    assert torch.isfinite(names["loss"]) and names["loss"].requires_grad
    assert names["logprobs"].shape == names["rollout"].mask.shape and names["advantages"].ne(0).any()
    changed = [name for name, p in policy.named_parameters() if name in weights and not torch.equal(p, weights[name])]
    assert any("tower" in name for name in changed) and any("layers" in name for name in changed)
    # The sampler and the scorer computed the same numbers, because nothing was updated between them.
    torch.testing.assert_close(names["logprobs"].detach(), names["rollout"].logprobs, atol=1e-5, rtol=0)


def test_the_step_of_the_page_is_short():
    assert len([line for line in code().splitlines() if line.strip()]) <= 26


def test_every_name_is_found_and_listed():
    for name in hark.__all__:
        function = getattr(hark, name)
        assert function.__name__ == name and name in dir(hark)
    assert {"load_policy", "sample", "score", "group_advantages", "policy_loss"} <= set(hark.__all__)
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        hark.sampel  # noqa: B018


def test_a_type_checker_sees_the_module_of_every_name():
    """The imports for type checkers and the table of lazy imports are two lists of the same facts."""
    source = Path(hark.__file__).read_text()
    lines = re.findall(r"^    from (\S+) import (.+)$", source, re.MULTILINE)
    seen = {name: module for module, names in lines for name in names.split(", ")}
    assert sorted([*seen, "UserError"]) == hark.__all__
    assert all(getattr(hark, name) is getattr(import_module(module), name) for name, module in seen.items())


def test_importing_the_package_loads_no_torch(tmp_path):
    code = "import sys, hark, hark.data.examples; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_threads_that_wait_for_a_product_sleep_soon_unless_the_user_says_otherwise(chosen, expected, tmp_path):
    """OpenMP prints what it has read, when a program imports torch."""
    program = Path(hark.__file__).parents[1] / "launch" / "train.py"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    printed = subprocess.run(
        [sys.executable, program, "--help"], cwd=tmp_path, env=environment | chosen | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True, text=True,
    ).stderr  # fmt: skip
    if not (found := re.findall(r"GOMP_SPINCOUNT = '(\d+)'", printed)):
        pytest.skip("torch has another OpenMP here")
    assert set(found) == {expected}
