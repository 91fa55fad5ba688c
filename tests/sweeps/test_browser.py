"""The report page in a real browser: sort, filter, point, choose, follow the link, use the keyboard, print."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"
)

SCREENSHOTS = os.environ.get("HWSIM_SCREENSHOTS")
"""Folder to leave the screenshots in, for people to look at."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # CI runs as root in a container, where Chromium has no sandbox of its own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, many_page: Path) -> Iterator[Any]:
    """The report of ten thousand points; whatever a script complains of fails the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(10_000)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(many_page.as_uri())
    yield page
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in requests), "nothing comes from the network"
    page.close()


def look(page: Any, name: str) -> bytes:
    path = Path(SCREENSHOTS) / f"{name}.png" if SCREENSHOTS else None
    return page.screenshot(path=path)


def column(page: Any, head: str) -> list[str]:
    heads = page.locator("#table th").all_inner_texts()
    index = next(i for i, text in enumerate(heads) if text.startswith(head))
    return page.locator(f"#table tbody td:nth-child({index + 1})").all_inner_texts()


def centre_of_mark(page: Any) -> tuple[float, float]:
    """A place on the plot where something is drawn in the colour of a series: a dot."""
    return tuple(
        page.evaluate(
            """() => {
              const canvas = document.getElementById("plot"), ratio = canvas.width / canvas.clientWidth;
              const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              for (let i = 4 * 80 * width; i < data.length; i += 4)
                if (Math.max(data[i], data[i + 1], data[i + 2]) - Math.min(data[i], data[i + 1], data[i + 2]) > 90) {
                  const place = i / 4;
                  return [(place % width) / ratio + 1, Math.floor(place / width) / ratio + 1];
                }
            }"""
        )
    )


def test_sort_page_and_filter(page: Any) -> None:
    latencies = page.get_by_role("columnheader", name="latency (µs)")
    button = latencies.get_by_role("button")
    button.click()
    assert latencies.get_attribute("aria-sort") == "ascending"
    rising = [float(text) for text in column(page, "latency")]
    assert len(rising) == 100
    assert rising == sorted(rising)
    button.click()
    falling = [float(text) for text in column(page, "latency")]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > rising[-1]
    page.get_by_role("button", name="after ▶").click()
    assert float(column(page, "latency")[0]) <= falling[-1]
    assert page.locator("#range").inner_text() == "101 to 200 of 10,000 points"
    page.get_by_label("show block").select_option("1×16")
    assert set(column(page, "block")) == {"1×16"}
    assert page.locator("#range").inner_text() == "1 to 100 of 2,000 points (of 10,000 in all)"
    assert "2000 points" in page.locator("#plot").get_attribute("aria-label")
    look(page, "filtered")


def test_hover_shows_the_configuration_and_a_click_leads_to_the_layers(page: Any) -> None:
    page.locator("#plot").scroll_into_view_if_needed()
    assert page.locator("#tip").is_hidden()
    x, y = centre_of_mark(page)
    page.locator("#plot").hover(position={"x": x, "y": y})
    tip = page.locator("#tip").inner_text()
    for words in ("block", ", p ", ", u ", "latency (µs): ", "accuracy, integer (%): "):
        assert words in tip
    look(page, "hover")
    page.locator("#plot").click(position={"x": x, "y": y})
    assert tip.splitlines()[0] in page.locator("#picked").inner_text()
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()
    page.locator("#table tbody tr.front a").first.click()
    key = page.url.split("#point-")[1]
    opened = page.locator(f"[id='point-{key}']")
    assert opened.get_attribute("open") is not None
    layers = opened.get_by_role("table", name="Layers")
    layers.get_by_role("button", name="MACs").click()
    assert layers.locator("tbody td:first-child").all_inner_texts() == ["fc2", "conv1", "fc1", "conv2"]
    look(page, "layers")


def test_the_plot_works_with_the_keyboard(page: Any) -> None:
    page.locator("#plot").focus()
    page.keyboard.press("ArrowRight")
    first = page.locator("#picked").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#picked").inner_text() != first
    page.keyboard.press("ArrowLeft")
    assert page.locator("#picked").inner_text() == first
    assert page.locator("#layers").count() == 1, "the fastest is shown layer by layer"
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("#point-"))
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_axes_and_colours_can_be_chosen(page: Any) -> None:
    before = look(page, "plot")
    page.locator("#y").select_option("energy_pj")
    page.locator("#colour").select_option("dram.gb_per_s")
    page.locator("#logx").check()
    assert "energy (µJ) against latency (µs), 10000 points" in page.locator("#plot").get_attribute(
        "aria-label"
    )
    assert page.locator("#legend li").count() == 5
    page.locator("#plot").scroll_into_view_if_needed()
    assert look(page, "energy") != before


def test_on_paper_nothing_is_cut_off(page: Any, tmp_path: Path) -> None:
    page.emulate_media(media="print")
    assert page.locator(".controls").first.is_hidden()
    assert page.evaluate(
        "document.querySelector('.scroll').scrollHeight <= document.querySelector('.scroll').clientHeight + 1"
    )
    page.set_viewport_size({"width": 1047, "height": 718})  # A4 landscape less its margins, at 96 dpi
    width = page.evaluate("document.getElementById('table').scrollWidth")
    assert width <= 1047, "the table fits across a page"
    pdf = page.pdf(path=Path(SCREENSHOTS) / "report.pdf" if SCREENSHOTS else None, prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") + pdf.count(b"/Type/Page") > 3
