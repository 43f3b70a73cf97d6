"""Records as tables: sites, schemes, totals."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from nmfx.models.site import Sites
from nmfx.scheme import Scheme, Totals
from nmfx.text import count

SHORT = {"conv2d": "conv", "conv_transpose2d": "convT", "conv1d": "conv1d", "linear": "linear"}


class FittingTable(Table):
    """A table that leaves columns out, the last of `spare` first, rather than break names where the terminal is narrow."""

    def __init__(self, *spare: str) -> None:
        super().__init__(box=None, pad_edge=False, header_style="bold", show_edge=False)
        self.spare = spare

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, and a line on the columns for which there is no room."""
        shown, left_out = copy(self), list[str]()
        for name in reversed(self.spare):
            if Measurement.get(console, options.update(max_width=10_000), shown.plain()).maximum <= options.max_width:
                break
            kept = [column for column in shown.columns if column.header != name]
            shown.columns = [replace(column, _index=index) for index, column in enumerate(kept)]
            left_out.insert(0, name)
        yield from Table.__rich_console__(shown, console, options)
        if left_out:
            yield Text(f"no room for: {', '.join(left_out)}", "dim")

    def plain(self) -> Table:
        """Its columns as an ordinary table, whose width can be measured."""
        result = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
        result.columns, result.rows = self.columns, self.rows
        return result


def table(*columns: str) -> FittingTable:
    """An empty table: a column a word, to the right where that ends in ``>``, folded instead of cut where it ends in ``~``, and
    left out where there is no room where it ends in ``?``, the last such one first.
    """
    result = FittingTable(*(column.rstrip(">~?") for column in columns if column.endswith("?")))
    for column in columns:
        fold, word = "~" in column[-2:], column.rstrip("?")
        result.add_column(
            word.rstrip(">~"),
            justify="right" if word.endswith(">") else "left",
            no_wrap=not fold,
            overflow="fold" if fold else "ellipsis",
        )
    return result


def site_table(sites: Sites, scheme: Scheme, reasons: Mapping[str, str]) -> Table:
    """One row a site: name, shape, pattern, MACs, and its share of all weights."""
    result = table("site~", "shape?", "pattern>", "MACs>?", "of weights>?")
    for site in sites:
        shape = "x".join(map(str, site.shape))
        pattern = Text(str(scheme[site.name]), "green") if site.name in scheme else Text("dense", "dim")
        if site.name in reasons and site.name not in scheme:
            pattern.append("*", "yellow")
        macs = count(site.macs) if site.macs else ("train" if site.train_only else "0")
        share = f"{site.weights / sites.weights:.1%}"
        result.add_row(site.name, f"{shape} {SHORT.get(site.kind, site.kind)}", pattern, macs, share)
    return result


def scheme_bars(sites: Sites, scheme: Scheme, width: int) -> Table:
    """The scheme as a picture: one bar a site, its length the share of weights kept."""
    cells, result = 16 if width < 100 else 32, table("site~", "pattern>", "kept", "weights>?", "MACs>?")
    for site in sites:
        kept = scheme.kept(site)
        density = kept / site.weights
        filled = max(1, round(density * cells))
        bar = Text("█" * filled, "green" if site.name in scheme else "cyan") + Text("░" * (cells - filled), "dim")
        pattern = str(scheme.get(site.name, "dense"))
        result.add_row(site.name, pattern, bar, count(kept), count(site.macs * density))
    return result


def reasons_list(reasons: Mapping[str, str], title: str) -> RenderableType:
    """Names grouped under each reason, a few of them spelt out."""
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    lines = [Text(title, "bold")]
    for reason, names in grouped.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(Text.assemble(f"  {len(names):>3}  ", (reason, "yellow"), f": {shown}"))
    return Group(*lines)


def totals_table(totals: Totals) -> Table:
    """Weights and MACs, dense and kept."""
    result = table("", "dense>", "kept>", "sparsity>", "times fewer>")
    rows = (("weights", totals.weights, totals.kept), ("MACs", totals.macs, totals.kept_macs))
    for name, dense, kept in rows:
        sparsity = 1 - kept / dense if dense else 0.0
        result.add_row(name, f"{dense:,}", f"{kept:,}", f"{sparsity:.4%}", f"{dense / kept:.2f}x" if kept else "-")
    return result


def start_line(start: Scheme, sites: Sites) -> str:
    """What a network keeps that was compressed before, and what that means for a search."""
    totals, counts = start.totals(sites), start.counts(sites)
    return f"{counts}, sparsity {totals.sparsity:.4f} ({totals.mac_sparsity:.4f} of MACs); no search makes a site denser"
