"""A search under a budget of measured time, and the result measured again end to end."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmfx.errors import NmfxError, SearchError
from nmfx.export.onnx import save_onnx
from nmfx.models.example import Example
from nmfx.models.site import Sites
from nmfx.passes.baking import bake
from nmfx.passes.transform import transform
from nmfx.progress import Progress, silent
from nmfx.runtime.measuring.engines import open_engine
from nmfx.runtime.measuring.latency import NANO, Latency, measure_latency, measured_seconds
from nmfx.search.finder import SearchResult
from nmfx.search.problem import make_problem
from nmfx.settings.engines import ENGINES
from nmfx.settings.target import parse_target

ROUNDS = 6  # searches, each with what the one before it measured
NEAR = 0.05  # of the predicted time: near enough to stop
MARGIN = Fraction(1, 50)  # of the time wanted: a scheme that just reaches it is measured above it every other time


@dataclass(frozen=True)
class Reached:
    """A search under a latency budget: seconds of the best dense run, wanted, predicted by the table, and measured beside the
    dense run, as if that had taken as long as before.
    """

    result: SearchResult
    dense: float
    wanted: float
    predicted: float
    measured: float
    latency: Latency

    def __str__(self) -> str:
        dense, predicted, measured = (f"{seconds * 1e3:.2f} ms" for seconds in (self.dense, self.predicted, self.measured))
        return (
            f"{dense} the best dense run, {self.wanted * 1e3:.2f} ms wanted, {predicted} predicted, {measured} measured "
            f"({self.measured / self.predicted - 1:+.1%}): {self.dense / self.measured:.2f}x"
        )


def search_latency(
    model: nn.Module,
    sites: Sites,
    pictures: Tensor,
    target: float | str,
    question: Mapping[str, Any],
    find: Callable[..., SearchResult],
    precision: str = "float32",
    progress: Progress = silent,
) -> Reached:
    """Measure, search, measure the result, and search again with the difference; the widest budget of those fast enough.

    Args:
        pictures: a batch of the size to be fast for.
        target: ``"2x"`` is half the time of the best dense run.
        question: what else is asked of `find`, which is find_scheme with its method.
        precision: ``float32`` or ``int8``, for which dense means the best int8 engine that is installed.

    Returns:
        The search that gave its sites most time among those fast enough, or the fastest where none is. Kept weights do not say
        which is better: masks that rows share keep more of them in the same time.

    Raises:
        SearchError: the sparsest scheme would not be fast enough; the message says what it would reach.
    """
    share = 1 - Fraction(parse_target(target))
    problem = make_problem(sites, target=0.0, mixed=True, **question)
    offered = zip(sites, problem.options, strict=True)
    groupings = {site.name: {p: problem.grouping(i, p) for p in options} for i, (site, options) in enumerate(offered)}
    rivals = int8_engines(model, pictures, progress) if precision == "int8" else {}
    latency = measure_latency(model, groupings, pictures, precision=precision, rivals=rivals, progress=progress)
    dense, wanted, tries = latency.baseline / NANO, float(share) * latency.baseline / NANO, list[Reached]()
    while len(tries) < ROUNDS:
        goal, sparsest = _target(latency, share * (1 - MARGIN))
        result = find(target=goal, budget="latency", latency=latency.prices, **question)
        predicted = latency.predict(result.scheme)
        progress(1.0, "measuring the result")
        measured = measured_seconds(transform(model, result.scheme, sites=sites), pictures, latency, precision)
        tries.append(Reached(result, dense, wanted, predicted, measured, latency))
        near = abs(measured / predicted - 1) <= NEAR
        if (measured <= wanted and near) or (measured > wanted and sparsest):
            break
        latency = latency.adjusted(measured, result.scheme)  # what the table does not know: caches that are cold in between
    if fast := [one for one in tries if one.measured <= wanted]:
        return max(fast, key=lambda one: one.result.budget.limit)
    best = min(tries, key=lambda one: one.measured)
    if sparsest:
        raise SearchError(
            f"a latency of {float(share):.3g} of the best dense run ({dense * 1e3:.3g} ms) is out of reach: with the sparsest "
            f"patterns it takes {best.measured * 1e3:.3g} ms, {dense / best.measured:.2f}x; offer sparser ones, as with --m 32 "
            "or --vector 4"
        )
    return best


def int8_engines(model: nn.Module, pictures: Tensor, progress: Progress = silent) -> dict[str, Callable[[], object]]:
    """The dense network on the int8 engines that are installed, by their names; those that cannot run it are left out."""
    found: dict[str, Callable[[], object]] = {}
    installed = [engine for engine in ENGINES.values() if engine.int8 and engine.is_installed]
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(NmfxError):
        path = Path(folder) / "dense.onnx"
        if installed:
            save_onnx(bake(model).eval(), path, Example((pictures[:1],)))
        for engine in installed:
            progress(0.0, f"opening {engine.label}")
            with contextlib.suppress(NmfxError):
                found[engine.label] = open_engine(engine, path, pictures, torch.get_num_threads())
    return found


def _target(latency: Latency, share: Fraction) -> tuple[Fraction, bool]:
    """The sparsity of time that the sites must reach, and whether that is all they can: the rest takes what it takes."""
    limit = share * latency.baseline - latency.rest
    least = sum(min(price.values()) for price in latency.prices.values())
    return max(Fraction(0), 1 - max(limit, Fraction(least)) / latency.dense), limit <= least
