"""What `--figure` and `--html` write: a search, or schemes side by side, as a picture and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nmfx import __version__
from nmfx.models.source import versions
from nmfx.report.canvas import check_path, save_figure, style
from nmfx.report.figures import draw_comparison, draw_search
from nmfx.report.measured import draw_speed
from nmfx.report.page import check_page, comparison_page, save_page, search_page
from nmfx.report.record import Limit, Report, Speed
from nmfx.runtime.measuring.bench import Bench
from nmfx.scheme import Scheme
from nmfx.search.finder import SearchResult
from nmfx.stages.work import check_free


def check(figure: str | None, html: str | None, *, force: bool) -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        NmfxError: a name with another ending, a file that exists, or no matplotlib.
    """
    if figure:
        check_path(Path(figure))
    if html:
        check_page(Path(html))
    if figure or html:
        check_free([Path(path) for path in (figure, html) if path], force=force)
        with style():
            pass


def speeds_of(found: Bench) -> list[Speed]:
    """How many times as fast as the best dense engine each engine is, for the figure."""
    speeds = []
    for one in found.timings:
        dense, (low, high) = found.best_dense(one.batch, one.threads), one.spread
        assert dense is not None  # PyTorch
        best = dense.median
        group = f"batch {one.batch}, {one.threads} thread{'s' * (one.threads > 1)}"
        speeds.append(Speed(one.engine, group, best / one.median, best / high, best / low))
    return speeds


def write_speed(speeds: Sequence[Speed], label: str, figure: str, *, force: bool) -> None:
    """Write the figure of a bench."""
    save_figure(draw_speed(speeds, title=f"{label} on {torch.get_num_threads()} threads at most"), figure, force=force)


def write(result: SearchResult, scheme: Scheme, figure: str | None, html: str | None, *, force: bool) -> list[Path]:
    """Write the figure and the page of a search, those that are asked for.

    Args:
        result: of the search.
        scheme: the result's, with its full info.
        figure, html: names of files.
        force: overwrite them.

    Returns:
        The files that were written.

    Raises:
        NmfxError: a file that exists or cannot be written, or no matplotlib.
    """
    report = _report(result, scheme)
    if figure:
        save_figure(draw_search(report), figure, force=force)
    if html:
        save_page(search_page(report), html, force=force)
    return [Path(path) for path in (figure, html) if path]


def write_comparison(reports: Sequence[Report], figure: str | None, html: str | None, *, force: bool) -> list[Path]:
    """Write the figure and the page of several schemes, those that are asked for."""
    if figure:
        save_figure(draw_comparison(reports), figure, force=force)
    if html:
        save_page(comparison_page(reports), html, force=force)
    return [Path(path) for path in (figure, html) if path]


def _report(result: SearchResult, scheme: Scheme) -> Report:
    budgets, lefts = result.budgets or (result.budget,), result.lefts or (result.left,)
    limits = tuple(Limit(b.unit, b.limit, b.dense, b.limit - left) for b, left in zip(budgets, lefts, strict=True))
    largest = max((loss for _, loss in result.curve), default=0.0) or 1.0
    spare = result.budget.dense - result.budget.limit
    facts = {
        "layout": scheme.layout + (", short groups at the end of rows" if scheme.short else ""),
        "squared weight error": result.comparison,
        "model weights": str(scheme.info.get("weights", "")),
        "versions": ", ".join(f"{name} {version}" for name, version in ({"nmfx": __version__} | versions()).items()),
    }
    return Report(
        sites=result.sites,
        scheme=scheme,
        label=result.method,
        model=str(scheme.info.get("model", result.sites.model)),
        method=result.method,
        limits=limits,
        steps=result.steps,
        curve=[(cost / result.budget.dense, loss / largest) for cost, loss in result.curve],
        point=(1 - (result.left + spare) / result.budget.dense, result.summed / largest) if result.curve else None,
        reasons=result.dense_reasons,
        seconds=result.seconds,
        facts={key: value for key, value in facts.items() if value},
    )
