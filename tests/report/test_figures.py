"""Laws of the figures: one mark a site and a step, at the right height; text that does not touch; the same file twice."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure

from nmfx.errors import NmfxError
from nmfx.models.site import Site, Sites
from nmfx.report import figures
from nmfx.report.canvas import color_of, density_ticks, save_figure, space_out
from nmfx.report.measured import draw_accuracy
from nmfx.report.record import Limit, Point, Report, short_names, stages_of
from nmfx.scheme import Scheme
from nmfx.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Move:
    """A step of a search that was not run."""

    site: str
    before: Pattern
    after: Pattern
    cost: int
    reason: str = "tipped"
    time: float = 0.0


def network(count: int) -> Sites:
    """`count` linears of 32x64 in stages of 9."""
    names = [f"stage{i // 9}.{i % 9}.weight" for i in range(count)]
    sites = (Site(name, "linear", (32, 64), (32, 64, 1), 2048 * (1 + i), 1, 8192, ()) for i, name in enumerate(names))
    return Sites(tuple(sites), model="net")


def report(count: int = 5, patterns: tuple[str, ...] = ("1:16", "2:16", "4:16", "1:1", "8:16")) -> Report:
    """Every site steps down through 8:16 to its pattern; the last step grows one back."""
    sites = network(count)
    chosen = {site.name: Pattern(patterns[i % len(patterns)]) for i, site in enumerate(sites)}
    steps, cost = [], sites.weights
    for name, pattern in chosen.items():
        if not pattern.is_dense:
            cost -= 100
            steps.append(Move(name, Pattern.DENSE, Pattern("8:16"), cost))
    steps.append(Move(sites.sites[0].name, Pattern("8:16"), Pattern("1:32"), cost - 50))
    steps.append(Move(sites.sites[0].name, Pattern("1:32"), Pattern("1:16"), cost))
    limit = Limit("weights", cost + 7, sites.weights, cost)
    return Report(sites, Scheme(chosen), "A", "net", "domino", (limit,), steps, seconds=0.5)


DRAWINGS = {
    "search": figures.draw_search,
    "density": figures.draw_density,
    "timeline": figures.draw_timeline,
    "stages": figures.draw_stages,
    "comparison": lambda r: figures.draw_comparison([r, r, r]),
    "accuracy": lambda r: draw_accuracy([Point("a", 0.25, 0.9, 0.01), Point("b", 0.25, 0.8)], dense=0.95),
}


@pytest.mark.parametrize("count", [1, 5, 54, 300])
@pytest.mark.parametrize("width", ["uniform", "weights", "macs"])
def test_density_has_one_bar_a_site_up_to_its_density(count: int, width: figures.Width) -> None:
    made = report(count)
    (axes,) = figures.draw_density(made, width=width).axes
    (bars,) = axes.containers
    assert len(bars) == count
    sizes = {"uniform": lambda s: 1, "weights": lambda s: s.weights, "macs": lambda s: s.macs}
    total = sum(map(sizes[width], made.sites))
    for bar, site in zip(bars, made.sites, strict=True):
        assert bar.get_y() + bar.get_height() == pytest.approx(made.pattern(site).density)
        assert matplotlib.colors.to_hex(bar.get_facecolor()) == color_of(made.pattern(site))
        assert bool(bar.get_hatch()) == made.pattern(site).is_dense
        assert bar.get_width() / total == pytest.approx(sizes[width](site) / total, rel=0.2)
    assert axes.get_yscale() == "log"
    assert [label.get_text() for label in axes.get_yticklabels()].count("dense") == 1
    assert axes.get_xlim() == (0, total)


@pytest.mark.parametrize("count", [1, 5, 54, 300])
def test_timeline_has_one_mark_a_step_and_a_line_from_first_to_last(count: int) -> None:
    made = report(count)
    top, main = figures.draw_timeline(made).axes
    marks = [tuple(map(float, at)) for group in main.collections if len(group.get_offsets()) for at in group.get_offsets()]
    row = {site.name: float(i) for i, site in enumerate(made.sites)}
    points = [(x, y) for x, y in marks if (x, y) != (0.0, 0.0)]
    assert sorted(points) == [(float(i), row[step.site]) for i, step in enumerate(made.steps, 1)]
    spans = [
        (segment[0][1], segment[0][0], segment[1][0])
        for lines in main.collections
        if hasattr(lines, "get_segments")
        for segment in lines.get_segments()
    ]
    for y in row.values():
        mine = sorted((begin, end) for at, begin, end in spans if at == y)
        assert mine[0][0] == 0
        assert mine[-1][1] == len(made.steps) + 0.5
        assert all(end == begin for (_, end), (begin, _) in pairwise(mine))
    (cost, budget) = top.lines
    assert list(cost.get_ydata()) == pytest.approx([1, *(s.cost / made.sites.weights for s in made.steps)])
    assert budget.get_ydata()[0] == made.limits[0].limit / made.sites.weights


@pytest.mark.parametrize("count", [1, 54, 300])
def test_stages_add_up_to_the_totals(count: int) -> None:
    made = report(count)
    left, right = figures.draw_stages(made).axes
    for axes, dense, kept in (
        (left, made.totals.weights, made.totals.kept),
        (right, made.totals.macs, made.totals.kept_macs),
    ):
        sums = [sum(bar.get_width() for bar in bars) for bars in axes.containers]
        assert sums == [kept, dense - kept]
        assert len(axes.texts) == len(axes.containers[0])


def test_comparison_has_a_row_a_scheme_and_its_totals() -> None:
    made = [report(54), report(54, ("2:16",)), report(54, ("1:1",))]
    axes = figures.draw_comparison(made).axes
    for row, one in enumerate(made):
        bars, totals = axes[2 * row].containers[0], axes[2 * row + 1].containers[0]
        heights = [bar.get_y() + bar.get_height() for bar in bars]
        assert heights == pytest.approx([one.density(site) for site in one.sites])
        shares = [100 * one.totals.kept / one.totals.weights, 100 * one.totals.kept_macs / one.totals.macs]
        assert [bar.get_width() for bar in totals] == pytest.approx(shares)


def test_accuracy_has_every_point_with_its_spread() -> None:
    points = [Point("a", 0.25, 0.9, 0.01), Point("a", 0.0625, 0.7, 0.03), Point("b", 0.25, 0.8, 0.02)]
    (axes,) = draw_accuracy(points, dense=0.95, title="t").axes
    drawn = {
        (bar.get_label(), round(x), round(y)) for bar in axes.containers for x, y in zip(*bar.lines[0].get_data(), strict=True)
    }
    assert drawn == {("a", 25, 90), ("a", 6, 70), ("b", 25, 80)}
    low, high = axes.get_ylim()
    assert low < 67
    assert high > 95


@pytest.mark.parametrize("count", [1, 5, 20, 47, 54, 160, 300])
@pytest.mark.parametrize("name", [name for name in DRAWINGS if name != "accuracy"])
def test_no_two_texts_touch_and_none_leaves_the_page(name: str, count: int) -> None:
    figure = DRAWINGS[name](report(count))
    figure.draw_without_rendering()
    beyond = {
        id(label)
        for axes in figure.findobj(matplotlib.axes.Axes)
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not (min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval()))
    }
    labels = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(matplotlib.text.Text)
        if text.get_text() and text.get_visible() and id(text) not in beyond
    ]
    page = figure.bbox
    for text, box in labels:
        assert min(box.x0, box.y0) > -2, text
        assert box.x1 < page.width + 2, text
        assert box.y1 < page.height + 2, text
    for i, (text, box) in enumerate(labels):
        for other, around in labels[i + 1 :]:
            wide = min(box.x1, around.x1) - max(box.x0, around.x0)
            high = min(box.y1, around.y1) - max(box.y0, around.y0)
            assert wide < 1.5 or high < 1.5, (text, other)


def test_title_says_model_method_and_budget_reached() -> None:
    made = report()
    title = figures.draw_density(made).get_suptitle().replace("\n", " ")
    assert title == made.title
    assert f"net, domino: {made.limits[0].used:,} of {made.sites.weights:,} weights kept" in title


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_the_same_figure_gives_the_same_file(name: str, suffix: str, tmp_path: Path) -> None:
    for copy in "ab":
        save_figure(DRAWINGS[name](report()), tmp_path / f"{copy}{suffix}")
    first, second = (tmp_path / f"{copy}{suffix}").read_bytes(), (tmp_path / f"b{suffix}").read_bytes()
    assert first == second
    if suffix == ".svg":
        assert ElementTree.fromstring(first).tag.endswith("svg")


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    sites = Sites((Site("a$_{b}$<&>.weight", "linear", (4, 16), (4, 16, 1), 64, 1, 256, ()),))
    figure = figures.draw_search(Report(sites, Scheme({}), model="$x^2$ <svg>", method="m"))
    save_figure(figure, tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")
    assert any("$x^2$ <svg>" in text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_drawing_leaves_no_trace_in_matplotlib(tmp_path: Path) -> None:
    def settings() -> dict[str, object]:
        return {
            key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"
        }  # reading that one loads pyplot

    pyplot, before = "matplotlib.pyplot" in sys.modules, settings()
    save_figure(figures.draw_search(report()), tmp_path / "a.svg")
    assert settings() == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_save_refuses_other_suffixes_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(NmfxError, match=r"a\.gif: a figure is written as .png, .svg, .pdf"):
        save_figure(Figure(), tmp_path / "a.gif")
    (tmp_path / "a.png").touch()
    with pytest.raises(NmfxError, match="exists already"):
        save_figure(Figure(), tmp_path / "a.png", force=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png"]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NmfxError, match=r"pip install 'nmfx\[figures\]'"):
        figures.draw_density(report())


def test_a_scheme_without_steps_or_budget_is_drawn() -> None:
    sites = network(5)
    assert len(figures.draw_search(Report(sites, Scheme({}))).axes) == 3


STAGES = {
    "resnet": (
        [
            "conv1.weight",
            *(f"layer{i}.{j}.conv{k}.weight" for i in (1, 2, 3, 4) for j in range(3) for k in (1, 2)),
            "fc.weight",
        ],
        ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"],
    ),
    "efficientnet": (
        [*(f"features.{i}.{j}.weight" for i in range(9) for j in range(3)), "classifier.1.weight"],
        [*(f"features.{i}" for i in range(9)), "classifier.1"],
    ),
    "vit-large": (
        ["embed.weight", *(f"blocks.{i}.{j}.weight" for i in range(24) for j in range(4)), "head.weight"],
        ["embed", *(f"blocks.{i}-{i + 1}" for i in range(0, 24, 2)), "head"],
    ),
    "many at the root": (
        [*(f"stage{i}.{j}.weight" for i in range(30) for j in range(9))],
        [f"stage{i}-{min(29, i + 2)}" for i in range(0, 30, 3)],
    ),
    "without numbers": (
        [f"part{i}{letter}.weight" for i in range(10) for letter in "ab"],
        [f"part{i}a-part{i}b" for i in range(10)],
    ),
    "three": (["a.weight", "b.weight", "c.0.weight"], ["a", "b", "c.0"]),
    "root": (["weight"], ["weight"]),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages(name: str) -> None:
    names, expected = STAGES[name]
    stages = stages_of(names)
    assert len(stages) == len(names)
    assert list(dict.fromkeys(stages)) == expected
    short = short_names(stages)
    assert len(set(short.values())) == len(short)


def test_short_names_keep_the_word_before_a_number() -> None:
    assert list(short_names(["encoder.layers.0", "encoder.layers.1", "heads.head"]).values()) == [
        "layers.0",
        "layers.1",
        "head",
    ]
    assert list(short_names(["a.0", "b.0"]).values()) == ["a.0", "b.0"]


def test_spread_keeps_order_gap_and_mean() -> None:
    assert space_out([0, 10, 20], 5) == [0, 10, 20]
    assert space_out([0, 0, 0], 4) == [-4, 0, 4]
    places = space_out([1, 1.5, 1.6, 9, 9.1], 1)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(places))
    assert sum(places) == pytest.approx(sum([1, 1.5, 1.6, 9, 9.1]))


def test_ticks_are_half_an_octave_apart_and_name_their_patterns() -> None:
    ticks = density_ticks([*(Pattern(n, 16) for n in range(1, 17)), Pattern("2:4"), Pattern("4:8"), Pattern.DENSE])
    assert ticks[0.5] == "2:4, 4:8, ..."
    assert ticks[1] == "dense"
    assert all(b / a >= 2**0.5 for a, b in pairwise(sorted(ticks)))
