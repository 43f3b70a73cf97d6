"""Laws of the baselines: uniform is one N for all, ERK's densities are those worked out by hand, moves are told in order."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import cases
from small import MODELS, searched
from torch import Tensor, nn

from nmfx.models.census import find_sites
from nmfx.scheme import Scheme
from nmfx.search.events import Outcome, moves, spend_rest
from nmfx.search.methods.erk import erk, erk_sparsities
from nmfx.search.methods.uniform import uniform
from nmfx.search.problem import Problem, make_problem
from nmfx.search.tables import Tables
from nmfx.sparsity.pattern import Pattern

models = pytest.mark.parametrize("name", MODELS)
kinds = pytest.mark.parametrize("kind", ["params", "macs"])


def posed(name: str, target: float, **options: Any) -> tuple[Problem, Tables]:
    model, sites = searched(name)
    problem = make_problem(sites, target=target, **options)
    return problem, Tables(problem, model)


def before_spend_rest(problem: Problem, outcome: Outcome) -> dict[str, Pattern]:
    """The sparse sites as the method itself chose them."""
    state = {event.site: event.after for event in outcome.events if not event.reason.startswith("trim")}
    return {site: pattern for site, pattern in state.items() if not pattern.is_dense}


# Uniform.

POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "smaller": {"remainder": "smaller"},
    "short": {"remainder": "short"},
    "flat": {"layout": "flat"},
    "all N": {"candidates": range(1, 17)},
    "all N, smaller": {"candidates": range(1, 17), "remainder": "smaller"},
}
LEVELS = (
    "uniform lines up the options of sites that have fewer of them from the dense end: at 8:16 a stem of 3 channels with short "
    "groups gets 2:16 though fit() leaves it dense, and a site with a smaller M gets those of another N"
)


@kinds
@cases(POLICIES, arg="policy")
def test_uniform_is_the_largest_n_that_fits_everywhere(policy: str, kind: Any) -> None:
    options = {key: value for key, value in POLICIES[policy].items() if key != "candidates"}
    for name in MODELS:
        for target in (0.1, 0.3, 0.5, 0.6, 0.7):
            try:
                problem, tables = posed(name, target, budget=kind, **POLICIES[policy])
            except ValueError:
                continue
            chosen = before_spend_rest(problem, uniform(problem, tables))
            schemes = [
                Scheme.uniform(problem.sites, Pattern(n, 16), **options)
                for n in POLICIES[policy].get("candidates", (1, 2, 4, 8))
            ]
            fitting = []
            for scheme in schemes:
                totals = scheme.totals(problem.sites)
                if (totals.kept if kind == "params" else totals.kept_macs) <= problem.budget.limit:
                    fitting.append(scheme)
            assert chosen == fitting[-1].patterns


@models
def test_what_uniform_leaves_raises_single_sites(name: str) -> None:
    problem, tables = posed(name, 0.5)
    outcome = uniform(problem, tables)
    assert any(event.reason.startswith("trim") for event in outcome.events)
    assert problem.left(outcome.choice) >= 0
    assert spend_rest(problem, outcome.choice) == (list(outcome.choice), [])


# ERK.


class Three(nn.Module):
    """Sites of 12 x 8, 8 x 8 x 1 and 4 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Conv1d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[:, :, 0]).sum(1, keepdim=True) + self.c(self.b(x).mean(2))


def three(target: float, **options: Any) -> Problem:
    return make_problem(find_sites(Three(), torch.empty(1, 8, 4)), target=target, m=8, **options)


def test_erk_scales_to_the_total() -> None:
    # Of 192 weights, 96 stay: densities in proportion to 20/96, 17/64 and 12/32, and 20 + 17 + 12 = 49.
    sparsities = erk_sparsities(three(0.5))
    assert sparsities == pytest.approx({0: 1 - 96 * 20 / 49 / 96, 1: 1 - 96 * 17 / 49 / 64, 2: 1 - 96 * 12 / 49 / 32})
    assert sum((1 - s) * w for s, w in zip(sparsities.values(), (96, 64, 32), strict=True)) == pytest.approx(96)


def test_erk_fixes_dense_what_would_exceed_one_and_scales_anew() -> None:
    # 172.8 of 192: the third would have 172.8 / 49 * 12 / 32 = 1.32; without it (172.8 - 32) / 37 * 17 / 64 = 1.01, dense too;
    # what is left, 172.8 - 32 - 64 = 76.8 of 96, is the first's: sparsity 0.2.
    assert erk_sparsities(three(0.1)) == pytest.approx({0: 0.2, 1: 0.0, 2: 0.0})
    assert erk_sparsities(three(0.0)) == pytest.approx({0: 0.0, 1: 0.0, 2: 0.0})


def test_erk_counts_kept_sites_as_dense() -> None:
    # 'b' stays dense: 96 - 64 = 32 weights for sites in proportion to 20 and 12.
    assert erk_sparsities(three(0.5, keep_dense=["b*"])) == pytest.approx({0: 1 - 20 / 96, 2: 1 - 12 / 32})


@kinds
def test_erk_never_leaves_nought_to_one(kind: Any) -> None:
    for name in MODELS:
        for target in (0.0, 0.2, 0.4, 0.6, 0.7):
            problem, _ = posed(name, target, budget=kind)
            sparsities = erk_sparsities(problem)
            assert set(sparsities) == set(problem.free)
            assert all(0 <= sparsity <= 1 for sparsity in sparsities.values())


@kinds
@models
def test_erk_gives_more_to_what_has_a_larger_share(name: str, kind: Any) -> None:
    for target in (0.2, 0.4, 0.6, 0.7):
        problem, tables = posed(name, target, budget=kind)
        state = before_spend_rest(problem, erk(problem, tables))
        raw = {i: sum(s.shape) / math.prod(s.shape) for i, s in enumerate(problem.sites) if i in problem.free}
        order = [state.get(problem.sites.sites[i].name, Pattern.DENSE).density for i in sorted(raw, key=lambda i: raw[i])]
        assert order == sorted(order), "all sites have the same options"


@kinds
@models
def test_erk_takes_the_nearest_pattern_at_one_scale(name: str, kind: Any) -> None:
    problem, tables = posed(name, 0.6, budget=kind)
    state = before_spend_rest(problem, erk(problem, tables))
    low, high = 0.0, math.inf  # the scales at which each site's pattern is the nearest in the logarithm
    for i in problem.free:
        site = problem.sites.sites[i]
        raw = sum(site.shape) / math.prod(site.shape)
        ladder = [p.density for p in problem.options[i]]
        now = ladder.index(state.get(site.name, Pattern.DENSE).density)
        low = max(low, math.sqrt(ladder[now] * ladder[now - 1]) / raw if now else 0.0)
        high = min(high, math.sqrt(ladder[now] * ladder[now + 1]) / raw if now + 1 < len(ladder) else math.inf)
    assert low <= high * (1 + 1e-9)
    assert high < math.inf
    steps = [problem.sites.sites[i] for i in problem.free]
    assert steps


# Moves and trims.


def test_moves_are_told_in_model_order() -> None:
    problem, _ = posed("digits", 0.0)
    choice = [len(options) - 1 for options in problem.options]
    assert moves(problem, choice, "why") == ()
    choice[problem.free[2]], choice[problem.free[0]] = 0, 1
    events = moves(problem, choice, "why")
    assert [(event.site, str(event.after), event.reason) for event in events] == [
        (problem.sites.sites[problem.free[0]].name, "2:16", "why"),
        (problem.sites.sites[problem.free[2]].name, "1:16", "why"),
    ]
    assert events[-1].cost == problem.cost(choice)
    assert all(event.before.is_dense for event in events)


@kinds
@models
def test_a_trim_takes_the_largest_step_that_fits(name: str, kind: Any) -> None:
    problem, _ = posed(name, 0.6, budget=kind)
    choice, events = spend_rest(problem, [0] * len(problem.options))
    state = [0] * len(problem.options)
    names = [site.name for site in problem.sites]
    for event in events:
        steps = {
            i: problem.costs[i][state[i] + 1] - problem.costs[i][state[i]]
            for i in problem.free
            if state[i] + 1 < len(problem.options[i])
        }
        taken = names.index(event.site)
        assert steps[taken] == max(step for step in steps.values() if step <= problem.left(state))
        state[taken] += 1
        assert event.cost == problem.cost(state) <= problem.budget.limit
    assert state == choice
    assert all(a.cost <= b.cost for a, b in pairwise(events))
    assert spend_rest(problem, choice) == (choice, [])
