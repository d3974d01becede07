"""A browser without a window, and pages of which every error and every request is known."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from hark.launch.report import main
from tests.written import write_run


@dataclass
class Opened:
    """A page, what its console said, and the addresses that it asked for."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "Chromium is missing; install it, e.g. sudo apt-get install chromium"
    with sync_playwright() as playwright:
        # Tests may run as root, for whom Chromium has no sandbox.
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser) -> Iterator:
    """A function that opens an address; at the end no page may have said an error or asked a foreign server."""
    opened: list[Opened] = []

    def visited(address: str, **settings) -> Page:
        one = Opened(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings)).new_page())
        one.page.on("console", lambda message: one.errors.append(message.text) if message.type != "log" else None)
        one.page.on("pageerror", lambda error: one.errors.append(str(error)))
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.set_default_timeout(5000)
        opened.append(one)
        one.page.goto(address)
        return one.page

    yield visited
    for one in opened:
        one.page.context.close()
        assert one.errors == []
        assert all(url.startswith(("file:///", "data:", "http://localhost:")) for url in one.requests)


@pytest.fixture(scope="session")
def report(tmp_path_factory) -> str:
    """The address of a page about two runs."""
    folder = tmp_path_factory.mktemp("report")
    first = write_run(folder / "grpo", recorded=(10, 20, 30))
    second = write_run(folder / "sft", recorded=(), settings=("optim.lr=1e-3",))
    return written(first, second, out=folder / "report.html")


def play(player: Locator) -> None:
    """Play a clip, without a sound; the time must advance."""
    player.evaluate("async (player) => { player.muted = true; await player.play(); }")
    for _ in range(50):
        if player.evaluate("(player) => player.currentTime") > 0.1:
            return
        player.page.wait_for_timeout(50)
    raise AssertionError("the clip does not play")


def written(*runs: Path, out: Path) -> str:
    """Write the page about runs; returns its address."""
    main([*map(str, runs), "--out", str(out)])
    return out.as_uri()
