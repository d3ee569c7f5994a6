"""Open the pages in headless Chromium: no console error, no request, no overflow, and no violation that axe-core finds, in light and dark."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.pages import write
from tests.support import told
from tests.support.browser import browser

pytestmark = pytest.mark.browser
WIDTHS = {"desktop": 1280, "phone": 390}
RULES = {
    "light": {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}},
    "dark": {"runOnly": {"type": "rule", "values": ["color-contrast"]}},
}
"""Both have the same elements, so only their colours differ."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A campaign with a reversal, and a round that failed."""
    folder = tmp_path_factory.mktemp("browser")
    campaign, failed = (
        Campaign.at(told.reversal(folder / "reversal", rounds=2, num_items=100)),
        Campaign.at(told.failed(folder / "failed")),
    )
    texts = {
        "campaign": write.campaign_page(Log(campaign.log).records(), campaign),
        "failed": write.round_page(Log(failed.log).records(), failed.round("r0001")),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


def opened(chromium: Any, path: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """A page in the browser, and what it said or asked for."""
    told_of: list[str] = []
    found = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found.on("console", lambda message: told_of.append(f"console: {message.text}"))
    found.on("pageerror", lambda error: told_of.append(f"error: {error}"))
    found.on("request", lambda request: told_of.append(f"request: {request.url}"))
    found.goto(path.as_uri())
    found.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    return found, [line for line in told_of if line != f"request: {path.as_uri()}"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["campaign", "failed"])
def test_a_page_fits_asks_nothing_and_can_be_read_by_everybody(chromium, pages, name, scheme):
    from axe_playwright_python.sync_playwright import Axe

    width = WIDTHS["phone" if (name == "campaign") == (scheme == "dark") else "desktop"]
    found, told_of = opened(chromium, pages[name], width, scheme)
    try:
        assert told_of == []
        violations = Axe().run(found, options=RULES[scheme]).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"][:200]) for each in violations] == []
        for each in WIDTHS.values():
            found.set_viewport_size({"width": each, "height": 900})
            assert found.evaluate("document.documentElement.scrollWidth") <= each
        assert found.evaluate("parseFloat(getComputedStyle(document.querySelector('svg text')).fontSize)") >= 11
    finally:
        found.close()


def test_a_phone_shows_a_chart_s_words_at_their_own_size_and_the_keyboard_reaches_tables(chromium, pages):
    found, _ = opened(chromium, pages["campaign"], WIDTHS["phone"], "light")
    try:
        shown = found.evaluate(
            "[...document.querySelectorAll('figure svg[role=img]')].map(each => each.getBoundingClientRect().width / each.viewBox.baseVal.width)"
        )
        assert shown and min(shown) > 0.85, "a word of 12 px is at least 10 px"
        assert found.evaluate("[...document.querySelectorAll('.box')].every(each => each.tabIndex === 0)")
        found.keyboard.press("Tab")
        assert found.evaluate("document.activeElement.className") == "skip"
    finally:
        found.close()


def test_a_page_prints(chromium, pages, tmp_path):
    found, _ = opened(chromium, pages["failed"], WIDTHS["desktop"], "dark")
    try:
        found.emulate_media(media="print", color_scheme="dark")
        assert found.evaluate("getComputedStyle(document.body).backgroundColor") in (
            "rgb(255, 255, 255)",
            "rgba(0, 0, 0, 0)",
        )
        assert found.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        content = found.pdf(path=str(tmp_path / "page.pdf"), prefer_css_page_size=True)
        assert (
            content.startswith(b"%PDF-")
            and content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") + content.count(b"/Type /Page/") >= 2
        )
    finally:
        found.close()
