"""The page in a real browser, from a file and without a network: sorting, hovering, a bar that leads to its row, print."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

from nmfx.models.site import Site, Sites
from nmfx.report.page import comparison_page, save_page, search_page
from nmfx.report.record import Limit, Report, short_names, stages_of
from nmfx.scheme import Scheme
from nmfx.sparsity.pattern import Pattern

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
WIDTHS = {"stem.weight": 16, "body.0.weight": 256, "body.1.weight": 48, "body.2.weight": 1024, "head.weight": 160}
PATTERNS = {"body.0.weight": "2:16", "body.1.weight": "8:16", "body.2.weight": "1:16", "head.weight": "4:16"}
HEADS = "document.querySelector('table.sorts').tHead.rows[0].cells"


def report(count: int = 0) -> Report:
    widths = WIDTHS if not count else {f"stages.{i // 20}.blocks.{i % 20}.weight": 16 * (1 + i % 40) for i in range(count)}
    sites = Sites(tuple(Site(n, "linear", (8, w), (8, w, 1), 8 * w, 1, 32 * w, ()) for n, w in widths.items()), model="net")
    scheme = Scheme(PATTERNS if not count else {name: ("2:16", "4:16", "8:16")[i % 3] for i, name in enumerate(widths)})
    kept = scheme.totals(sites).kept
    limit, curve = Limit("weights", kept, sites.weights, kept), [(0.1, 1.0), (0.3, 0.4), (0.6, 0.1), (1.0, 0.0)]
    return Report(sites, scheme, "A", "net", "knapsack", (limit,), seconds=0.2, curve=curve, point=(0.3, 0.4))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    save_page(search_page(report()), folder / "page.html")
    with Browser(folder / "page.html", folder / "profile") as found:
        yield found


def names(browser: Browser) -> list[str]:
    return browser.look("[...document.querySelector('table.sorts').tBodies[0].rows].map(row => row.cells[0].textContent)")


def by(key: object) -> list[str]:
    return sorted(WIDTHS, key=key)  # type: ignore[arg-type]


DENSITY = {name: Pattern(pattern).density for name, pattern in PATTERNS.items()} | {"stem.weight": 1.0}


@pytest.mark.parametrize(
    ("head", "ascending"),
    [
        ("site", by(lambda name: name)),
        ("shape", by(WIDTHS.__getitem__)),
        ("pattern", by(DENSITY.__getitem__)),
        ("weights kept", by(lambda name: WIDTHS[name] * DENSITY[name])),
    ],
)
def test_a_click_on_a_head_sorts(head: str, ascending: list[str], browser: Browser) -> None:
    element = f"[...{HEADS}].find(cell => cell.textContent === '{head}')"
    assert names(browser) == list(WIDTHS)
    for order, wanted in (("ascending", ascending), ("descending", ascending[::-1]), ("none", list(WIDTHS))):
        browser.click(element)
        assert browser.look(f"{element}.ariaSort") == order
        assert names(browser) == wanted


def test_the_keyboard_sorts_too(browser: Browser) -> None:
    browser.look(f"{HEADS}[0].focus()")
    for _ in range(3):
        browser.press("Enter", 13, "\r")
    assert names(browser) == list(WIDTHS)
    browser.press("Enter", 13, "\r")
    assert names(browser) == sorted(WIDTHS)
    for _ in range(2):
        browser.press("Enter", 13, "\r")


def test_a_bar_says_what_it_is_and_leads_to_its_row(browser: Browser) -> None:
    bars = "document.querySelectorAll(\"g[id^='density-site']\")"
    assert browser.look(f"{bars}.length") == len(WIDTHS)
    said = browser.look(f"[...{bars}].map(bar => bar.querySelector('title').textContent)")
    assert said[1] == f"body.0.weight: 8x256, 2:16, 12.5% kept, {256 / sum(WIDTHS.values()):.2%} of all weights"
    browser.click(f"{bars}[3]")
    assert browser.look("[...document.querySelectorAll('tr.found')].map(row => row.cells[0].textContent)") == ["body.2.weight"]
    top = browser.look("document.querySelector('tr.found').getBoundingClientRect().y")
    assert 0 < top < 900


def test_a_file_is_enough(browser: Browser) -> None:
    assert browser.complaints() == []
    assert browser.look("document.body.scrollWidth") <= browser.look("document.documentElement.clientWidth")


def test_it_can_be_printed(browser: Browser, tmp_path: Path) -> None:
    assert 1 <= browser.printed(tmp_path / "page.pdf") <= 3


def test_a_foreign_script_does_not_run(tmp_path: Path) -> None:
    page = search_page(report()).replace("<h1>", "<script>document.title = 'taken'</script><h1>", 1)
    save_page(page, tmp_path / "page.html")
    with Browser(tmp_path / "page.html", tmp_path / "profile") as browser:
        assert browser.look("document.title") == "net, knapsack"
        assert any("Content Security Policy" in said for said in browser.complaints())
        browser.click(f"{HEADS}[0]")
        assert names(browser) == sorted(WIDTHS)


def test_a_comparison_sorts_by_each_scheme(tmp_path: Path) -> None:
    other = replace(report(), label="B", scheme=Scheme({"stem.weight": "2:16"}))
    save_page(comparison_page([report(), other]), tmp_path / "page.html")
    with Browser(tmp_path / "page.html", tmp_path / "profile", dark=True) as browser:
        browser.click(f"{HEADS}[3]")
        assert names(browser)[0] == "stem.weight"
        assert browser.look("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"
        assert browser.complaints() == []


def test_three_hundred_sites_can_be_read(tmp_path: Path) -> None:
    made = report(300)
    save_page(search_page(made), tmp_path / "page.html")
    with Browser(tmp_path / "page.html", tmp_path / "profile") as browser:
        assert browser.look("document.querySelectorAll(\"g[id^='density-site']\").length") == 300
        widths = browser.look(
            "[...document.querySelectorAll(\"g[id^='density-site']\")].map(b => b.getBoundingClientRect().width)"
        )
        assert min(widths) > 1.5, "pixels: a bar can be seen, and met by a mouse"
        words = browser.look("[...document.querySelector('figure svg').querySelectorAll('text')].map(t => t.textContent)")
        assert set(short_names(stages_of(site.name for site in made.sites)).values()) <= set(words)
