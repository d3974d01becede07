"""The page of `hark report` in a browser: it works by pointer and by keyboard, and no text on it can do harm."""

from __future__ import annotations

import re
import time

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import play, written
from tests.written import HOSTILE, write_run

TABS = ("curves", "steps", "evaluation", "configuration")


def open_tab(page: Page, name: str) -> None:
    page.locator(f"#tab-{name}").click()
    expect(page.locator(f"#{name}")).to_be_visible()


def test_every_tab_opens_by_pointer_and_by_keyboard(report, visit):
    page = visit(report)
    for name in TABS:
        open_tab(page, name)
        assert page.locator("[role=tabpanel]:visible").count() == 1
        assert page.locator(f"#{name}").inner_text().strip()
    page.locator("#tab-configuration").focus()
    for name in ("curves", "steps", "evaluation"):
        page.keyboard.press("ArrowRight")
        expect(page.locator(f"#tab-{name}")).to_be_focused()
        expect(page.locator(f"#{name}")).to_be_visible()


def test_the_address_keeps_the_open_tab(report, visit):
    page = visit(report)
    open_tab(page, "evaluation")
    page.reload()
    expect(page.locator("#evaluation")).to_be_visible()
    assert page.evaluate("scrollY") == 0


def test_curves_have_a_line_for_each_run_and_intervals_for_accuracies(report, visit):
    page = visit(report)
    assert page.locator("[data-metric=kl] .line").count() == 2
    accuracy = page.locator("[data-metric=accuracy]")
    assert accuracy.locator(".bar").count() == 6 and accuracy.locator(".dot").count() == 6
    for name in ("reward", "reward/accuracy", "silent_accuracy", "entropy", "seconds/load"):
        expect(page.locator(f'[data-metric="{name}"]')).to_be_visible()
    assert "raise data.workers" in page.locator("#warnings").inner_text()


def test_the_pointer_and_the_arrow_keys_read_one_step_in_all_charts(report, visit):
    page = visit(report)
    chart = page.locator("[data-metric=kl]")
    chart.locator("svg").hover()
    step = int(page.locator("#marked").inner_text().split()[1])
    assert chart.locator(".readout span").first.inner_text() == f"{step / 100:.4g}"
    assert page.locator(".cursor[visibility=visible]").count() == page.locator(".chart").count()
    page.mouse.move(0, 0)
    expect(page.locator("#marked")).to_have_text("the last step")
    chart.focus()
    page.keyboard.press("Home")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#marked")).to_have_text("step 7")
    assert "grpo 0.07 at step 7" in chart.get_attribute("aria-valuetext")
    page.keyboard.press("Escape")
    expect(page.locator("#marked")).to_have_text("the last step")


def test_smoothing_is_an_average_or_none(report, visit):
    page = visit(report)
    assert page.locator("[data-metric=reward] .faint").count() == 2
    page.locator("input[type=range]").fill("0")
    assert page.locator("[data-metric=reward] .faint").count() == 0


def test_steps_and_questions_are_chosen_and_everything_about_them_is_there(report, visit):
    page = visit(report)
    open_tab(page, "steps")
    expect(page.locator(".facts")).to_contain_text("Step 30")
    page.get_by_label("earlier step").click()
    expect(page.locator(".facts")).to_contain_text("Step 20")
    page.locator("#pick select").select_option(label="10")
    expect(page.locator(".facts")).to_contain_text("Step 10")
    page.locator(".picker button").nth(1).click()
    expect(page.locator(".question h2")).to_have_text("What do you hear?")
    assert page.locator(".choices .right").inner_text().startswith("a bell")
    assert page.locator(".answers").inner_text().split("\n")[1:3] == ["greedily", "✓ right a bell"]
    assert page.locator(".completion").count() == 3
    expect(page.locator(".completion").nth(1)).to_contain_text("cut off")
    expect(page.locator(".completion").first).to_contain_text("advantage +1.15")


def test_a_clip_plays_and_has_a_spectrogram(report, visit):
    page = visit(report)
    open_tab(page, "steps")
    play(page.locator(".clip audio").first)
    shades = "(canvas) => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"
    assert page.locator(".clip canvas").first.evaluate(shades) > 50


@pytest.mark.parametrize("quantity", ["ratio", "KL", "advantage", "loss"])
def test_tokens_take_the_colours_of_a_quantity(report, visit, quantity):
    page = visit(report)
    open_tab(page, "steps")
    page.get_by_label("Update").select_option(index=1)
    page.get_by_label(quantity, exact=True).check()
    shades = page.locator(".token").evaluate_all("(tokens) => tokens.map((token) => Number(token.dataset.shade))")
    assert 4 in map(abs, shades) and len(set(shades)) > 1, "the largest value has the deepest shade"
    colours = page.locator(".token").evaluate_all("(t) => t.map((token) => getComputedStyle(token).backgroundColor)")
    assert len(set(colours)) == len(set(shades))
    assert page.locator(".token").first.get_attribute("title").startswith(quantity)


def test_a_tokens_values_show_on_hover_and_by_keyboard(report, visit):
    page = visit(report)
    open_tab(page, "steps")
    detail = page.locator("#token")
    expect(detail).to_be_hidden()
    page.locator(".completion").first.locator(".token").nth(2).hover()
    expect(detail).to_contain_text("place 2 of completion 0")
    page.locator(".completion").first.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    expect(detail).to_contain_text("place 1 of completion 0")
    page.keyboard.press("ArrowDown")
    expect(detail).to_contain_text("place 1 of completion 1")
    assert page.locator(".completion").nth(1).locator("[tabindex='0']").count() == 1, "one stop of the tab key"
    assert page.locator(".likeliest li").count() == 2 and "60.7 %" in detail.inner_text()
    page.get_by_label("close").click()
    expect(detail).to_be_hidden()


def test_the_arithmetic_of_a_loss_adds_up(report, visit):
    page = visit(report)
    open_tab(page, "steps")
    page.get_by_label("Update").select_option(index=1)
    card = page.locator(".completion").first
    card.locator("summary").click()
    cells = "(rows) => rows.map((row) => [...row.cells].map((cell) => cell.innerText))"
    rows = card.locator(".arithmetic tbody tr").evaluate_all(cells)
    assert len(rows) == 4
    for _, new, old, ratio, clip, least, reference, kl, weight, loss in rows:
        new, old, ratio, clip, least, reference, kl, weight, loss = map(
            float, (new, old, ratio, clip, least, reference, kl, weight, loss)
        )
        assert ratio == pytest.approx(2.718281828 ** (new - old), rel=1e-4)
        assert clip == pytest.approx(min(max(ratio, 0.8), 1.2), abs=1e-6)
        assert least == pytest.approx(min(ratio * 1.1545, clip * 1.1545), rel=1e-4)
        assert loss == pytest.approx(weight * (-least + 0.04 * kl), rel=1e-3)
    total = float(card.locator(".total").inner_text().split("= ")[1])
    assert total == pytest.approx(sum(float(row[-1]) for row in rows), abs=1e-5)
    assert "1 × 1 (accuracy) + 1 × 1 (format) = 2" in card.inner_text()


def test_questions_are_filtered_searched_sorted_and_opened(report, visit):
    page = visit(report)
    open_tab(page, "evaluation")
    count = page.locator("#count")
    expect(count).to_have_text("4 of 4 questions")
    page.get_by_label("Show").select_option("wrong")
    expect(count).to_have_text("2 of 4 questions")
    page.get_by_label("Show").select_option("all")
    page.get_by_label("Search").press_sequentially("how often TEST-2")
    expect(count).to_have_text("1 of 4 questions")
    page.get_by_label("Search").fill("")
    page.get_by_label("Order").select_option("unsure")
    assert page.locator(".row .number").all_inner_texts() == ["30.0 %", "50.0 %", "70.0 %", "90.0 %"]
    page.locator(".row summary").first.click()
    expect(page.locator(".row[open] .answers")).to_contain_text("with other sound")
    assert page.locator(".row[open] .run").count() == 2, "the answers of both runs"
    expect(page.locator(".row[open] audio")).to_be_visible()
    assert page.locator(".accuracy .strip").count() == 8


def test_the_options_that_differ_are_listed(report, visit):
    page = visit(report)
    open_tab(page, "configuration")
    assert page.locator(".options tbody tr").all_inner_texts() == ["optim.lr\t0.0003\t0.001"]


def test_hostile_texts_are_shown_and_do_nothing(tmp_path, visit):
    run = write_run(tmp_path / "grpo", texts=HOSTILE, settings=(f"model.path={HOSTILE[0]}",))
    page = visit(written(run, write_run(tmp_path / "sft"), out=tmp_path / "r.html"))
    for name in TABS:
        open_tab(page, name)
    assert HOSTILE[0] in page.locator("#configuration").inner_text()
    open_tab(page, "steps")
    expect(page.locator(".question h2")).to_contain_text(HOSTILE[1])
    assert HOSTILE[0] in page.locator(".token").all_inner_texts()
    page.locator(".token").first.focus()
    page.locator(".completion summary").first.click()
    page.get_by_label("plain text").check()
    assert page.locator(".completion .tokens").first.inner_text() == HOSTILE[0]
    assert "⟨U+202E⟩right to left" in page.locator(".completion").nth(2).inner_text()
    open_tab(page, "evaluation")
    page.locator(".row summary").first.click()
    assert HOSTILE[1] in page.locator("#questions").inner_text()
    assert page.evaluate("window.harmed") is None
    assert page.locator("img, [onerror], [style]").count() == 0


CONTRAST = """() => {
  const linear = (share) => (share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
  const channel = (value) => linear(value / 255);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const isShown = (one) => own(one) && one.checkVisibility() && !one.closest('select, .skip');
  const shown = [...document.body.querySelectorAll('*')].filter(isShown);
  const weak = [];
  for (const one of shown) {
    const style = getComputedStyle(one);
    const front = light(parse(one.namespaceURI.includes('svg') ? style.fill : style.color));
    const back = light(ground(one));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < 4.5) weak.push(`${one.tagName} ${one.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return weak;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_tab_has_contrast_and_no_overflow(report, visit, scheme, width):
    page = visit(report, color_scheme=scheme, viewport={"width": width, "height": 800})
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (int(re.findall(r"\d+", dark)[0]) < 60) == (scheme == "dark")
    for name in TABS:
        open_tab(page, name)
        if name == "steps":
            page.get_by_label("Update").select_option(index=1)
            page.get_by_label("loss", exact=True).check()
            page.locator(".token").first.focus()
            page.locator(".completion summary").first.click()
        if name == "evaluation":
            page.locator(".row summary").first.click()
        assert page.evaluate(CONTRAST) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name_and_shows_its_focus(report, visit):
    page = visit(report)
    for name in TABS:
        open_tab(page, name)
        page.wait_for_timeout(100)
        nameless = """() => [...document.querySelectorAll('button, select, input, audio, canvas, [tabindex="0"]')]
            .filter((one) => one.checkVisibility() && !one.textContent.trim() && !one.labels?.length && !one.ariaLabel)
            .map((one) => one.outerHTML)"""
        assert page.evaluate(nameless) == []
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_reduced_motion_stops_what_moves_by_itself(report, visit):
    page = visit(report, reduced_motion="reduce")
    assert page.locator("#tab-steps").evaluate("(tab) => getComputedStyle(tab).transitionDuration") == "0s"


def seconds_until_drawn(page: Page, address: str) -> float:
    """Seconds from opening a page until its last chart is on the screen."""
    page.goto("about:blank")
    started = time.monotonic()
    page.goto(address)
    expect(page.locator(".chart").last).to_be_visible()
    page.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    return time.monotonic() - started


def test_a_run_of_1000_steps_with_50_recorded_is_drawn_in_a_second(tmp_path, visit):
    run = write_run(tmp_path / "grpo", steps=1000, recorded=tuple(range(20, 1001, 20)), questions=4)
    address = written(run, out=tmp_path / "r.html")
    page = visit("about:blank")
    seconds = [seconds_until_drawn(page, address) for _ in range(3)]
    print("seconds until drawn:", *(f"{one:.2f}" for one in seconds))
    assert min(seconds) < 1, "the least of three: other work may slow one down"
    open_tab(page, "steps")
    expect(page.locator("#pick option")).to_have_count(50)
