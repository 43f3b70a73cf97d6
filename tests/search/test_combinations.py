"""Whatever find_scheme is asked for together, it answers within every budget or says in a SearchError why not."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import searched

from nmfx.demo.digits import load_digits_data
from nmfx.errors import SearchError
from nmfx.scheme import Scheme
from nmfx.search.budget import Prices
from nmfx.search.domino_loop import DominoSearch
from nmfx.search.finder import SearchResult, find_scheme
from nmfx.settings.methods import METHODS, SENSITIVITIES
from nmfx.sparsity.pattern import Pattern

SENSITIVITY = (*SENSITIVITIES,)
LIMITS: list[dict[str, Any]] = [
    {"budget": "params"},
    {"budget": "macs"},
    {"budget": "bytes"},
    {"budget": "latency"},
    {"limits": {"params": 0.3, "latency": "2x"}},
    {"limits": {"latency": 0.5, "macs": 0.4}},
    {"limits": {"macs": 0.4, "bytes": 0.5}},
    {"limits": {"params": 0.5, "macs": 0.5, "bytes": 0.5}},
    {"limits": {}},
]


@cache
def data(labels: bool = True) -> list[Any]:
    x, y = load_digits_data()[:2]
    return [(x[i : i + 8], y[i : i + 8]) if labels else x[i : i + 8] for i in (0, 8, 16)]


@cache
def prices(seed: int = 0) -> Prices:
    """Times as machines have them: sparser is not always faster, and some sites are not in the table."""
    generator = torch.Generator().manual_seed(seed)
    _, sites = searched("digits")
    table = {}
    for site in list(sites)[:-1]:
        dense = site.macs + 1000
        noise = lambda: float(torch.rand((), generator=generator)) + 0.3  # noqa: E731
        numbers = product((1, 2, 3, 4, 8), (4, 8, 16))
        times = {Pattern(n, m): int(dense * min(1.0, noise() * (n / m + 0.1))) for n, m in numbers if n < m}
        table[site.name] = {Pattern.DENSE: dense, **times}
    return table


def ask(**options: Any) -> SearchResult | None:
    """The answer, which keeps every limit; None where a SearchError says why there is none."""
    model, sites = searched("digits")
    if options.get("method") == "spdy":
        options["options"] = {"steps": 1}
    try:
        found = find_scheme(model, sites=sites, **options)
    except SearchError as error:
        assert len(str(error)) > 20  # noqa: PT017
        return None
    assert all(left >= 0 for left in found.lefts)
    assert found.loss >= found.optimum - max(found.gap, found.loss * 1e-9) or found.budgets[1:]
    if found.optimal:
        assert found.optimum <= found.loss * (1 + 1e-9)
    assert ("exact optimum" in found.comparison) == found.optimal
    return found


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_under_every_limit(method: str, limit: dict[str, Any]) -> None:
    answers = [
        ask(method=method, sensitivity=sensitivity, data=data(), latency=prices(), **{"target": 0.4, "m": m, **limit})
        for sensitivity, m in (("weight", 16), ("weight", (4, 8)), ("gradient", 4))
    ]
    if len(limit.get("limits") or (1,)) < 3:
        assert any(answers), "no answer at all"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["domino", "erk", "uniform", "knapsack"])
def test_times_that_do_not_fall_with_n(method: str, seed: int) -> None:
    for target in (0.0, 0.1, 0.3, 0.5, 0.6):
        found = ask(method=method, budget="latency", latency=prices(seed), target=target, m=8)
        best = ask(method="knapsack", budget="latency", latency=prices(seed), target=target, m=8)
        assert (found is None) == (best is None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    method=st.sampled_from([*METHODS]),
    sensitivity=st.sampled_from([*SENSITIVITY, None]),
    limit=st.sampled_from(LIMITS),
    target=st.sampled_from([0.0, 0.3, "2x", 0.9, 0.999, "1x", 1.0, -1, float("nan")]),
    m=st.sampled_from([4, 16, (4, 16), 1, 0, 64, (), 3]),
    pictures=st.sampled_from([None, True, False]),
    timed=st.booleans(),
    within=st.sampled_from([None, "2:4", "1:4"]),
    more=st.sampled_from(
        [{}, {"candidates": [1]}, {"candidates": []}, {"patterns": ["2:4"]}, {"keep_dense": ["*"]}, {"min_density": 0.5},
         {"min_density": 2}, {"layout": "flat"}, {"remainder": "short"}, {"remainder": "smaller"}]
    ),
)  # fmt: skip
def test_any_combination_works_or_says_why(
    method: str, sensitivity: str | None, limit: dict[str, Any], target: Any, m: Any, pictures: Any, timed: bool,
    within: str | None, more: dict[str, Any],
) -> None:  # fmt: skip
    _, sites = searched("digits")
    start = Scheme.uniform(sites, within) if within else None
    given_data = None if pictures is None else data(pictures)
    ask(
        method=method, sensitivity=sensitivity, data=given_data, latency=prices() if timed else None, within=start,
        **{"target": target, "m": m, **limit, **more},
    )  # fmt: skip


def test_the_loop_says_that_it_does_not_count_time() -> None:
    model, sites = searched("digits")
    for options in ({"budget": "latency"}, {"limits": {"params": 0.5, "latency": 0.5}}):
        with pytest.raises(SearchError, match="DominoSearch counts params, macs or bytes"):
            DominoSearch(model, 0.5, sites=sites, latency=prices(), **options)  # type: ignore[arg-type]
