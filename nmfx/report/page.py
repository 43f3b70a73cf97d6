"""One self-contained HTML file: figures as inline SVG, tables as HTML, nothing fetched from anywhere.

One script of ours sorts tables and leads from a bar to its row; its digest is in the page's content security policy, so that
a browser runs no other, whatever a model or a file is called. Without scripts everything is there, in network order.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from nmfx.errors import NmfxError
from nmfx.files.atomic import write_text
from nmfx.models.site import Site
from nmfx.report.canvas import inline_svg
from nmfx.report.figures import SITE, draw_comparison, draw_curve, draw_density, draw_stages, draw_timeline
from nmfx.report.measured import draw_accuracy
from nmfx.report.record import Point, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5c5c; --paper: #fff; --line: #d5d5d5; --band: #f5f5f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e3; --soft: #a8a5a0; --paper: #17181a; --line: #3a3c40; --band: #202225; }
}
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p, dl { margin: .3rem 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; }
dt, footer, th { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 36rem; height: auto; fill: currentColor; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .7rem .18rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
td.n, th.n { text-align: right; }
td.w { white-space: normal; min-width: 11rem; }
tbody tr:nth-child(even) { background: var(--band); }
tr.differs td { font-weight: 600; }
summary { cursor: pointer; }
footer { margin-top: 2.5rem; font-size: .85rem; }
th[aria-sort] { cursor: pointer; }
th[aria-sort]:hover, th[aria-sort]:focus-visible { color: var(--ink); text-decoration: underline; outline: none; }
th[aria-sort="ascending"]::after { content: " \\2191"; }
th[aria-sort="descending"]::after { content: " \\2193"; }
g[id*="-site"] { cursor: pointer; }
g[id*="-site"]:hover { opacity: .65; }
tr.found td { outline: 2px solid var(--soft); outline-offset: -1px; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --band: #fff; }
  body { margin: 0; max-width: none; font-size: 10pt; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  thead { display: table-header-group; }
  .scroll, figure { overflow: visible; }
  svg { min-width: 0; }
  table { font-size: 8pt; }
  td, th { padding-right: .4rem; }
  th[aria-sort]::after { content: none; }
  tr.found td { outline: none; }
}
@page { margin: 15mm; }
"""
SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => row.cells[i].dataset.v === undefined ? row.cells[i].textContent : Number(row.cells[i].dataset.v);
  const sort = (head) => {
    const i = heads.indexOf(head), before = head.ariaSort;
    const after = before === "none" ? "ascending" : before === "ascending" ? "descending" : "none";
    for (const other of heads) other.ariaSort = "none";
    head.ariaSort = after;
    const sign = after === "descending" ? -1 : 1, sorted = [...rows];
    if (after !== "none") sorted.sort((a, b) => {
      const x = value(a, i), y = value(b, i);
      if (typeof x === typeof y) return sign * (typeof x === "number" ? x - y : x.localeCompare(y, "en", {numeric: true}));
      return typeof x === "number" ? -1 : 1;
    });
    body.append(...sorted);
  };
  for (const head of heads) {
    head.ariaSort = "none";
    head.tabIndex = 0;
    head.title = "sort; a third time: network order";
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(head); }
    });
  }
}
for (const bar of document.querySelectorAll("g[id*='-site']")) {
  const row = document.getElementById("row" + bar.id.replace(/.*-site/, ""));
  if (row) bar.addEventListener("click", () => {
    for (const other of document.querySelectorAll("tr.found")) other.classList.remove("found");
    row.classList.add("found");
    row.scrollIntoView({block: "center"});
  });
}
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
"""


def search_page(report: Report, points: Sequence[Point] = ()) -> str:
    """The page of one scheme: what was asked and found, figures, every site, every step.

    Args:
        points: measured accuracies, drawn against the share of weights kept.
    """
    totals = report.totals
    facts = {
        "weights": f"{totals.kept:,} of {totals.weights:,} kept, sparsity {totals.sparsity:.4%}",
        "MACs": f"{totals.kept_macs:,} of {totals.macs:,} kept, sparsity {totals.mac_sparsity:.4%}",
    }
    for limit in report.limits:
        left = f"{limit.limit:,} of {limit.dense:,} {limit.unit}, {limit.limit - limit.used:,} left"
        facts["budget" if limit is report.limits[0] else f"and {limit.unit}"] = left
    facts |= {"method": report.method} if report.method else {}
    took = f"{len(report.steps)} steps in" if report.steps else "decided at once, in"
    facts |= {"search": f"{took} {report.seconds:.2f} s"} if report.seconds is not None else {}
    words = {f"{SITE}{index}": _words(report, site) for index, site in enumerate(report.sites)}
    parts = [_facts({**facts, **report.facts}), _figure("Density of each site", draw_density(report), "density", words)]
    if report.steps:
        parts.append(_figure("Which site stepped when", draw_timeline(report), "timeline"))
    if report.curve:
        parts.append(_figure("Least loss at each budget", draw_curve(report), "curve"))
    parts.append(_figure("Kept by stage", draw_stages(report), "stages"))
    parts += [_figure("Accuracy, measured", draw_accuracy(points), "accuracy")] if points else []
    head = ("site", "operation", "shape", "pattern", "weights kept", "of", "MACs kept", "of", "why")
    rows = [_site_row(report, site) for site in report.sites]
    parts.append(f"<h2>{len(report.sites)} sites</h2>{_table(head, rows, numbers=(3, 4, 5, 6, 7), wide=(8,), name='row')}")
    if report.steps:
        steps = [
            (f"{number}", step.site, f"{step.before} → {step.after}", f"{step.cost:,}", step.reason)
            for number, step in enumerate(report.steps, 1)
        ]
        table = _table(("step", "site", "pattern", "cost", "why"), steps, numbers=(0, 3), wide=(4,))
        parts.append(f"<h2>Steps</h2><details><summary>all {len(steps)} steps</summary>{table}</details>")
    return _document(", ".join(filter(None, (report.model, report.method or report.label))), parts)


def comparison_page(reports: Sequence[Report]) -> str:
    """The page of several schemes for one network: side by side, with their totals and each site's patterns."""
    first = reports[0]
    totals = [
        (
            report.label,
            f"{report.totals.kept:,}",
            f"{report.totals.sparsity:.4%}",
            f"{report.totals.kept_macs:,}",
            f"{report.totals.mac_sparsity:.4%}",
            f"{len(report.scheme)}",
            *report.facts.values(),
        )
        for report in reports
    ]
    head = ("scheme", "weights kept", "sparsity", "MACs kept", "MAC sparsity", "sparse sites", *first.facts)
    parts = [_table(head, totals, numbers=range(1, len(head)))]
    parts.append(_figure("Density of each site", draw_comparison(reports), "comparison"))
    rows = [
        (site.name, "x".join(map(str, site.shape)), *(str(report.scheme.get(site.name, "dense")) for report in reports))
        for site in first.sites
    ]
    differ = {index for index, row in enumerate(rows) if len(set(row[2:])) > 1}
    table = _table(
        ("site", "shape", *(report.label for report in reports)),
        rows,
        numbers=range(2, 2 + len(reports)),
        bold=differ,
        name="row",
    )
    parts.append(f"<h2>{len(differ)} of {len(rows)} sites differ</h2>{table}")
    return _document(f"{first.model}: {len(reports)} schemes", parts)


def check_page(path: Path) -> None:
    """Raise NmfxError unless a page can be written under this name."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise NmfxError(f"{path}: a page's name ends in .html")


def save_page(page: str, path: str | Path, *, force: bool = True) -> None:
    """Write a page (text of HTML) as a file.

    Raises:
        NmfxError: the name does not end in .html, or `path` exists and `force` is false.
    """
    path = Path(path)
    check_page(path)
    write_text(path, page, force=force)


def _document(title: str, parts: Iterable[str]) -> str:
    name = escape(title)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{name}</title><style>{CSS}</style>'
    )
    foot = "<footer>Made by nmfx. A pattern N:M keeps N weights of every M; one multiply-add is one MAC, per sample.</footer>"
    body = "\n".join((f"<h1>{name}</h1>", *parts, foot))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def _facts(facts: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(key)}</dt><dd>{escape(value)}</dd>' for key, value in facts.items())}</dl>"


def _words(report: Report, site: Site) -> str:
    """What is shown over a site's bar: its name, shape, pattern and share of all weights."""
    pattern, shape = report.scheme.get(site.name, "dense"), "x".join(map(str, site.shape))
    share = f"{site.weights / report.totals.weights:.2%} of all weights"
    return f"{site.name}: {shape}, {pattern}, {report.density(site):.1%} kept, {share}"


def _figure(title: str, figure: Figure, name: str, words: Mapping[str, str] | None = None) -> str:
    said = escape(figure.get_suptitle() or title)
    figure.suptitle("")  # the page says it already
    return f'<h2>{escape(title)}</h2>\n<figure role="img" aria-label="{said}">{inline_svg(figure, name, words)}</figure>'


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Iterable[int] = (),
    wide: Iterable[int] = (),
    bold: Iterable[int] = (),
    name: str = "",
) -> str:
    """A table of text cells; columns of `numbers` to the right, `wide` ones may wrap, `bold` rows stand out. One with a `name`
    can be sorted, and its rows have ids: the name and their number.
    """
    kinds = dict.fromkeys(numbers, ' class="n"') | dict.fromkeys(wide, ' class="w"')
    strong = set(bold)
    lines = []
    for number, row in enumerate(rows):
        values = [f' data-v="{key:.12g}"' if name and (key := _sort_key(cell)) is not None else "" for cell in row]
        cells = "".join(f"<td{kinds.get(i, '')}{values[i]}>{escape(cell)}</td>" for i, cell in enumerate(row))
        known = f' id="{name}{number}"' if name else ""
        known += ' class="differs"' if number in strong else ""
        lines.append(f"<tr{known}>{cells}</tr>")
    top = "".join(f"<th{kinds.get(i, '')}>{escape(cell)}</th>" for i, cell in enumerate(head))
    body = "\n".join(lines)
    sorts = ' class="sorts"' if name else ""
    return f'<div class="scroll"><table{sorts}><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _sort_key(cell: str) -> float | None:
    """What a cell is sorted by: a number, the density of a pattern, the size of a shape; None: its letters."""
    if cell == "dense":
        return 1.0
    if found := re.fullmatch(r"(\d+):(\d+)(x\d+)?", cell):
        return int(found[1]) / int(found[2])
    if re.fullmatch(r"\d+(x\d+)*", cell):
        return float(math.prod(map(int, cell.split("x"))))
    return float(cell.replace(",", "")) if re.fullmatch(r"\d{1,3}(,\d{3})+", cell) else None


def _site_row(report: Report, site: Site) -> tuple[str, ...]:
    kept = report.scheme.kept(site)
    return (
        site.name,
        site.kind,
        "x".join(map(str, site.shape)),
        str(report.scheme.get(site.name, "dense")),
        f"{kept:,}",
        f"{site.weights:,}",
        f"{site.macs * kept // site.weights:,}",
        f"{site.macs:,}",
        report.reasons.get(site.name, ""),
    )
