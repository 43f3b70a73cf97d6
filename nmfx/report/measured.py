"""Figures of what was measured: accuracy against the share of weights kept, and speed against the best dense engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nmfx.report.canvas import DASHED, GREY, INK, OKABE_ITO, POINTS, new_figure, styled
from nmfx.report.record import Point, Speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def draw_accuracy(points: Sequence[Point], *, title: str = "", dense: float | None = None) -> Figure:
    """Measured accuracy against the share of weights kept, with error bars; `dense` is a line across."""
    from matplotlib.transforms import ScaledTranslation

    figure = new_figure(3.4, title)
    axes = figure.subplots()
    labels = list(dict.fromkeys(point.label for point in points))
    axes.margins(y=0.08)
    for index, label in enumerate(labels):
        mine = sorted((point for point in points if point.label == label), key=lambda point: point.kept)
        aside = ScaledTranslation(2.5 * (index - (len(labels) - 1) / 2) / POINTS, 0, figure.dpi_scale_trans)
        axes.errorbar(
            [100 * point.kept for point in mine],
            [100 * point.accuracy for point in mine],
            [100 * point.spread for point in mine],
            label=label,
            transform=axes.transData + aside,  # error bars at one budget stand side by side
            color=OKABE_ITO[index % len(OKABE_ITO)],
            marker="osD^vPX*hp"[index % 10],
            linestyle=("-", "--", ":")[index // 6 % 3],
            linewidth=1,
            markersize=4.5,
            markeredgecolor=INK,
            markeredgewidth=0.4,
            elinewidth=0.8,
            capsize=2.5,
        )
    axes.update_datalim([(100 * p.kept, 100 * (p.accuracy + s * p.spread)) for p in points for s in (-1, 1)])
    axes.autoscale_view()
    if dense is not None:
        axes.axhline(100 * dense, **DASHED, label="dense")
    shares = sorted({100 * point.kept for point in points})
    if len(shares) > 1 and shares[0] > 0 and shares[-1] / shares[0] >= 3:
        axes.set_xscale("log", base=2)
    if len(shares) <= 8:
        axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
        axes.xaxis.minorticks_off()
    axes.grid(color=GREY, alpha=0.35, linewidth=0.5)
    axes.set_xlabel("weights kept, %")
    axes.set_ylabel("accuracy, %")
    figure.legend(loc="outside right upper")
    return figure


@styled
def draw_speed(speeds: Sequence[Speed], *, title: str = "") -> Figure:
    """How fast each engine is against the best dense one, a group of bars for each batch size and number of threads."""
    groups, engines = (list(dict.fromkeys(values)) for values in ([s.group for s in speeds], [s.engine for s in speeds]))
    figure = new_figure(0.7 + 0.16 * len(speeds) + 0.3 * len(groups), title)
    axes = figure.subplots()
    labels, row = [], 0.0
    for group in groups:
        axes.annotate(group, (0, row), (2, 0), textcoords="offset points", va="center", weight="bold")
        row += 1
        for engine in engines:
            one = next((s for s in speeds if (s.group, s.engine) == (group, engine)), None)
            if one is None:
                continue
            index = engines.index(engine)
            ours = index == len(engines) - 1
            error = [[one.median - one.low], [one.high - one.median]]
            axes.barh(row, one.median, xerr=error, height=0.74, color=OKABE_ITO[0] if ours else GREY, ecolor=INK)
            axes.annotate(
                f"{one.median:.2f}x", (max(one.high, one.median), row), (3, 0), textcoords="offset points", va="center"
            )
            labels.append((row, engine))
            row += 1
        row += 0.5
    axes.axvline(1, **DASHED)
    axes.set_yticks([at for at, _ in labels], [name for _, name in labels])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(row - 0.5, -0.8)
    axes.set_xlim(0, 1.12 * max(max(s.high, s.median) for s in speeds))
    axes.set_xlabel("times as fast as the best dense engine (median; lines: slowest and fastest turn)")
    return figure
