"""find_scheme: one budget for all methods, one result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nmfx import text
from nmfx.errors import SearchError
from nmfx.graph.census import find_sites
from nmfx.graph.site import Sites
from nmfx.scheme import Remainder, Scheme, Totals, shapes_of
from nmfx.search.baselines import erk, moves, uniform
from nmfx.search.domino import domino
from nmfx.search.events import Event, Outcome
from nmfx.search.knapsack import solve
from nmfx.search.problem import Budget, BudgetKind, Problem, pose
from nmfx.search.tables import Tables
from nmfx.sparsity.layout import Layout
from nmfx.zoo.source import identify_quickly


def knapsack(problem: Problem, tables: Tables) -> Outcome:
    """The smallest summed squared weight error under the budget, exactly."""
    best = solve(tables.squared_errors, problem.costs, problem.budget.limit)
    reason = "least squared weight error under the budget"
    return Outcome(best.options, moves(problem, list(best.options), reason))


METHODS: dict[str, Callable[[Problem, Tables], Outcome]] = {
    "domino": domino,
    "uniform": uniform,
    "erk": erk,
    "knapsack": knapsack,
}


@dataclass(frozen=True)
class SearchResult:
    """What `find_scheme` found.

    Attributes:
        events: which site stepped when, and why.
        left: parameters or MACs of the budget that no further step could use.
        loss: squared weight error of the scheme, as a share of the squared weights of all sites that had a choice.
        optimum: the smallest such loss at the same budget (exact).
        dense_reasons: why a site stayed dense, or took another M, whatever the budget.
        seconds: time of the search alone.
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


def find_scheme(
    model: nn.Module,
    *,
    target: float = 0.875,
    method: str = "domino",
    budget: BudgetKind = "params",
    m: int = 16,
    candidates: Iterable[int] | None = None,
    example_input: Any = None,
    sites: Sites | None = None,
    keep_dense: Iterable[str] = (),
    layout: Layout = "strict",
    remainder: Remainder = "dense",
) -> SearchResult:
    """Choose a pattern N:m for every site of `model` so that kept parameters or MACs are at most ``1 - target`` of dense.

    Args:
        target: sparsity over all sites, those that stay dense included.
        method: ``domino`` (data-free DominoSearch), ``knapsack`` (least squared weight error, exact), ``erk``, ``uniform``.
        budget: what the target counts: ``params`` or ``macs`` (per sample).
        m: group size, up to 64; 1 < m.
        candidates: the N's allowed besides m (dense); powers of two by default.
        keep_dense: globs of site names that stay dense.
        layout, remainder: what becomes of rows that m does not divide (see `nmfx.scheme.fit`).

    Deterministic, and never above the budget; what no step could use is reported as `left`. The model is not changed: score
    buffers are attached for the time of the search and removed again.

    Raises:
        SearchError: unknown method, a target out of reach (the message says the largest), weights without values.
        TraceError: the forward pass fails on the example input.
    """
    if method not in METHODS:
        raise SearchError(f"unknown method {method!r}{text.nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    if not 1 < m <= 64:
        raise SearchError(f"m = {m}: expected a group size in 2..64")
    sites = sites if sites is not None else find_sites(model, example_input)
    options = {"keep_dense": keep_dense, "layout": layout, "remainder": remainder}
    problem = pose(sites, target=target, budget=budget, m=m, candidates=candidates, **options)  # type: ignore[arg-type]
    tables, start = Tables(problem, model), time.perf_counter()
    outcome = METHODS[method](problem, tables)
    seconds = time.perf_counter() - start
    patterns = {s.name: o[c] for s, o, c in zip(sites, problem.options, outcome.choice, strict=True)}
    source = identify_quickly(model)
    info = {"model": str(source)} if source else {"model": sites.model}
    info |= {"method": method, "budget": budget, "target": f"{target:g}", "m": str(m), "sites": sites.fingerprint}
    scheme = Scheme(patterns, layout, remainder == "short", shapes_of(sites), info)
    table = tables.squared_errors
    loss = math.fsum(row[option] for row, option in zip(table, outcome.choice, strict=True))
    optimum = solve(table, problem.costs, problem.budget.limit).loss
    left = problem.left(outcome.choice)
    return SearchResult(
        scheme=scheme,
        sites=sites,
        totals=scheme.totals(sites),
        budget=problem.budget,
        method=method,
        events=outcome.events,
        left=left,
        loss=loss / (tables.energy or 1.0),
        optimum=optimum / (tables.energy or 1.0),
        dense_reasons=problem.dense_reasons,
        seconds=seconds,
    )
