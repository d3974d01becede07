"""Draw the pictures of docs/report.md from a report of the demo, each with few colours so that its file is small.

python -m tests.browser.screenshots runs/mini/report.html docs
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

COLOURS = 64


def main(report: Path, out: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (show, settings) in PICTURES.items():
            page = browser.new_page(**settings)
            page.goto(report.resolve().as_uri())
            show(page)
            page.wait_for_timeout(300)
            save(page.screenshot(), out / f"report-{name}.png")
        browser.close()


def curves(page: Page) -> None:
    page.locator("[data-metric=reward]").focus()
    page.keyboard.press("End")


def steps(page: Page) -> None:
    page.locator("#tab-steps").click()
    page.locator(".picker button").first.click()
    page.get_by_label("KL", exact=True).check()
    page.locator(".completion").nth(1).locator(".token").nth(1).focus()


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


def save(picture: bytes, path: Path) -> None:
    """Save a picture with COLOURS colours."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
