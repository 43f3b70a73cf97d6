"""nmfx search --target-latency: measured times as the budget, and the result measured again end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from nmfx.cli.console import advancing, heading, output, warn, working
from nmfx.errors import SearchError
from nmfx.models.site import Sites
from nmfx.passes.transform import transform
from nmfx.runtime.building import load_kernel
from nmfx.runtime.latency import NANO, Latency, measure_latency, measured_seconds
from nmfx.search.finder import SearchResult
from nmfx.search.problem import pose
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


def search(
    model: nn.Module,
    sites: Sites,
    pictures: Tensor,
    target: float | str,
    question: Mapping[str, Any],
    find: Callable[..., SearchResult],
) -> Reached:
    """Measure, search, measure the result, and search again with the difference; of those fast enough, the one that keeps most.

    Args:
        pictures: a batch of the size to be fast for.
        target: ``"2x"`` is half the time of the best dense run.
        question: what else is asked of `find`, which is find_scheme with its method.

    Raises:
        SearchError: the sparsest scheme would not be fast enough; the message says what it would reach.
    """
    share = 1 - Fraction(parse_target(target))
    problem = pose(sites, target=0.0, mixed=True, **question)
    offered = zip(sites, problem.options, strict=True)
    groupings = {site.name: {p: problem.grouping(i, p) for p in options} for i, (site, options) in enumerate(offered)}
    check_kernel()
    with advancing("timing every pattern of every site") as advance:
        latency = measure_latency(model, groupings, pictures, progress=advance)
    dense, wanted, tries = latency.baseline / NANO, float(share) * latency.baseline / NANO, list[Reached]()
    while len(tries) < ROUNDS:
        goal, sparsest = _target(latency, share * (1 - MARGIN))
        result = find(target=goal, budget="latency", latency=latency.prices, **question)
        predicted = latency.predict(result.scheme)
        with working("measuring the result"):
            measured = measured_seconds(transform(model, result.scheme, sites=sites), pictures, latency)
        tries.append(Reached(result, dense, wanted, predicted, measured, latency))
        near = abs(measured / predicted - 1) <= NEAR
        if (measured <= wanted and near) or (measured > wanted and sparsest):
            break
        latency = latency.adjusted(measured, result.scheme)  # what the table does not know: caches that are cold in between
    if fast := [one for one in tries if one.measured <= wanted]:
        return max(fast, key=lambda one: one.result.totals.kept)
    best = min(tries, key=lambda one: one.measured)
    if sparsest:
        raise SearchError(
            f"a latency of {float(share):.3g} of the best dense run ({dense * 1e3:.3g} ms) is out of reach: with the sparsest "
            f"patterns it takes {best.measured * 1e3:.3g} ms, {dense / best.measured:.2f}x; offer sparser ones, as with --m 32"
        )
    return best


def check_kernel() -> None:
    """Build or load the sparse kernel; one line if it cannot be had, with what to do."""
    with working("loading the sparse kernel; the first time it is built, which takes a minute"):
        reason = load_kernel()
    if reason:
        warn(f"no sparse kernel, so nothing gets faster than dense: {reason}")


def _target(latency: Latency, share: Fraction) -> tuple[Fraction, bool]:
    """The sparsity of time that the sites must reach, and whether that is all they can: the rest takes what it takes."""
    limit = share * latency.baseline - latency.rest
    least = sum(min(price.values()) for price in latency.prices.values())
    return max(Fraction(0), 1 - max(limit, Fraction(least)) / latency.dense), limit <= least


def show(found: Reached) -> None:
    """The times beside each other."""
    dense, predicted, measured = (f"{seconds * 1e3:.2f} ms" for seconds in (found.dense, found.predicted, found.measured))
    text = (
        f"{dense} the best dense run, {found.wanted * 1e3:.2f} ms wanted, {predicted} predicted, {measured} measured "
        f"({found.measured / found.predicted - 1:+.1%}): {found.dense / found.measured:.2f}x"
    )
    output().print(heading("latency: ", text), soft_wrap=True)
    if found.measured > found.wanted:
        output().print("not reached; the machine may have been busy: run it again", soft_wrap=True)
