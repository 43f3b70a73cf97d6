"""nmfx search --target-latency: measured times as the budget, and the result measured again end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from nmfx.cli.console import advancing, heading, output, working
from nmfx.errors import SearchError
from nmfx.graph.site import Sites
from nmfx.passes.transform import transform
from nmfx.runtime.latency import NANO, Latency, measure_latency, measured_seconds
from nmfx.search.budget import parse_target
from nmfx.search.finder import SearchResult
from nmfx.search.problem import pose

ROUNDS = 4  # searches, each with what the one before it measured
NEAR = 0.05  # of the predicted time: near enough to stop


@dataclass(frozen=True)
class Reached:
    """A search under a latency budget: seconds of the best dense run, wanted, predicted by the table, and measured."""

    result: SearchResult
    dense: float
    wanted: float
    predicted: float
    measured: float


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
    with advancing("timing every pattern of every site") as advance:
        latency = measure_latency(model, groupings, pictures, progress=advance)
    dense, wanted, tries = latency.baseline / NANO, float(share) * latency.baseline / NANO, list[Reached]()
    while len(tries) < ROUNDS:
        try:
            goal = _target(latency, share)
        except SearchError:
            if not tries:
                raise
            break  # what was measured says that it is out of reach: the fastest found is told with its time
        result = find(target=goal, budget="latency", latency=latency.prices, **question)
        predicted = latency.predict(result.scheme)
        with working("measuring the result"):
            measured = measured_seconds(transform(model, result.scheme, sites=sites), pictures)
        tries.append(Reached(result, dense, wanted, predicted, measured))
        if measured <= wanted and abs(measured / predicted - 1) <= NEAR:
            break
        latency = latency.adjusted(measured, result.scheme)  # what the table does not know: caches that are cold in between
    fast = [one for one in tries if one.measured <= wanted]
    return max(fast, key=lambda one: one.result.totals.kept) if fast else min(tries, key=lambda one: one.measured)


def _target(latency: Latency, share: Fraction) -> Fraction:
    """The sparsity of time that the sites must reach, since the rest of the network takes what it takes."""
    limit = share * latency.baseline - latency.rest
    least = sum(min(price.values()) for price in latency.prices.values())
    if limit < least:
        raise SearchError(
            f"a latency of {float(share):.3g} of the best dense run ({latency.baseline / NANO * 1e3:.3g} ms) is out of reach: "
            f"with the sparsest patterns it would take {(least + latency.rest) / NANO * 1e3:.3g} ms, "
            f"{latency.baseline / (least + latency.rest):.2f}x; offer sparser patterns, as with --m 32"
        )
    return max(Fraction(0), 1 - limit / latency.dense)


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
