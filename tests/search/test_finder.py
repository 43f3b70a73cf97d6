"""Laws of find_scheme: never above the budget, nothing left that a step could use, the same each time, no trace."""

from __future__ import annotations

import copy
import re
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from awkward import build, snapshot
from awkward import models as awkward_models
from cases import cases
from small import MODELS, searched
from torch import Tensor, nn

from nmfx.demo.digits import load_digits_data
from nmfx.errors import NmfxError, SearchError
from nmfx.models.census import find_sites
from nmfx.passes.baking import bake
from nmfx.passes.statistics import recalibrate_bn
from nmfx.passes.transform import transform
from nmfx.passes.verification import verify
from nmfx.scheme import Scheme
from nmfx.search.finder import SearchResult, find_scheme
from nmfx.search.problem import make_problem
from nmfx.settings.methods import METHODS as ALL
from nmfx.sparsity.pattern import Pattern
from nmfx.training.evaluation import evaluate

models = pytest.mark.parametrize("name", MODELS)
METHODS = [method for method in ALL if method != "spdy"]  # spdy looks at pictures: test_evidence.py
methods = pytest.mark.parametrize("method", METHODS)
kinds = pytest.mark.parametrize("kind", ["params", "macs"])
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "smaller": {"remainder": "smaller"},
    "short": {"remainder": "short"},
    "flat": {"layout": "flat"},
}
TARGETS = (0.0, 0.1, 0.3, 0.5, 0.62, 0.75, 0.875, 0.93)


@cache
def search(name: str, method: str, kind: Any, m: int, target: float, policy: str = "dense") -> SearchResult | None:
    """A search on one of the small models, each done once; None when the target is out of reach."""
    model, sites = searched(name)
    options = {"target": target, "budget": kind, "m": m, "sites": sites} | POLICIES[policy]
    try:
        return find_scheme(model, method=method, **options)
    except SearchError as error:
        if "out of reach" not in str(error):
            raise
        return None


def results(name: str, method: str, kind: Any) -> list[SearchResult]:
    """All searches of one model, method and budget that have a result."""
    small = [search(name, method, kind, m, target) for m in (2, 4, 8, 16) for target in TARGETS]
    more = [
        search(name, method, kind, m, target, policy) for policy in POLICIES for m in (7, 16) for target in (0.3, 0.6, 0.85)
    ]
    found = [result for result in (*small, *more) if result is not None]
    assert len(found) > 20
    return found


def options_of(result: SearchResult, policy: str, m: int) -> dict[str, list[tuple[int, Pattern]]]:
    """What each site may take and what it costs, cheapest first."""
    posed = make_problem(result.sites, target=0.0, budget=result.budget.kind, m=m, **POLICIES[policy])
    rows = zip(posed.sites, posed.costs, posed.options, strict=True)
    return {site.name: list(zip(costs, patterns, strict=True)) for site, costs, patterns in rows}


# One budget for all.


@kinds
@methods
@models
def test_the_budget_is_never_exceeded(name: str, method: str, kind: Any) -> None:
    for result in results(name, method, kind):
        totals = result.scheme.totals(result.sites)
        kept, dense = (totals.kept, totals.weights) if kind == "params" else (totals.kept_macs, totals.macs)
        assert kept <= (1 - Fraction(str(result.budget.target))) * dense
        assert result.left == result.budget.limit - kept >= 0
        assert result.totals == totals


def steps_that_fit(name: str, method: str, kind: Any) -> list[tuple[Any, ...]]:
    """Steps to a denser pattern that cost something, and would still fit in what a search has left."""
    found: list[tuple[Any, ...]] = []
    for policy, m in (("dense", 16), ("dense", 4), ("smaller", 16), ("short", 7), ("flat", 16)):
        for target in TARGETS:
            if (result := search(name, method, kind, m, target, policy)) is None:
                continue
            for site, options in options_of(result, policy, m).items():
                now = [pattern for _, pattern in options].index(result.scheme.get(site, Pattern.DENSE))
                steps = [cost - options[now][0] for cost, _ in options[now + 1 :]]
                found += [(policy, m, target, site, step, result.left) for step in steps if 0 < step <= result.left]
    return found


@kinds
@pytest.mark.parametrize("method", [method for method in METHODS if method != "uniform"])
@models
def test_no_further_step_fits(name: str, method: str, kind: Any) -> None:
    assert not steps_that_fit(name, method, kind)


@kinds
def test_no_further_step_fits_after_uniform(kind: Any) -> None:
    assert not [step for name in MODELS for step in steps_that_fit(name, "uniform", kind)]


class Auxiliary(nn.Module):
    """A large second head that runs in train mode only: it costs no MACs in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(64, 256)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.body(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


@cases(METHODS, arg="method")
def test_what_costs_nothing_is_not_pruned(method: str) -> None:
    model = Auxiliary()
    sites = find_sites(model, torch.empty(1, 64))
    assert sites["aux.weight"].macs == 0
    found = [find_scheme(model, method=method, target=target, budget="macs", sites=sites) for target in (0.5, 0.75, 0.9)]
    assert not any("aux.weight" in result.scheme for result in found)


@kinds
@models
def test_the_knapsack_loses_least(name: str, kind: Any) -> None:
    exact = results(name, "knapsack", kind)
    for result in exact:
        assert result.loss == pytest.approx(result.optimum, rel=1e-12, abs=1e-15)
    for method in METHODS:
        found = results(name, method, kind)
        assert len(found) == len(exact)
        for best, result in zip(exact, found, strict=True):
            assert best.loss <= result.loss * (1 + 1e-12) + 1e-15
            assert result.optimum == best.optimum


@kinds
@methods
@models
def test_the_loss_is_what_baking_removes(name: str, method: str, kind: Any) -> None:
    model, sites = searched(name)
    result = search(name, method, kind, 16, 0.6) or search(name, method, kind, 16, 0.5)
    assert result is not None
    dense, baked = (dict(m.named_parameters()) for m in (model, bake(transform(model, result.scheme, sites=sites))))
    free = [sites.sites[i].name for i in make_problem(sites, target=0.0).free]
    lost = sum(float((dense[key] - baked[key]).detach().double().square().sum()) for key in free)
    energy = sum(float(dense[key].detach().double().square().sum()) for key in free)
    assert result.loss == pytest.approx(lost / energy, rel=1e-5)
    assert result.totals.kept == sum(
        int(baked[site.name].count_nonzero()) if site.name in result.scheme else site.weights for site in sites
    )


@kinds
@methods
@models
def test_a_larger_budget_loses_no_more_at_the_optimum(name: str, method: str, kind: Any) -> None:
    found = [result for target in TARGETS if (result := search(name, method, kind, 16, target))]
    assert all(a.optimum <= b.optimum for a, b in pairwise(found))
    assert found[0].scheme.patterns == {}
    assert (found[0].loss, found[0].left, found[0].events) == (0.0, 0, ())


# What was done, and again.


@kinds
@methods
@models
def test_the_events_lead_from_dense_to_the_scheme(name: str, method: str, kind: Any) -> None:
    for result in results(name, method, kind):
        state = {site.name: Pattern.DENSE for site in result.sites}
        for event in result.events:
            assert state[event.site] == event.before
            assert event.before != event.after
            state[event.site] = event.after
            totals = Scheme(state, result.scheme.layout, result.scheme.short).totals(result.sites)
            assert event.cost == (totals.kept if kind == "params" else totals.kept_macs)
            assert event.reason
        assert {site: p for site, p in state.items() if not p.is_dense} == result.scheme.patterns
        times = [event.time for event in result.events if not event.reason.startswith("trim")]
        assert times == sorted(times)


@kinds
@methods
@models
def test_a_search_is_the_same_each_time(name: str, method: str, kind: Any) -> None:
    model, sites = searched(name)
    first = search(name, method, kind, 16, 0.5)
    assert first is not None
    for each in (model, copy.deepcopy(model).train()):
        again = find_scheme(each, method=method, target=0.5, budget=kind, sites=sites)
        assert again.scheme.patterns == first.scheme.patterns
        assert (again.events, again.loss, again.left) == (first.events, first.loss, first.left)
        torch.manual_seed(99)


@methods
def test_a_converted_model_is_searched_by_its_dense_weights(method: str) -> None:
    model, sites = searched("digits")
    converted = transform(model, "1:16", sites=sites)
    before = snapshot(converted)
    again = find_scheme(converted, method=method, target=0.6, sites=sites)
    assert snapshot(converted) == before
    result = search("digits", method, "params", 16, 0.6)
    assert result is not None
    assert again.scheme.patterns == result.scheme.patterns


@kinds
@methods
@awkward_models(["residual", "grouped", "tied", "lstm", "attention", "products", "half", "auxiliary", "experts"])
def test_the_model_is_untouched(name: str, method: str, kind: Any) -> None:
    model, example = build(name)
    before = snapshot(model)
    result = find_scheme(model, method=method, target=0.4, budget=kind, m=4, example_input=example)
    assert snapshot(model) == before
    assert len(result.scheme)
    assert verify(transform(model, result.scheme, sites=result.sites)).sites >= len(result.scheme)


def test_the_result_says_where_it_came_from() -> None:
    model, sites = searched("timm")
    result = find_scheme(model, target=0.5, method="erk", budget="macs", sites=sites)
    expected = {"model": "timm:test_resnet", "method": "erk", "budget": "macs", "target": "0.5", "m": "16"}
    assert result.scheme.info == expected | {"sites": sites.fingerprint}
    assert Scheme.from_yaml(result.scheme.to_yaml()) == result.scheme
    assert (result.method, result.budget.kind, result.budget.target) == ("erk", "macs", 0.5)
    assert result.dense_reasons["conv1.0.weight"].startswith("in=3")


@methods
def test_kept_dense_stays_dense(method: str) -> None:
    model, sites = searched("digits")
    result = find_scheme(model, target=0.4, method=method, sites=sites, keep_dense=["classifier*", "*block3*"])
    assert not {"classifier.weight", "block3.conv.weight"} & set(result.scheme)
    assert "kept dense" in result.dense_reasons["block3.conv.weight"]


@methods
@pytest.mark.parametrize("candidates", [[2], [1, 3, 5], range(1, 16)], ids=["one", "odd", "all"])
def test_only_candidates_are_chosen(method: str, candidates: Any) -> None:
    model, sites = searched("digits")
    result = find_scheme(model, target=0.5, method=method, sites=sites, candidates=candidates)
    assert {pattern.n for pattern in result.scheme.values()} <= set(candidates)
    assert {pattern.m for pattern in result.scheme.values()} == {16}


# What cannot be searched.


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "method": (
        {"method": "dominoo"},
        r"unknown method 'dominoo' \(did you mean 'domino'\?\); known: domino, uniform, erk, knapsack",
    ),
    "no method": ({"method": ""}, "unknown method ''; known: domino"),
    "budget": ({"budget": "flops"}, "expected params, macs, bytes or latency"),
    "target 1": ({"target": 1.0}, "expected a sparsity"),
    "far target": ({"target": 0.99}, "the largest target is"),
    "m 1": ({"m": 1}, r"group size in 2\.\.64"),
    "m 65": ({"m": 65}, r"group size in 2\.\.64"),
    "candidate": ({"candidates": [0]}, "candidate N = 0"),
    "no candidates": ({"candidates": []}, "out of reach"),
    "candidate M": ({"candidates": [16]}, "out of reach"),
    "all dense": ({"keep_dense": ["*"]}, r"the largest target is 0\.000000"),
    "glob": ({"keep_dense": ["blok*"]}, r"no site matches 'blok\*'"),
}


@cases(BAD_OPTIONS)
def test_what_cannot_be_asked_says_why(name: str) -> None:
    (model, sites), (options, message) = searched("digits"), BAD_OPTIONS[name]
    before = snapshot(model)
    with pytest.raises(SearchError, match=message):
        find_scheme(model, sites=sites, **options)
    assert snapshot(model) == before


@methods
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_weights_that_are_no_numbers_are_named(method: str, value: float) -> None:
    model, sites = copy.deepcopy(searched("digits")[0]), searched("digits")[1]
    with torch.no_grad():
        model.block3.conv.weight[3, 5, 1, 1] = value
    before = snapshot(model)
    with pytest.raises(SearchError, match=r"block3\.conv\.weight \(64, 32, 3, 3\): holds infinite or NaN weights"):
        find_scheme(model, target=0.5, method=method, sites=sites)
    assert snapshot(model) == before


@methods
def test_weights_without_values_are_refused(method: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    before = snapshot(model)
    with pytest.raises(SearchError, match=r"0\.weight: on the meta device, without values"):
        find_scheme(model, target=0.5, method=method, example_input=torch.empty(1, 32))
    assert snapshot(model) == before


@methods
@pytest.mark.parametrize("share", [0.3, 0.9, 1.0], ids=["some", "most", "all"])
@pytest.mark.parametrize("how", ["scattered", "channels", "sites"])
def test_pruned_weights_give_no_nan(method: str, share: float, how: str) -> None:
    model, sites = copy.deepcopy(searched("digits")[0]), searched("digits")[1]
    with torch.no_grad():
        for index, site in enumerate(sites):
            weight = dict(model.named_parameters())[site.name]
            if how == "scattered":
                weight.mul_(torch.rand_like(weight) > share)
            elif how == "channels":
                weight[: round(len(weight) * share)] = 0
            elif index < len(sites) * share:
                weight.zero_()
    for kind in ("params", "macs"):
        result = find_scheme(model, target=0.6, method=method, budget=kind, sites=sites)
        numbers = [result.loss, result.optimum, *(event.time for event in result.events)]
        assert all(0 <= number < float("inf") for number in numbers), numbers
        assert result.left >= 0
        assert not any(re.search(r"\b(nan|inf)\b", event.reason) for event in result.events)


def test_tiny_and_huge_weights_are_searched() -> None:
    for scale in (1e-30, 1e-10, 1e10):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
        with torch.no_grad():
            model[0].weight.mul_(scale)
        for method in METHODS:
            result = find_scheme(model, target=0.5, method=method, example_input=torch.empty(1, 32))
            assert 0 <= result.loss <= 1


class Own(nn.Module):
    """Its linear has something of its own under the name of the score buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.fc.weight_threshold = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_a_name_that_is_taken_is_an_error_of_ours() -> None:
    model = Own()
    before = snapshot(model)
    with pytest.raises(NmfxError, match="weight_threshold"):
        find_scheme(model, method="domino", target=0.5, example_input=torch.empty(1, 16))
    assert snapshot(model) == before
    assert model.fc.weight_threshold == 0.5


def test_a_search_beats_uniform_on_trained_weights() -> None:
    """Digits at half the weights, one-shot, after batch normalisation is estimated anew."""
    train, _, x, y = load_digits_data()
    (model, sites), top1 = searched("digits"), {}
    for method in METHODS:
        result = search("digits", method, "params", 16, 0.6)
        assert result is not None
        masked = transform(model, result.scheme, sites=sites)
        recalibrate_bn(masked, train.split(200))
        top1[method] = evaluate(masked, [(x, y)]).top1
    assert top1["knapsack"] >= top1["uniform"]
    assert top1["knapsack"] > 0.5
