"""Figures without pyplot: their style, their colours, the network laid along an axis, and how they are written."""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from nmfx.errors import NmfxError
from nmfx.files.atomic import write_atomic
from nmfx.report.record import short_names
from nmfx.sparsity.pattern import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
WIDTH = 7.0  # inches: a page between its margins
POINTS = 72  # an inch
INK, GREY = "#1b1b1b", "#8c8c8c"  # grey always with an alpha: legible on white and on black
DENSE = "#d55e00"  # Okabe-Ito vermilion: no colour of viridis
OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHED: dict[str, Any] = {"color": INK, "linewidth": 0.7, "linestyle": (0, (4, 3))}  # a limit, an average
LINE = 9.5  # points from one 8-point line to the next
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "hatch.linewidth": 0.5,
    "figure.titlesize": 9,
    "svg.hashsalt": "nmfx",  # or ids would be random
    "text.parse_math": False,  # names may hold dollar signs
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "hatch.color"), INK)

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def style(**more: Any) -> Iterator[None]:
    """Our style alone, whatever the user's matplotlibrc says; theirs comes back afterwards.

    Raises:
        NmfxError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise NmfxError("figures and pages need matplotlib: pip install 'nmfx[figures]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast("Any", STYLE | more))
        yield


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function in our style."""

    @wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return draw(*args, **kwargs)

    return run


def new_figure(height: float, title: str = "") -> Figure:
    """An empty figure of page width; `height` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    if title:
        figure.suptitle(textwrap.fill(title, 88, break_on_hyphens=False), x=0.01, ha="left", fontweight="bold")
    return figure


def check_path(path: Path) -> None:
    """Raise NmfxError unless a figure can be written under this name."""
    if path.suffix.lower() not in FORMATS:
        raise NmfxError(f"{path}: a figure is written as {', '.join(FORMATS)}, by the ending of its name")


def save_figure(figure: Figure, path: str | Path, *, force: bool = True) -> None:
    """Write a figure as PNG, SVG or PDF, by the suffix; the same figure gives the same file.

    Raises:
        NmfxError: another suffix, or `path` exists and `force` is false.
    """
    path = Path(path)
    check_path(path)
    kind = path.suffix.lower()[1:]
    metadata = {
        "png": {"Software": "nmfx"},
        "svg": {"Creator": "nmfx", "Date": None},
        "pdf": {"Creator": "nmfx", "Producer": None, "CreationDate": None},
    }[kind]
    with style():
        write_atomic(path, lambda draft: figure.savefig(draft, format=kind, metadata=metadata), force=force)


def inline_svg(figure: Figure, prefix: str, words: Mapping[str, str] | None = None) -> str:
    """A figure as an ``<svg>`` element for a page: text stays text, ink is the page's own, ids begin with `prefix`.

    Args:
        words: what is shown over elements, by their gid: the ``<title>`` that browsers show without a script.
    """
    content = io.StringIO()
    with style(**{"svg.fonttype": "none"}):
        figure.savefig(content, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = content.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", svg, count=3).replace("xlink:href", "href")
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    said = {f"{prefix}-{gid}": text for gid, text in (words or {}).items()}
    svg = re.sub(r'<g id="([^"]+)">', lambda g: g[0] + (f"<title>{escape(said[g[1]])}</title>" if g[1] in said else ""), svg)
    return svg.replace(INK, "currentColor").strip()


def color_of(pattern: Pattern) -> str:
    """Viridis by octaves of density from 1/32, so that a pattern has one colour in all figures; vermilion for dense."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if pattern.is_dense:
        return DENSE
    return to_hex(colormaps["viridis"](min(0.92, max(0.0, 1 + math.log2(pattern.density) / 5))))


def density_ticks(patterns: Iterable[Pattern]) -> dict[float, str]:
    """Densities to mark on a log axis, with the patterns that have them; those too near to a rounder one are left out."""
    named: dict[float, set[str]] = {}
    for pattern in patterns:
        named.setdefault(pattern.density, set()).add("dense" if pattern.is_dense else str(pattern))
    chosen: dict[float, str] = {}
    for density in sorted(named, key=lambda d: (not math.log2(d).is_integer(), d)):
        if all(abs(math.log2(density / other)) >= 0.5 for other in chosen):
            names = sorted(named[density], key=lambda name: int(name.partition(":")[2] or 0))
            chosen[density] = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
    return chosen


def set_density_axis(axes: Axes, patterns: Sequence[Pattern]) -> float:
    """A log2 y axis from half the smallest density to dense, its ticks the patterns; gives where it begins."""
    ticks = density_ticks([*patterns, Pattern.DENSE])
    floor = min(ticks) / 2
    axes.set_yscale("log", base=2)
    axes.set_ylim(floor, 1.08)
    labels = [f"{d:.3g}  {name}" if name != "dense" else name for d, name in ticks.items()]
    axes.set_yticks(list(ticks), labels)
    axes.yaxis.minorticks_off()
    axes.grid(axis="y", color=GREY, alpha=0.35, linewidth=0.5)
    return floor


def mark_stages(
    axes: Axes, stages: Sequence[str], edges: Sequence[float], *, along: str = "x", inches: float = 6.0, names: bool = True
) -> None:
    """Shade every other stage and write its name beside the axis; names that would touch move apart.

    Args:
        axes: whose `along` axis (``x`` or ``y``) the network lies on.
        stages: of every site.
        edges: where each site begins, and the last one ends.
        inches: length of the axis, about.
        names: False shades the stages and writes no names.
    """
    spans: list[tuple[str, float, float]] = []
    short, begin = short_names(stages), 0
    for stage, run in itertools.groupby(stages):
        end = begin + len(list(run))
        spans.append((short[stage], edges[begin], edges[end]))
        begin = end
    for _, begin_at, end_at in spans[1::2]:
        (axes.axvspan if along == "x" else axes.axhspan)(begin_at, end_at, color=GREY, alpha=0.12, linewidth=0, zorder=0)
    if names:
        _name_stages(axes, spans, along == "x", (edges[-1] - edges[0]) / (inches * POINTS))


def _name_stages(axes: Axes, spans: Sequence[tuple[str, float, float]], below: bool, per_point: float) -> None:
    """Names below the axis, upright where they would touch, or beside it; a short line leads from each stage to its name."""
    centres = [(a + b) / 2 for _, a, b in spans]
    widths = [(0.6 * 8 * len(name) + 6) * per_point for name, _, _ in spans]
    apart = zip(itertools.pairwise(centres), itertools.pairwise(widths), strict=True)
    flat = not below or all(b - a >= (u + v) / 2 for (a, b), (u, v) in apart)
    places = centres if below and flat else space_out(centres, LINE * per_point)
    transform = axes.get_xaxis_transform() if below else axes.get_yaxis_transform()
    for (name, _, _), centre, place in zip(spans, centres, places, strict=True):
        axes.annotate(
            name,
            (centre, 0) if below else (0, centre),
            (place, -0.03 if flat else -0.045) if below else (-0.02, place),
            xycoords=transform,
            textcoords=transform,
            ha="center" if below else "right",
            va="top" if below else "center",
            rotation=0 if flat else 90,
            arrowprops={
                "arrowstyle": "-",
                "color": INK,
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0.5, 1) if below else (1, 0.5),
            },
            annotation_clip=False,
        )


def space_out(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to `wanted` (ascending) that are at least `gap` apart: isotonic regression, by pooling."""
    pools: list[tuple[float, int]] = []  # mean of what is left when the gaps are taken off, and how many share it
    for index, place in enumerate(wanted):
        pools.append((place - index * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, count_a), (b, count_b) = pools[-2:]
            pools[-2:] = [((a * count_a + b * count_b) / (count_a + count_b), count_a + count_b)]
    levels = [mean for mean, count in pools for _ in range(count)]
    return [level + index * gap for index, level in enumerate(levels)]


def note_beside(axes: Axes, y: float, words: str) -> None:
    """Words to the right of the axes, at the height `y` of their data."""
    axes.annotate(words, (1, y), (3, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", va="center")
