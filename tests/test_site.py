"""The site of the documentation: it is built without warnings and loads nothing from another server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    subprocess.run(["make", "-s", "build/types/hark"], cwd=ROOT, check=True)
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "-f", "docs/site/mkdocs.yml", "-d", str(out)]
    # A link to a page or heading that does not exist is a warning, and `strict: true` makes it an error.
    built = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_every_page_has_its_text_and_the_notebook_its_outputs(site):
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "docs" / "first_hour.ipynb"]:
        assert (site / f"{page.stem}.html").exists()
    first = (site / "index.html").read_text()
    assert "Train your own model on your own data" in first and 'src="tree.svg"' in first
    notebook = (site / "first_hour.html").read_text()
    assert "mean reward of the first five steps" in notebook and "<img" in notebook and "<audio" in notebook


def test_a_link_to_source_leads_to_the_page_of_its_docstrings(site):
    page = (site / "source" / "grpo" / "loss.py.html").read_text()
    assert "clip_low" in page and "DAPO, arXiv 2503.14476" in page
    assert 'href="source/grpo/loss.py.html"' in (site / "index.html").read_text()
    assert (site / "source" / "launch" / "configs.html").exists() or (site / "source" / "launch").is_dir()
    listed = (site / "reference.html").read_text()
    assert listed.count("source/grpo/") >= 20 and "source/data/rewards/judging.py.html" in listed


def test_nothing_is_loaded_from_another_server(site):
    loads = re.compile(r"<(?:script|img|audio|iframe|link)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)\"")
    urls = [url for page in site.rglob("*.html") for url in loads.findall(page.read_text())]
    assert urls == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert "fonts.googleapis" not in styles and "@import" not in styles
