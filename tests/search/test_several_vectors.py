"""Laws of searches in which V, the number of rows that share a mask, is chosen for each site."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from small import searched
from torch import nn

from nmfx.errors import SearchError
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.passes.calibration import Calibration
from nmfx.passes.transform import transform
from nmfx.passes.verification import verify
from nmfx.scheme import Scheme
from nmfx.search.budget import Prices
from nmfx.search.domino_loop import DominoSearch
from nmfx.search.events import spend_rest
from nmfx.search.finder import find_scheme
from nmfx.search.problem import Problem, make_problem
from nmfx.search.tables import Tables
from nmfx.settings.choices import Choices
from nmfx.settings.search import SearchSettings
from nmfx.sparsity.pattern import Pattern

OFFERED = ("1:8", "2:8x2", "2:8x4", "4:8", "4:8x4")


def data() -> Calibration:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    pictures, labels = torch.from_numpy(x[:64]).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(y[:64])
    return Calibration.of(list(zip(pictures.split(16), labels.split(16), strict=True)))


def patterns_of(problem: Problem) -> list[list[str]]:
    return [[str(pattern) for pattern in options] for options in problem.options]


def priced(sites: Sites, seed: int = 0, patterns: tuple[Pattern, ...] = tuple(map(Pattern, OFFERED))) -> Prices:
    """Times that fall with N and V, not evenly."""
    generator = random.Random(seed)
    return {
        site.name: {Pattern.DENSE: site.macs}
        | {p: int(site.macs * p.density * generator.uniform(0.8, 1.2) / p.vector**0.5) for p in patterns}
        for site in sites
    }


@pytest.mark.parametrize("budget", ["params", "macs", "bytes", "latency"])
@pytest.mark.parametrize("target", [0.4, 0.6, 0.7])
def test_the_knapsack_is_the_best_of_all_choices(budget: Any, target: float) -> None:
    model, sites = searched("digits")
    latency = priced(sites) if budget == "latency" else None
    asked: dict[str, Any] = {"target": target, "budget": budget, "latency": latency, "patterns": OFFERED}
    problem = make_problem(sites, mixed=True, **asked)
    tables = Tables(problem, model)
    choices = itertools.product(*(range(len(options)) for options in problem.options))
    loss = min(
        sum(row[k] for row, k in zip(tables.squared_errors, choice, strict=True)) for choice in choices if problem.fits(choice)
    )
    found = find_scheme(model, sites=sites, **asked)
    assert found.loss * tables.energy == pytest.approx(loss, rel=1e-9)
    assert found.optimal
    assert found.left >= 0


@pytest.mark.parametrize("policy", [{}, {"remainder": "short"}, {"remainder": "smaller"}, {"layout": "flat"}], ids=str)
@pytest.mark.parametrize("name", ["mixed", "digits", "timm"])
def test_options_are_those_of_each_v_the_fewest_rows_first(name: str, policy: dict[str, Any]) -> None:
    _, sites = searched(name)
    several = make_problem(sites, target=0.0, m=(8, 16), vector=(4, 1, 2), mixed=True, **policy)
    single = {v: make_problem(sites, target=0.0, m=(8, 16), vector=v, mixed=True, **policy) for v in (1, 2, 4)}
    for i, (site, options) in enumerate(zip(sites, several.options, strict=True)):
        assert list(options) == sorted(options, key=lambda p: p.order)
        expected = {p for v, one in single.items() for p in one.options[i] if v <= site.outputs[0] or p.is_dense}
        assert set(options) == expected
        for pattern, cost in zip(options, several.costs[i], strict=True):
            one = single[pattern.vector]
            assert cost == one.costs[i][one.options[i].index(pattern)]


def test_a_v_beyond_the_rows_that_may_share_is_no_option() -> None:
    model = nn.Sequential(nn.Conv2d(32, 8, 1, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1, groups=4))
    sites = find_sites(model, torch.rand(1, 32, 4, 4))
    problem = make_problem(sites, target=0.0, m=4, candidates=(1,), vector=(1, 2, 4), mixed=True)
    assert patterns_of(problem) == [["1:4", "1:1"], ["1:4", "1:4x2", "1:4x4", "1:1"], ["1:4", "1:4x2", "1:1"]]
    alone = make_problem(sites, target=0.0, m=4, candidates=(1,), vector=4)  # what was asked for stays its name
    assert patterns_of(alone) == [["1:4x4", "1:1"]] * 3


@pytest.mark.parametrize("name", ["mixed", "digits", "timm"])
def test_sharing_never_loses_less(name: str) -> None:
    model, sites = searched(name)
    problem = make_problem(sites, target=0.0, m=(4, 8, 16), vector=(1, 2, 4, 8), mixed=True)
    table = Tables(problem, model).squared_errors
    for row, options in zip(table, problem.options, strict=True):
        losses = dict(zip(options, row, strict=True))
        for one, other in itertools.permutations(losses, 2):
            if one.m == other.m and one.n >= other.n and one.vector <= other.vector:
                assert losses[one] <= losses[other] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("sensitivity", "score", "m"),
    [
        *itertools.product(("weight", "activation", "gradient", "measured"), ("magnitude", "gradient"), ((4, 8),)),
        ("corrected", "magnitude", 8),  # seconds for each option; it chooses masks itself
    ],
)
def test_tables_have_an_entry_for_each_v(sensitivity: str, score: str, m: Any) -> None:
    model, sites = searched("digits")

    def losses(vector: Any) -> list[dict[Pattern, float]]:
        problem = make_problem(sites, target=0.0, m=m, candidates=(2,), vector=vector, mixed=True)
        table = Tables(problem, model, sensitivity, data(), score).losses
        return [dict(zip(options, row, strict=True)) for options, row in zip(problem.options, table, strict=True)]

    several = losses((1, 4))
    for site, one, four in zip(several, losses(1), losses(4), strict=True):
        assert site.keys() == one.keys() | four.keys()
        for pattern, loss in site.items():
            alone = (one | four)[pattern]
            if sensitivity == "measured" and pattern.vector == 4:  # one that seems better than masks of each row is noise
                assert loss == pytest.approx(max(alone, *(site[p] for p in one if p.m == pattern.m and p.n >= pattern.n), 0.0))
            else:
                assert loss == pytest.approx(alone, rel=1e-4, abs=1e-9)
    assert any(site[p] != site[Pattern(p.n, p.m)] for site in several for p in site if p.vector == 4)


def test_of_options_that_cost_the_same_the_one_of_less_error_is_taken() -> None:
    model, sites = searched("timm")
    both, one = (find_scheme(model, sites=sites, target=0.7, vector=v) for v in ((1, 4), 1))
    assert both.scheme.patterns == one.scheme.patterns


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [0.3, 0.6, 0.8])
def test_under_times_sharing_where_it_pays_beats_one_v_for_all(seed: int, target: float) -> None:
    model, sites = searched("timm")
    prices = priced(sites, seed, tuple(Pattern(n, 8, v) for n in (1, 2, 4) for v in (1, 2, 4)))
    asked: dict[str, Any] = {"sites": sites, "target": target, "budget": "latency", "latency": prices, "m": 8}
    several, *single = (find_scheme(model, vector=vector, **asked) for vector in ((1, 2, 4), 1, 2, 4))
    assert several.optimal
    assert all(several.loss <= one.loss for one in single)
    if target == 0.8:
        assert len({pattern.vector for pattern in several.scheme.values()}) > 1
        assert several.loss < min(one.loss for one in single)
    assert verify(transform(model, several.scheme, sites=sites)).sites == len(several.scheme)


@pytest.mark.parametrize("sensitivity", ["gradient", "activation", "measured"])
def test_what_is_left_is_spent_on_denser_patterns_of_no_larger_v(sensitivity: str) -> None:
    model, sites = searched("digits")
    problem = make_problem(sites, target=0.5, budget="latency", latency=priced(sites), patterns=OFFERED, mixed=True)
    generator = random.Random(0)
    for _ in range(50):
        choice = [generator.randrange(len(options)) for options in problem.options]
        if not problem.fits(choice):
            continue
        chosen, events = spend_rest(problem, choice)
        assert problem.fits(chosen)
        for event in events:
            assert event.after.density > event.before.density
            assert event.after.vector <= event.before.vector or event.after.is_dense
        for i in problem.free:  # nothing more fits
            for up in problem.steps_up(i, chosen[i]):
                assert not problem.fits([*chosen[:i], up, *chosen[i + 1 :]])
    found = find_scheme(model, sites=sites, target=0.5, sensitivity=sensitivity, data=data().batches, patterns=OFFERED)
    assert found.left >= 0


def test_steps_go_to_the_next_denser_pattern() -> None:
    _, sites = searched("digits")
    problem = make_problem(sites, target=0.0, patterns=OFFERED, mixed=True)
    i = problem.free[0]
    names = [str(pattern) for pattern in problem.options[i]]
    assert names == [*OFFERED, "1:1"]
    steps = {name: [names[k] for k in problem.steps_up(i, option)] for option, name in enumerate(names)}
    assert steps == {
        "1:8": ["4:8"],
        "2:8x2": ["4:8"],
        "2:8x4": ["4:8", "4:8x4"],
        "4:8": ["1:1"],
        "4:8x4": ["1:1"],
        "1:1": [],
    }
    single = make_problem(sites, target=0.0, m=8, vector=4)
    assert [single.steps_up(i, k) for k in range(4)] == [[1], [2], [3], []]


def test_spdy_takes_several() -> None:
    model, sites = searched("digits")
    asked: dict[str, Any] = {"method": "spdy", "data": data().batches, "options": {"steps": 3}, "patterns": OFFERED}
    found = find_scheme(model, sites=sites, target=0.6, budget="latency", latency=priced(sites), **asked)
    assert found.left >= 0
    assert {str(pattern) for pattern in found.scheme.values()} <= set(OFFERED)


@pytest.mark.parametrize("within", [1, 4])
def test_a_sparse_start_goes_on_to_sparser_patterns_of_any_v(within: int) -> None:
    model, sites = searched("timm")
    start = Scheme.uniform(sites, Pattern(4, 8, within))
    prices = priced(sites, 0, tuple(Pattern(n, 8, v) for n in (1, 2, 4) for v in (1, 4)))
    found = find_scheme(
        model, sites=sites, target=0.75, budget="latency", latency=prices, m=8, vector=(1, 4), within=start,
    )  # fmt: skip
    assert all(pattern.density <= start[name].density for name, pattern in found.scheme.items())


SAID = "masks shared by 1, 4 rows: give all patterns one V; knapsack and spdy choose it for each site"


@pytest.mark.parametrize("method", ["domino", "erk", "uniform"])
@pytest.mark.parametrize("asked", [{"vector": (1, 4)}, {"patterns": ("2:8", "2:8x4", "1:8")}], ids=["vector", "patterns"])
def test_methods_of_one_v_refuse_several(method: str, asked: dict[str, Any]) -> None:
    model, sites = searched("digits")
    with pytest.raises(SearchError, match=SAID):
        find_scheme(model, sites=sites, target=0.5, method=method, **asked)
    with pytest.raises(SearchError, match=SAID):
        SearchSettings(method=method, choices=Choices(**asked))
    with pytest.raises(SearchError, match=SAID):
        DominoSearch(model, 0.5, sites=sites, **asked)
    once = {"vector": (4, 4)} if "vector" in asked else {"patterns": ("2:8x4", "1:8x4")}  # the same one twice is one
    assert {p.vector for p in find_scheme(model, sites=sites, target=0.5, method=method, **once).scheme.values()} == {4}


@pytest.mark.parametrize("vector", [(), (1, 3), (True, 4), "4", 0, 2.5], ids=str)
def test_what_is_no_v(vector: Any) -> None:
    with pytest.raises(SearchError, match="expected how many adjacent outputs share a mask: one of 1, 2, 4, 8, or several"):
        Choices(vector=vector)


def test_an_iterator_is_looked_at_twice() -> None:
    _, sites = searched("digits")
    problem = make_problem(sites, target=0.5, vector=iter((1, 4)), mixed=True)
    assert {p.vector for options in problem.options for p in options} == {1, 4}
