"""Draw the pictures of docs/report.md from a report of the demo, each with 256 colours so that its file is small.

python -m tests.browser.screenshots runs/mini/report.html docs
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

COLOURS, GAP = 256, 8


def main(report: Path, out: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (show, settings) in PICTURES.items():
            save(taken(browser, report, show, settings), out / f"report-{name}.png")
        sides = [taken(browser, report, show, SCREEN) for show in (curves, opened)]
        save(beside(*sides), out / "report.png")
        browser.close()


def taken(browser: Browser, report: Path, show: Callable[[Page], None], settings: dict[str, Any]) -> Image.Image:
    """A picture of the page after `show` has opened something on it."""
    page = browser.new_page(**settings)
    page.goto(report.resolve().as_uri())
    show(page)
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def curves(page: Page) -> None:
    page.locator("[data-metric=reward]").focus()
    page.keyboard.press("End")


def steps(page: Page) -> None:
    page.locator("#tab-steps").click()
    page.locator(".picker button").first.click()
    page.locator(".completion").nth(1).locator(".token").nth(1).focus()


def opened(page: Page) -> None:
    page.locator("#tab-steps").click()
    page.locator(".completion summary").nth(1).click()
    page.locator(".completion").first.evaluate("(card) => card.remove()")  # so that the opened one is in the picture


def arithmetic(page: Page) -> None:
    page.locator("#tab-steps").click()
    page.locator(".completion summary").first.click()
    page.locator(".completion").first.evaluate("(card) => window.scrollTo(0, card.offsetTop - 60)")


def evaluation(page: Page) -> None:
    page.locator("#tab-evaluation").click()
    page.locator("#filters label", has_text="Run").locator("select").select_option(index=1)
    page.wait_for_timeout(200)
    page.locator(".row summary").first.click()
    page.locator("#questions").evaluate("(rows) => window.scrollTo(0, rows.offsetTop - 480)")


SCREEN = {"viewport": {"width": 1200, "height": 860}}
PHONE = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "device_scale_factor": 1.5}
PICTURES = {
    "curves": (curves, SCREEN),
    "steps": (steps, SCREEN),
    "arithmetic": (arithmetic, SCREEN | {"viewport": {"width": 1200, "height": 420}}),
    "evaluation": (evaluation, SCREEN),
    "phone": (steps, PHONE),
}


def beside(*pictures: Image.Image) -> Image.Image:
    """Pictures of one height in a row."""
    whole = Image.new(
        "RGB", (sum(one.width for one in pictures) + GAP * (len(pictures) - 1), pictures[0].height), "#888"
    )
    left = 0
    for one in pictures:
        whole.paste(one, (left, 0))
        left += one.width + GAP
    return whole


def save(picture: Image.Image, path: Path) -> None:
    """Save a picture with COLOURS colours."""
    picture.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
