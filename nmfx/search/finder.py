"""find_scheme: one budget for all methods, one result."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nmfx import text
from nmfx.errors import SearchError
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.passes.calibration import Calibration
from nmfx.scheme import Scheme, Totals
from nmfx.search.budget import Budget, Prices
from nmfx.search.events import Event, Outcome, moves
from nmfx.search.problem import make_problem, make_scheme
from nmfx.search.solver.hull import hull
from nmfx.search.solver.lagrange import solve_all
from nmfx.search.tables import Tables
from nmfx.settings.methods import METHODS, SENSITIVITIES, default_sensitivity, resolve
from nmfx.settings.target import BudgetKind
from nmfx.sparsity.score import check_score


@dataclass(frozen=True)
class SearchResult:
    """What `find_scheme` found.

    Attributes:
        budget: the budget that leads; `budgets` are all of them.
        events: which site stepped when, and why.
        left: what no further step could use of the budget that leads; `lefts` of each budget.
        loss: squared weight error of the scheme, as a share of the squared weights of all sites that had a choice.
        optimum: the smallest such loss that is known at the same budget among the same patterns.
        gap: what is proven of it: no scheme within the budget has a loss below ``optimum - gap``.
        optimal: whether that proves `optimum` to be the optimum.
        dense_reasons: why a site stayed dense, or took another M, whatever the budget.
        seconds: time of the search alone, sensitivities included.
        sensitivity: what a knapsack minimised.
        curve: of a knapsack under one budget, the least summed sensitivity against it: (cost, loss), see `hull`.
        summed: the summed sensitivity of the scheme, the loss of `curve`.
    """

    scheme: Scheme = field(repr=False)
    sites: Sites = field(repr=False)
    totals: Totals
    budget: Budget
    method: str
    events: tuple[Event, ...] = field(repr=False)
    left: int
    loss: float
    optimum: float
    dense_reasons: Mapping[str, str] = field(repr=False)
    seconds: float
    budgets: tuple[Budget, ...] = ()
    lefts: tuple[int, ...] = ()
    sensitivity: str = "weight"
    gap: float = math.inf
    optimal: bool = False
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    summed: float = 0.0

    @property
    def summary(self) -> str:
        """How it was found, and what patterns the sites have."""
        summed = f" ({self.sensitivity})" if self.method in METHODS and METHODS[self.method].sums else ""
        took = f"{len(self.steps)} steps in" if self.steps else "decided in"
        return f"{self.method}{summed}: {self.scheme.counts(self.sites)}; {took} {self.seconds:.2f} s"

    @property
    def comparison(self) -> str:
        """The squared weight error beside the smallest, which is called the optimum only where that is proven."""
        above = f"{self.loss / self.optimum - 1:.1%} above" if self.optimum else "equal to"
        above = "equal to" if self.loss <= self.optimum * (1 + 1e-12) else above
        least = f"{self.loss:.4%} of all, {above} the {'exact optimum' if self.optimal else 'least found'} at this budget"
        bound = "" if self.optimal else f"; no scheme is below {max(0.0, self.optimum - self.gap):.4%}"
        return f"{least} ({self.optimum:.4%}{bound})"

    @property
    def steps(self) -> tuple[Event, ...]:
        """The history of a method that goes step by step; none of one that decides at once."""
        return self.events if self.method in METHODS and METHODS[self.method].stepwise else ()


def find_scheme(
    model: nn.Module,
    *,
    target: float | str = 0.875,
    method: str = "knapsack",
    budget: BudgetKind = "params",
    limits: Mapping[str, float | str] | None = None,
    latency: Prices | None = None,
    sensitivity: str | None = None,
    score: str = "magnitude",
    data: Iterable[Any] | None = None,
    example_input: Any = None,
    sites: Sites | None = None,
    options: Mapping[str, Any] | None = None,
    **choices: Any,
) -> SearchResult:
    """Choose a pattern for every site of `model` within a budget.

    Args:
        model: the dense network.
        target: sparsity over all sites, those that stay dense included; ``"8x"`` is eight times fewer.
        method: ``knapsack`` (least summed sensitivity; the default, by docs/search-study.md), ``domino`` (data-free
            DominoSearch; with data inside a training loop it is `DominoSearch`), ``spdy`` (whole schemes tried on pictures),
            ``erk``, ``uniform``.
        budget: what the target counts: ``params``, ``macs`` (per sample), ``bytes`` of the compressed weights, or ``latency``.
        limits: budgets by name instead of `target` and `budget`, one or two at once: the share to keep, or times fewer, as in
            ``{"params": 0.125, "macs": "4x"}``; the first leads.
        latency: nanoseconds of each pattern of each site, as
            ``nmfx.runtime.measuring.latency.measure_latency(...).prices``; sites it does not know cost nothing.
        sensitivity: what the knapsack sums up: ``weight`` (squared weight error, data-free), ``activation`` (weighted by
            activation second moments), ``corrected`` (output error after `nmfx.correct`), ``gradient`` (squared directional
            gradients), ``measured`` (each single choice tried);
            None is ``gradient`` with data and ``weight`` without.
        score: what the masks rank weights by, one of `nmfx.sparsity.score.SCORES` (see `transform`).
        data: batches ``(input, label)`` for all but ``weight`` and ``magnitude``: a few hundred training pictures,
            in several batches.
        example_input, sites: as in `transform`.
        options: of the method alone, such as ``{"seconds": 60, "seed": 0}`` of ``spdy``.
        choices: what a site may be given (see `Choices`): ``m``, ``candidates``, ``patterns``, ``vector``,
            ``keep_dense``, ``min_density``, ``layout``, ``remainder``.

    Deterministic (but for time limits), and never above a budget; what no step could use is reported as `left`. The model is
    not changed: score buffers are attached for the time of the search and removed again.

    Returns:
        The scheme, how it was found, and how far it is from the least squared error.

    Raises:
        SearchError: unknown method, a target out of reach (the message says the largest), weights without values, no data.
        TraceError: the forward pass fails on the example input.
    """
    if method not in METHODS:
        raise SearchError(f"unknown method {method!r}{text.nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    needs, known = METHODS[method], SENSITIVITIES
    sensitivity = sensitivity or default_sensitivity(method, data is not None)
    if sensitivity not in known:
        raise SearchError(f"unknown sensitivity {sensitivity!r}{text.nearest(sensitivity, known)}; known: {', '.join(known)}")
    check_score(score, SearchError)
    sites = sites if sites is not None else find_sites(model, example_input)
    problem = make_problem(sites, target=target, budget=budget, limits=limits, latency=latency, mixed=needs.mixed, **choices)
    calibration, function = Calibration.of(data) if data is not None else None, resolve(needs.function)
    tables, start = Tables(problem, model, sensitivity, calibration, score), time.perf_counter()
    try:
        inspect.signature(function).bind(problem, tables, **(options or {}))
    except TypeError as error:
        raise SearchError(f"options of method {method!r}: {error}") from None
    if needs.pictures == "always" and calibration is None:
        raise SearchError(f"method {method!r} tries schemes on pictures: give data= (--data)")
    if needs.labels and calibration is not None:
        calibration.need_labels(f"method {method!r}")
    outcome = function(problem, tables, **(options or {}))
    if not isinstance(outcome, Outcome):
        outcome = Outcome(tuple(outcome), moves(problem, list(outcome), f"chosen by {method}"))
    seconds = time.perf_counter() - start
    used = sensitivity if needs.sums else "weight"
    return conclude(tables, outcome, method=method, seconds=seconds, sensitivity=used)


def conclude(tables: Tables, outcome: Outcome, *, method: str, seconds: float, sensitivity: str = "weight") -> SearchResult:
    """The outcome of a method as a result: the scheme, its totals, and how far its squared weight error is from the least.

    Args:
        tables: of the problem that was solved.
        outcome: an option for every site, and how it came to be.
        method: what it was found by.
        seconds: that it took.
        sensitivity: what was summed up, if anything.

    Returns:
        The result.
    """
    problem, sites = tables.problem, tables.problem.sites
    patterns = {s.name: o[c] for s, o, c in zip(sites, problem.options, outcome.choice, strict=True)}
    scheme = make_scheme(tables.model, problem, patterns, method, tables.score)
    loss = math.fsum(row[option] for row, option in zip(tables.squared_errors, outcome.choice, strict=True))
    least = solve_all(tables.squared_errors, problem.prices, [b.limit for b in problem.budgets])
    solved = method in METHODS and METHODS[method].sums and len(problem.budgets) == 1
    lefts = tuple(problem.left(outcome.choice, b) for b in range(len(problem.budgets)))
    return SearchResult(
        scheme=scheme,
        sites=sites,
        totals=scheme.totals(sites),
        budget=problem.budget,
        method=method,
        events=outcome.events,
        left=lefts[0],
        loss=loss / (tables.energy or 1.0),
        optimum=least.loss / (tables.energy or 1.0),
        dense_reasons=problem.dense_reasons,
        seconds=seconds,
        budgets=problem.budgets,
        lefts=lefts,
        sensitivity=sensitivity,
        gap=least.gap / (tables.energy or 1.0),
        optimal=least.optimal,
        curve=tuple(hull(tables.losses, problem.costs)) if solved else (),
        summed=math.fsum(row[option] for row, option in zip(tables.losses, outcome.choice, strict=True)) if solved else 0.0,
    )
