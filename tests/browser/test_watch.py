"""`hark watch` in a browser: it follows a run, and what is open stays open."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from playwright.sync_api import expect

from hark.launch.page.collect import Bounds, Collection
from hark.launch.watch import server
from tests.browser.conftest import play
from tests.written import step_record, write_metrics, write_part, write_run


@pytest.fixture
def watched(tmp_path) -> tuple[Path, str]:
    """A run, and the address at which it is watched."""
    run = write_run(tmp_path / "grpo", steps=25, recorded=(10,))
    with server(Collection([run], Bounds()), 0) as serving:
        threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
        yield run, f"http://localhost:{serving.server_address[1]}/"
        serving.shutdown()


def test_new_lines_of_the_metrics_appear(watched, visit):
    run, address = watched
    page = visit(address)
    expect(page.locator("#status")).to_contain_text("step 25")
    page.locator("[data-metric=kl]").focus()
    assert page.locator("[data-metric=accuracy] .dot").count() == 1
    write_metrics(run, range(26, 42))
    expect(page.locator("#status")).to_contain_text("step 41")
    assert page.locator("[data-metric=accuracy] .dot").count() == 2
    assert "raise data.workers" in page.locator("#warnings").inner_text()
    expect(page.locator("[data-metric=kl]")).to_be_focused()


def test_a_new_recorded_step_can_be_chosen_and_what_is_open_stays_open(watched, visit):
    run, address = watched
    page = visit(address)
    page.locator("#tab-steps").click()
    page.locator(".completion summary").first.click()
    page.locator(".completion .token").nth(1).focus()
    rows = [json.loads(line) for line in (run.parent / "data" / "test.jsonl").read_text().splitlines()]
    config = json.loads((run / "evaluation.json").read_text())["config"]
    write_part(run, step_record(20, rows[:2], run.parent / "data", config))
    write_metrics(run, range(26, 27))
    options = page.locator("#pick option")
    expect(options).to_have_count(2)
    expect(page.locator(".completion details").first).to_have_attribute("open", "")
    expect(page.locator("#token")).to_contain_text("place 1 of completion 0")
    expect(page.locator(".completion .token").nth(1)).to_be_focused()
    page.get_by_label("later step").click()
    expect(page.locator(".facts")).to_contain_text("Step 20")


def test_a_view_can_be_opened_before_the_data_have_come(watched, visit):
    _, address = watched
    page = visit("about:blank")
    held = []
    page.route("**/main.json", lambda route: route.continue_() if held else held.append(route))
    page.goto(address)
    page.locator("#tab-steps").click()
    page.wait_for_timeout(200)
    held[0].continue_()
    expect(page.locator(".facts")).to_contain_text("Step 10")


def test_clips_and_evaluations_are_served(watched, visit):
    _, address = watched
    page = visit(address)
    page.locator("#tab-evaluation").click()
    page.locator(".row summary").first.click()
    play(page.locator(".clip audio").first)
