"""Laws of the pages: well-formed, everything said, nothing fetched, nothing hostile let through."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nmfx.errors import NmfxError
from nmfx.models.site import Site, Sites
from nmfx.report.page import SCRIPT, comparison_page, save_page, search_page
from nmfx.report.record import Limit, Point, Report
from nmfx.scheme import Scheme
from nmfx.search.events import Event
from nmfx.sparsity.pattern import Pattern

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = '<script src="http://x.example/a.js">alert("&\')</script>'


class Reader(HTMLParser):
    """Checks that every tag is closed in turn; gathers elements, table cells and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def handle_decl(self, decl: str) -> None:
        assert decl == "DOCTYPE html"


def report(names: tuple[str, ...] = ("stem.weight", "body.0.weight", "body.1.weight", "head.weight")) -> Report:
    sites = Sites(tuple(Site(name, "linear", (8, 32), (8, 32, 1), 256, 1, 1024, ()) for name in names), model="net")
    scheme = Scheme(dict.fromkeys(names[1:], "2:16"))
    steps = [
        Event(name, Pattern.DENSE, Pattern("2:16"), f"because of {name}", 1000 - 224 * i) for i, name in enumerate(names[1:])
    ]
    limit = Limit("weights", 400, sites.weights, scheme.totals(sites).kept)
    reasons = {names[0]: f"kept dense by {names[0]!r}"}
    return Report(sites, scheme, "A", "net", "domino", (limit,), steps, reasons, 0.25, {"versions": "torch 1.2.3"})


def test_search_page_says_everything() -> None:
    made = report()
    page = search_page(made, [Point("a", 0.25, 0.9, 0.1)])
    read = Reader(page)
    head, *rows = read.rows[: 1 + len(made.sites)]
    assert head[0] == "site"
    assert [row[0] for row in rows] == [site.name for site in made.sites]
    for row, site in zip(rows, made.sites, strict=True):
        kept = f"{made.scheme.kept(site):,}"
        assert row[1:6] == ["linear", "8x32", str(made.scheme.get(site.name, "dense")), kept, "256"]
        assert row[8] == made.reasons.get(site.name, "")
    steps = read.rows[2 + len(made.sites) :]
    assert [row[1] for row in steps] == [step.site for step in made.steps]
    assert [tag for tag, _ in read.tags].count("svg") == 4
    assert "<details><summary>all 3 steps" in page
    for said in (
        "net, domino",
        "torch 1.2.3",
        "3 steps in 0.25 s",
        "400 of 1,024 weights",
        f"{made.totals.kept:,} of 1,024 kept",
    ):
        assert said in page


def test_comparison_page_says_everything() -> None:
    first = report()
    second = replace(first, label="B", scheme=Scheme({"stem.weight": "4:16"}), facts=first.facts)
    read = Reader(page := comparison_page([first, second]))
    assert [row[0] for row in read.rows[1:3]] == ["A", "B"]
    assert [row[0] for row in read.rows[4:]] == [site.name for site in first.sites]
    assert read.rows[4][2:] == ["dense", "4:16"]
    assert "4 of 4 sites differ" in page


@pytest.mark.parametrize("make", [search_page, lambda made: comparison_page([made, made])], ids=["search", "comparison"])
def test_nothing_is_fetched_and_only_our_script_runs(make: object) -> None:
    page = make(report())  # type: ignore[operator]
    read = Reader(page)
    assert re.findall(r"<script>(.*?)</script>", page, re.S) == [SCRIPT]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = next(attributes["content"] for _, attributes in read.tags if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith(f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';")
    page, read.tags = page.replace("http-equiv", ""), [one for one in read.tags if one != ("script", {})]
    assert "http" not in page
    assert "@import" not in page
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "image")
        assert not any(name.startswith("on") or name in ("src", "action") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)\)", page))


def test_ids_are_unique_and_references_meet_them() -> None:
    read = Reader(page := search_page(report()))
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in re.findall(r'(?:href="|url\()(#[^")]+)', page)} <= set(map(str, ids))


def test_hostile_names_are_text() -> None:
    names = (f"{HOSTILE}.weight", "a$b$.weight")
    made = replace(report(names), model=HOSTILE, method=HOSTILE, label=HOSTILE, facts={HOSTILE: HOSTILE})
    for page in (search_page(made, [Point(HOSTILE, 0.2, 0.3)]), comparison_page([made, made])):
        read = Reader(page)
        assert HOSTILE not in page
        assert [tag for tag, _ in read.tags].count("script") == 1
        assert any(row[0] == names[0] for row in read.rows if row)


def test_pages_are_the_same_twice_and_legible_in_the_dark() -> None:
    page = search_page(report())
    assert page == search_page(report())
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#1b1b1b" not in page.split("</style>", 1)[1]


def test_save_page(tmp_path: Path) -> None:
    save_page("<p>ä</p>", tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == "<p>ä</p>"
    with pytest.raises(NmfxError, match="exists already"):
        save_page("", tmp_path / "a.html", force=False)
    with pytest.raises(NmfxError, match=r"ends in \.html"):
        save_page("", tmp_path / "a.txt")
