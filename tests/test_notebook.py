"""The notebook runs from its first cell to its last, learns, and holds the outputs of such a run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

PATH = Path(__file__).parents[1] / "docs" / "first_hour.ipynb"


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.get("name") == "stderr"], "no warnings"
    return "".join(output.get("text", "") for output in outputs)


def check(text: str) -> None:
    first, last = map(float, re.search(r"first five steps (\S+), of the last five (\S+)", text).groups())
    heard, silent = map(int, re.search(r"with sound (\d+) %, without (\d+) %", text).groups())
    # 320 completions: chance would be 0.25 +- 0.03. 200 greedy answers: without sound 25 +- 3 %.
    assert last > first + 0.3 and heard >= 75 and silent <= 40


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_the_notebook_runs_and_learns(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # another process of the suite uses the other core
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check(printed(notebook))


def test_the_outputs_in_the_file_are_those_of_a_run_of_all_cells_in_order(notebook):
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    check(printed(notebook))
    assert PATH.stat().st_size < 400_000
