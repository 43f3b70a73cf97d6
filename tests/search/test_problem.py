"""Laws of the problem: what a site may choose, what it costs, what the budget is, and how far a target can go."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import pytest
import torch
import torchvision
from small import MODELS, searched
from torch import nn

from nmfx.errors import SearchError
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.scheme import Scheme
from nmfx.search.budget import Budget
from nmfx.search.problem import make_problem
from nmfx.settings.choices import parse_candidates
from nmfx.sparsity.pattern import Pattern

models = pytest.mark.parametrize("name", MODELS)
kinds = pytest.mark.parametrize("kind", ["params", "macs"])
POLICIES = {
    "dense": {},
    "smaller": {"remainder": "smaller"},
    "short": {"remainder": "short"},
    "flat": {"layout": "flat"},
}
policies = pytest.mark.parametrize("policy", POLICIES)


@pytest.mark.parametrize(
    ("m", "candidates", "expected"),
    [
        (16, None, (1, 2, 4, 8, 16)),
        (12, None, (1, 2, 4, 8, 12)),
        (2, None, (1, 2)),
        (64, None, (1, 2, 4, 8, 16, 32, 64)),
        (16, [4, 2, 4], (2, 4, 16)),
        (16, [], (16,)),
        (16, [16], (16,)),
        (4, range(1, 5), (1, 2, 3, 4)),
    ],
    ids=str,
)
def test_candidates(m: int, candidates: Any, expected: tuple[int, ...]) -> None:
    assert parse_candidates(m, candidates) == expected


@pytest.mark.parametrize("n", [0, -1, 17, 2.0, "2", None])
def test_what_is_no_candidate(n: Any) -> None:
    with pytest.raises(SearchError, match=re.escape(f"candidate N = {n}: expected a whole number in 1..M = 16")):
        parse_candidates(16, [1, n])


@kinds
@policies
@models
def test_options_rise_to_dense_and_cost_what_schemes_keep(name: str, policy: str, kind: Any) -> None:
    _, sites = searched(name)
    problem = make_problem(sites, target=0.0, budget=kind, m=16, **POLICIES[policy])  # type: ignore[arg-type]
    options: dict[str, Any] = {"layout": "strict", "remainder": "dense"} | POLICIES[policy]
    for i, site in enumerate(sites):
        choice, costs = problem.options[i], problem.costs[i]
        assert choice[-1].is_dense
        assert costs[-1] == (site.weights if kind == "params" else site.macs)
        assert [p.density for p in choice] == sorted({p.density for p in choice})
        assert list(costs) == sorted(costs)
        for pattern, cost in zip(choice, costs, strict=True):
            totals = Scheme({site.name: pattern}, options["layout"], options["remainder"] == "short").totals(sites)
            rest = (sites.weights - site.weights) if kind == "params" else (sites.macs - site.macs)
            assert cost == (totals.kept if kind == "params" else totals.kept_macs) - rest
    sparsest = Scheme.uniform(sites, "1:16", **options)
    assert {s.name: o[0] for s, o in zip(sites, problem.options, strict=True) if len(o) > 1} == sparsest.patterns
    assert problem.free == [i for i, o in enumerate(problem.options) if len(o) > 1]
    assert {s.name for s in sites} - {sites.sites[i].name for i in problem.free} <= set(problem.dense_reasons)


def test_kept_dense_is_said() -> None:
    _, sites = searched("mixed")
    problem = make_problem(sites, target=0.0, keep_dense=["wide*", "head.weight"])
    assert problem.dense_reasons["wide.weight"] == "kept dense by 'wide*'"
    assert problem.dense_reasons["head.weight"] == "kept dense by 'head.weight'"
    assert "depthwise" in problem.dense_reasons["depthwise.weight"]
    assert "in=3" in problem.dense_reasons["stem.weight"]
    with pytest.raises(SearchError, match=r"keep-dense: no site matches 'haed\.weight' \(did you mean 'head\.weight'\?\)"):
        make_problem(sites, target=0.5, keep_dense=["haed.weight"])


# The budget.

TARGETS = ["0", "0.1", "0.3", "0.5", "0.7", "0.8", "0.875", "0.9", "0.9375", "0.95", "0.999"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dense", [1, 3, 10, 999, 25_502_912])
def test_the_limit_is_the_whole_number_below(target: str, dense: int) -> None:
    assert Budget("params", float(target), dense).limit == math.floor((1 - Fraction(target)) * dense)


@pytest.mark.parametrize("dense", [4_089_184_256, 190_000_000_001], ids=["resnet50", "large"])
def test_the_limit_of_large_models_is_not_exceeded(dense: int) -> None:
    for target in TARGETS:
        assert Budget("macs", float(target), dense).limit <= (1 - Fraction(target)) * dense


@kinds
@models
def test_left_is_the_limit_less_the_costs(name: str, kind: Any) -> None:
    _, sites = searched(name)
    problem = make_problem(sites, target=0.5, budget=kind, m=4)
    for option in (0, -1):
        choice = [range(len(o))[option] for o in problem.options]
        assert problem.cost(choice) == sum(costs[option] for costs in problem.costs)
        assert problem.left(choice) == problem.budget.limit - problem.cost(choice)
    assert problem.left(choice) < 0


@pytest.mark.parametrize("target", [-0.1, 1.0, 1.5, float("nan"), float("inf"), "half", "0.5y", "0.5x", "1.5", None, True])
def test_what_is_no_target(target: Any) -> None:
    with pytest.raises(SearchError, match="expected a sparsity in 0 <= target < 1"):
        make_problem(searched("digits")[1], target=target)


def test_what_is_no_budget() -> None:
    with pytest.raises(SearchError, match=r"budget 'mac' \(did you mean 'macs'\?\)"):
        make_problem(searched("digits")[1], target=0.5, budget="mac")  # type: ignore[arg-type]


def test_without_sites_there_is_nothing_to_save() -> None:
    with pytest.raises(SearchError, match="has no params to save"):
        make_problem(Sites(()), target=0.5)


# How far a target can go.


def out_of_reach(sites: Sites, **options: Any) -> str:
    with pytest.raises(SearchError) as caught:
        make_problem(sites, target=0.9999, **options)
    return str(caught.value)


def largest(message: str) -> float:
    found = re.search(r"the largest target is (\d\.\d+)", message)
    assert found, message
    return float(found[1])


@kinds
@policies
@models
def test_the_largest_target_works(name: str, policy: str, kind: Any) -> None:
    _, sites = searched(name)
    for m in (2, 4, 7, 8, 12, 16, 32):
        for keep in ([], [sites.sites[1].name], [sites.sites[-1].name]):
            options: dict[str, Any] = {"m": m, "keep_dense": keep, "budget": kind} | POLICIES[policy]
            target = largest(out_of_reach(sites, **options))
            problem = make_problem(sites, target=target, **options)
            assert problem.left([0] * len(sites)) >= 0
            with pytest.raises(SearchError, match="out of reach"):
                make_problem(sites, target=target + 2e-6, **options)


@kinds
def test_the_largest_target_is_about_right(kind: Any) -> None:
    _, sites = searched("mixed")
    scheme = Scheme.uniform(sites, "1:16")
    sparsity = scheme.totals(sites).sparsity if kind == "params" else scheme.totals(sites).mac_sparsity
    message = out_of_reach(sites, budget=kind)
    assert largest(message) == pytest.approx(sparsity, abs=1e-6)
    assert f"target 0.9999 of {kind} is out of reach: with 1:16 everywhere it can be" in message


@pytest.mark.parametrize(
    ("kind", "name"),
    [("params", "point"), ("macs", "stem")],
    ids=["params", "macs"],
)
def test_the_dense_site_that_costs_most_is_named(kind: Any, name: str) -> None:
    message = out_of_reach(searched("mixed")[1], budget=kind)
    assert f"{name}.weight is the largest of 4 sites (of 8) that stay dense" in message


def test_a_target_just_in_reach_and_one_weight_too_far() -> None:
    sites = find_sites(nn.Linear(1000, 10, bias=False), torch.empty(1, 1000))
    assert make_problem(sites, target=0.75, m=4).left([0]) == 0
    with pytest.raises(SearchError, match=r"largest target is 0\.750000; a larger M reaches further"):
        make_problem(sites, target=0.7501, m=4)


def test_the_published_budget_of_resnet50() -> None:
    with torch.device("meta"):
        sites = find_sites(torchvision.models.resnet50())
    problem = make_problem(sites, target=0.8)
    assert problem.budget.limit == 25_502_912 // 5
    assert problem.options[sites.sites.index(sites["layer1.0.conv2.weight"])] == tuple(
        Pattern(n, m) for n, m in ((1, 16), (2, 16), (4, 16), (8, 16), (1, 1))
    )
    assert list(problem.dense_reasons) == ["conv1.weight"]
