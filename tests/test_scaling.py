"""The scaling study gives every curve, counts work as the formula says, and writes what it promises."""

import json
from pathlib import Path

import pytest

from hark.launch.studies import scaling
from hark.launch.studies.scaling import CURVES, MARKERS, main, plot
from tests.test_benchmark import TINY

pytestmark = pytest.mark.slow

SIZES = "--group-size 2 8 --seconds 1 10 --new-tokens 8 24 --prompts 1 2".split()
BEGIN, END = MARKERS
PAGE = f"before\n{BEGIN}\nold\n{END}\nafter\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where a run on a tiny model has left its figures and its page."""
    directory = tmp_path_factory.mktemp("scaling")
    (directory / "page.md").write_text(PAGE)
    files = ["--json", str(directory / "figures.json"), "--table", str(directory / "page.md")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "best_matmul_rate", lambda: 1e12)  # a second each time
        main([*SIZES, "--ranks", "2", "--repeat", "1", *files], TINY)
    return directory


@pytest.fixture(scope="module")
def result(directory) -> dict:
    return json.loads((directory / "figures.json").read_text())


def test_every_curve_has_times_and_a_share_of_the_limit_at_every_size(result):
    assert result["curves"].keys() == CURVES.keys()
    for field, points in result["curves"].items():
        assert len(points) == 2 and points[0]["work"][field] < points[1]["work"][field]
        for point in points:
            assert point["seconds"].keys() == {"rollout", "reference", "score", "optimizer", "step"}
            assert 0 < point["limit_seconds"] < point["seconds"]["step"]


def test_a_group_pays_for_its_prompt_once_and_separate_rows_each_time(result):
    two, eight = result["curves"]["group_size"]
    completion = (eight["necessary_gmacs"] - two["necessary_gmacs"]) / 6
    prompt = two["necessary_gmacs"] - 2 * completion
    assert eight["separate_gmacs"] == pytest.approx(8 * (prompt + completion))
    one, both = result["curves"]["prompts"]
    assert both["necessary_gmacs"] == pytest.approx(2 * one["necessary_gmacs"])
    for field in ("seconds", "new_tokens"):
        less, more = result["curves"][field]
        assert less["necessary_gmacs"] < more["necessary_gmacs"]


def test_ranks_receive_what_the_formula_says(result):
    (figures,) = result["ranks"]
    assert figures["ranks"] == 2 and figures["communication/gib"] == figures["formula/gib"] > 0
    assert 0 < figures["seconds/communication"] < figures["seconds/step"] and figures["tokens_per_second"] > 0


def test_tables_stand_in_the_page_once_however_often_they_are_written(directory, result):
    page = (directory / "page.md").read_text()
    assert page.startswith(f"before\n{BEGIN}\n") and page.endswith(f"{END}\nafter\n") and "old" not in page
    assert all(page.count(f"### {name.capitalize()}\n") == 1 for name, _ in CURVES.values())
    assert MARKERS.filled(page, scaling.tables(result)) == page


def test_the_tables_of_the_page_are_those_of_its_figures():
    docs = Path(__file__).parents[1] / "docs"
    page, figures = (docs / "scaling.md").read_text(), json.loads((docs / "scaling.json").read_text())
    assert MARKERS.filled(page, scaling.tables(figures)) == page


def test_the_plot_has_a_panel_for_each_curve(result, tmp_path):
    pytest.importorskip("matplotlib")
    plot(result, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert all(f">{name}<" in drawn for name, _ in CURVES.values())
    assert drawn.count(">whole step<") == len(CURVES)


def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("no place for tables")
    with pytest.raises(SystemExit):
        main(["--table", str(tmp_path / "page.md")])
    assert "expected a page with the lines" in capsys.readouterr().err
    monkeypatch.setattr(scaling, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--plot", str(tmp_path / "curves.svg")])
    assert "pip install -e '.[plot]'" in capsys.readouterr().err
