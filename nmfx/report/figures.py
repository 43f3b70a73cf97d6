"""The figures of schemes: density along the network, the search's timeline, what each stage keeps, schemes side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

from nmfx.models.site import Site
from nmfx.report.canvas import (
    DASHED,
    GREY,
    INK,
    LINE,
    OKABE_ITO,
    POINTS,
    WIDTH,
    color_of,
    mark_stages,
    new_figure,
    note_beside,
    set_density_axis,
    styled,
)
from nmfx.report.record import Report, short_names, stages_of
from nmfx.report.timeline import plot_timeline
from nmfx.sparsity.pattern import Pattern
from nmfx.text import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

Width = Literal["uniform", "weights", "macs"]
FEW = int((WIDTH - 1) * POINTS / LINE)  # sites whose names fit below an axis
LETTER = 0.075  # inches of an 8-point letter, about
SITE = "site"  # with a number: the gid of a site's bar
ROWS = 60  # sites whose names fit beside one
WIDTHS: dict[str, Callable[[Site], int]] = {
    "uniform": lambda site: 1,
    "weights": lambda site: site.weights,
    "macs": lambda site: site.macs,
}


@styled
def draw_search(report: Report) -> Figure:
    """One page: density per site, the timeline of steps or the curve of an exact method, and what each stage keeps."""
    parts: list[tuple[float, Callable[[FigureBase, Report], None]]] = [(_density_height(report), _density)]
    if report.steps:
        parts.append((4.2, lambda frame, report: plot_timeline(frame, report, named=len(report.sites) <= 20)))
    if report.curve:
        parts.append((2.6, _curve))
    parts.append((_stages_height(report), _stages))
    figure = new_figure(sum(height for height, _ in parts) + 0.35, report.title)
    frames = figure.subfigures(len(parts), height_ratios=[height for height, _ in parts], squeeze=False)[:, 0]
    for frame, (_, draw) in zip(frames, parts, strict=True):
        draw(frame, report)
    return figure


@styled
def draw_density(report: Report, *, width: Width = "uniform") -> Figure:
    """Density of each site along the network, in network order; dense sites in another colour, and hatched.

    Args:
        width: of a bar: all the same, or as the site's weights or MACs are.
    """
    figure = new_figure(_density_height(report) + 0.35, report.title)
    _density(figure, report, width)
    return figure


@styled
def draw_timeline(report: Report) -> Figure:
    """Which site stepped when: a line per site, a mark per step in the colour of the new pattern; above, the cost."""
    rows = len(report.sites)
    named = rows <= ROWS
    figure = new_figure(2.0 + (max(1.2, rows * LINE / POINTS) if named else 6.0), report.title)
    plot_timeline(figure, report, named=named)
    return figure


@styled
def draw_curve(report: Report) -> Figure:
    """The least loss against the budget, and where this scheme is on it."""
    figure = new_figure(2.95, report.title)
    _curve(figure, report)
    return figure


@styled
def draw_stages(report: Report) -> Figure:
    """Weights and MACs of each stage of the network, kept and dropped."""
    figure = new_figure(_stages_height(report) + 0.35, report.title)
    _stages(figure, report)
    return figure


@styled
def draw_comparison(reports: Sequence[Report]) -> Figure:
    """Schemes for one network, one above the other: density per site, and shares of weights and MACs kept in all."""
    first = reports[0]
    stages = stages_of(site.name for site in first.sites)
    below = 0.3 + LETTER * max(map(len, short_names(stages).values()))
    title = f"{first.model}: {len(reports)} schemes, share of the weights kept at each of {len(first.sites)} sites"
    figure = new_figure(0.4 + 1.2 * len(reports) + below, title)
    grid = figure.subplots(len(reports), 2, width_ratios=[4.6, 1], sharex="col", squeeze=False)
    patterns = [report.pattern(site) for report in reports for site in report.sites]
    for (left, right), report in zip(grid, reports, strict=True):
        edges = _bars(left, report, patterns)
        left.set_title(textwrap.shorten(report.label, 80))
        left.set_xticks([])
        mark_stages(left, stages, edges, inches=4.6, names=left is grid[-1, 0])
        _total_bars(right, report)
    grid[-1, 1].set_xlabel("% kept")
    return figure


def _density_height(report: Report) -> float:
    names = [site.name for site in report.sites]
    few = len(names) <= FEW
    labels = map(_brief, names) if few else short_names(stages_of(names)).values()
    return 2.3 + LETTER * max(map(len, labels), default=0)


def _density(figure: FigureBase, report: Report, width: Width = "uniform") -> None:
    axes = figure.subplots()
    edges = _bars(axes, report, [report.pattern(site) for site in report.sites], width, named=True)
    stages = stages_of(site.name for site in report.sites)
    if len(report.sites) <= FEW and width == "uniform":
        axes.set_xticks(_centres(edges), [_brief(site.name) for site in report.sites], rotation=90)
        axes.tick_params(axis="x", length=0)
        mark_stages(axes, stages, edges, names=False)
    else:
        axes.set_xticks([])
        mark_stages(axes, stages, edges)
    axes.set_ylabel("share of weights kept")
    overall = report.totals.kept / (report.totals.weights or 1)
    axes.axhline(overall, **DASHED)
    note_beside(axes, overall, f"{overall:.3g}\nof all")
    said = "" if width == "uniform" else f", width as {'MACs' if width == 'macs' else width}"
    axes.set_title(f"{len(report.sites)} sites in network order{said}; hatched: dense")


def _bars(
    axes: Axes, report: Report, patterns: Sequence[Pattern], width: Width = "uniform", *, named: bool = False
) -> list[float]:
    """One bar a site, from the floor of the axis to its density, with a gid where they are `named`; gives the bars' edges."""
    sizes = [WIDTHS[width](site) for site in report.sites]
    edges = [0.0, *map(float, accumulate(sizes))]
    floor = set_density_axis(axes, patterns)
    share = 0.86 if len(sizes) <= 100 else 1.0
    bars = axes.bar(
        _centres(edges),
        [report.density(site) - floor for site in report.sites],
        [size * share for size in sizes],
        bottom=floor,
        color=[color_of(report.pattern(site)) for site in report.sites],
        linewidth=0,
    )
    for index, (bar, site) in enumerate(zip(bars, report.sites, strict=True)):
        bar.set_gid(f"{SITE}{index}" if named else None)
        if report.pattern(site).is_dense:
            bar.set_hatch("////")
    axes.set_xlim(edges[0], edges[-1] or 1)
    return edges


def _curve(figure: FigureBase, report: Report) -> None:
    axes = figure.subplots()
    shares, losses = zip(*report.curve, strict=True)
    axes.plot(shares, losses, color=OKABE_ITO[0], linewidth=1.2, label="least loss at each budget")
    if report.point is not None:
        axes.plot(*report.point, color=OKABE_ITO[5], marker="o", markersize=6, markeredgecolor=INK, markeredgewidth=0.4)
        axes.annotate("this scheme", report.point, (7, 4), textcoords="offset points")
    unit = report.limits[0].unit if report.limits else "weights"
    if report.limits:
        axes.axvline(report.limits[0].limit / report.limits[0].dense, **DASHED)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel(f"share of {unit} kept (dashed: the budget)")
    axes.set_ylabel("summed loss")
    axes.set_title("the least summed loss at each budget, as a share of the sparsest scheme's")


def _stages_height(report: Report) -> float:
    rows = len(set(stages_of(site.name for site in report.sites)))
    return 0.75 + (0.2 if rows < 9 else 0.165) * rows


def _stages(figure: FigureBase, report: Report) -> None:
    names = stages_of(site.name for site in report.sites)
    rows = list(dict.fromkeys(names))
    labels = list(short_names(rows).values())
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, unit, size in ((left, "weights", WIDTHS["weights"]), (right, "MACs", WIDTHS["macs"])):
        dense, kept = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0)
        for site, stage in zip(report.sites, names, strict=True):
            dense[stage] += size(site)
            kept[stage] += size(site) * report.scheme.kept(site) // site.weights
        axes.barh(labels, list(kept.values()), color=OKABE_ITO[0], height=0.72, label="kept")
        dropped = [dense[stage] - kept[stage] for stage in rows]
        axes.barh(labels, dropped, left=list(kept.values()), color=GREY, alpha=0.35, height=0.72, label="dropped")
        most = max(dense.values(), default=1) or 1
        for row, stage in enumerate(rows):
            text = f"{count(kept[stage])} of {count(dense[stage])}"
            axes.annotate(text, (dense[stage], row), (3, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, most * 1.5)
        axes.set_title(f"{unit}: {count(sum(kept.values()))} of {count(sum(dense.values()))} kept")
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    left.set_ylim(len(rows) - 0.4, -0.6)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _total_bars(axes: Axes, report: Report) -> None:
    totals = report.totals
    shares = [100 * (1 - totals.sparsity), 100 * (1 - totals.mac_sparsity)]
    axes.barh(["weights", "MACs"], shares, color=[OKABE_ITO[0], OKABE_ITO[5]], height=0.6)
    for row, share in enumerate(shares):
        axes.annotate(f"{share:.1f}", (share, row), (2, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 50, 100])
    axes.set_ylim(1.6, -0.6)
    axes.tick_params(axis="y", length=0)


def _centres(edges: Sequence[float]) -> list[float]:
    return [(a + b) / 2 for a, b in pairwise(edges)]


def _brief(name: str) -> str:
    return name.removesuffix(".weight")
