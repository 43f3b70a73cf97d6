"""The timeline of a search: which site stepped when, and what the scheme costs after each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nmfx.report.canvas import DASHED, INK, LINE, POINTS, color_of, mark_stages, note_beside
from nmfx.report.record import Report, stages_of
from nmfx.sparsity.pattern import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase


def plot_timeline(figure: FigureBase, report: Report, *, named: bool) -> None:
    """Cost above; below, each site's line in the colour of the pattern it has, and a mark where it changes."""
    rows = len(report.sites)
    inches = rows * LINE / POINTS if named else 3.0 if figure.get_figure() is not figure else 6.0
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=[0.75, max(1.2, inches)])
    index = {site.name: row for row, site in enumerate(report.sites)}
    _cost(top, report)
    current = dict.fromkeys(index, (0, Pattern.DENSE))
    lines: dict[Pattern, list[tuple[int, float, float]]] = {}
    last = len(report.steps) + 0.5
    for number, step in enumerate(report.steps, 1):
        since, _ = current[step.site]
        lines.setdefault(step.before, []).append((index[step.site], since, number))
        current[step.site] = number, step.after
    for name, (since, pattern) in current.items():
        lines.setdefault(pattern, []).append((index[name], since, last))
    room = inches * POINTS / rows
    apart = room > 3.5  # finer lines would only flicker: those fill their rows
    thick = min(3.0, room / 2) if apart else room
    for pattern, spans in lines.items():
        y, begin, end = zip(*spans, strict=True)
        main.hlines(
            y,
            begin,
            end,
            color=color_of(pattern),
            linewidth=thick,
            alpha=0.3 if pattern.is_dense else 1,
            capstyle="butt",
            antialiased=apart,
        )
    patterns = sorted({step.after for step in report.steps}, key=lambda p: p.order)
    size = max(4.0, min(22.0, room**2 / 2))
    for pattern in patterns:
        for up, marker in ((False, "o"), (True, "^")):
            at = [
                (number, index[step.site])
                for number, step in enumerate(report.steps, 1)
                if step.after == pattern and (step.after.density > step.before.density) == up
            ]
            if at:
                x, y = zip(*at, strict=True)
                main.scatter(
                    x,
                    y,
                    size,
                    color_of(pattern),
                    marker=marker,
                    edgecolors=INK,
                    linewidths=0.4,
                    zorder=3,
                    clip_on=False,
                )
    main.set_ylim(rows - 0.5, -0.5)
    main.set_xlim(0, last)
    main.xaxis.get_major_locator().set_params(integer=True)
    main.set_xlabel("step")
    stages = stages_of(index)
    edges = [row - 0.5 for row in range(rows + 1)]
    if named:
        main.set_yticks(range(rows), [name.removesuffix(".weight") for name in index])
        main.tick_params(axis="y", length=0)
    else:
        main.set_yticks([])
        mark_stages(main, stages, edges, along="y", inches=inches)
    _legend(figure, report, patterns)


def _cost(axes: Axes, report: Report) -> None:
    """What the scheme costs after each step, falling to the budget."""
    if not report.limits:
        axes.set_visible(False)
        return
    limit = report.limits[0]
    costs = [limit.dense, *(step.cost for step in report.steps)]
    axes.step(range(len(costs)), [cost / limit.dense for cost in costs], where="post", color=INK, linewidth=1)
    axes.axhline(limit.limit / limit.dense, **DASHED)
    axes.set_ylim(0, 1.03)
    axes.set_yticks([0, 0.5, 1])
    note_beside(axes, limit.limit / limit.dense, f"budget\n{limit.limit / limit.dense:.3g}")
    axes.set_title(f"share of {limit.unit} kept after each step")
    axes.tick_params(axis="x", labelbottom=False)


def _legend(figure: FigureBase, report: Report, patterns: Sequence[Pattern]) -> None:
    from matplotlib.lines import Line2D

    mark: dict[str, Any] = {"linestyle": "", "markeredgecolor": INK, "markeredgewidth": 0.4, "markersize": 5}
    handles = [Line2D([], [], color=color_of(p), marker="o", label="dense" if p.is_dense else str(p), **mark) for p in patterns]
    handles.insert(0, Line2D([], [], color=color_of(Pattern.DENSE), linewidth=3, alpha=0.3, label="still dense"))
    if any(step.after.density > step.before.density for step in report.steps):
        handles.append(Line2D([], [], color="none", marker="^", label="grown back", **mark))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(9, len(handles)), columnspacing=1.4, handletextpad=0.4)
