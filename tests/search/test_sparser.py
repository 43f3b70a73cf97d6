"""Laws of a search that starts from a sparse network: no site gets denser, the budget holds, zeros do no harm."""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import searched
from torch import Tensor, nn

from nmfx.demo.digits import load_demo, load_digits_data
from nmfx.errors import SchemeError, SearchError
from nmfx.masking.sites import masked_sites
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.passes.baking import bake
from nmfx.passes.thresholds import thresholds_of
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme
from nmfx.search.domino_loop import DominoSearch
from nmfx.search.finder import SearchResult, find_scheme
from nmfx.search.methods.erk import erk_sparsities
from nmfx.search.problem import make_problem
from nmfx.settings.methods import METHODS
from nmfx.sparsity.pattern import Pattern

# Rows of 16, 32, 32, 64 and 64 channels, and a stem of one: what a search of the demo network might have found before.
START = {"block1*": "8:16", "block2*": "4:16", "block3*": "3:16", "block4*": "4:16", "classifier.weight": "1:16"}
TARGETS = {"params": 0.85, "macs": 0.78, "bytes": 0.8}
FAST = {"decay": 4.0, "penalty_every": 2, "vote_every": 3}


@cache
def sparse() -> tuple[nn.Module, Sites, Scheme]:
    """The demo network pruned to `START`: plain modules, real zeros; its sites; the scheme."""
    model = load_demo(trained=True)
    sites = find_sites(model, torch.empty(1, 1, 8, 8))
    scheme = Scheme.from_rules(sites, START)
    return bake(transform(model, scheme, sites=sites)), sites, scheme


def found(method: str, target: float, **options: Any) -> SearchResult:
    model, sites, start = sparse()
    if method == "spdy":
        options |= {"data": [load_digits_data()[0:2]], "options": {"steps": 3}}
    return find_scheme(model, sites=sites, method=method, target=target, within=start, **options)


def check_within(scheme: Scheme, start: Scheme, sites: Sites) -> None:
    for site in sites:
        assert scheme.get(site.name, Pattern.DENSE).density <= start.get(site.name, Pattern.DENSE).density, site.name
        assert scheme.kept(site) <= start.kept(site), site.name


@pytest.mark.parametrize("m", [16, 32, 8, (8, 16, 32)], ids=str)
@pytest.mark.parametrize("kind", ["params", "macs", "bytes"])
@pytest.mark.parametrize("method", METHODS)
def test_no_site_gets_denser_and_the_budget_holds(method: str, kind: Any, m: Any) -> None:
    _, sites, start = sparse()
    result = found(method, TARGETS[kind], budget=kind, m=m)
    check_within(result.scheme, start, sites)
    assert all(left >= 0 for left in result.lefts)
    assert {p.m for p in result.scheme.values()} - {p.m for p in start.values()} <= set(m if isinstance(m, tuple) else (m,))
    assert 0 < result.optimum <= result.loss * (1 + 1e-9)
    assert all(start[event.site].density >= event.after.density for event in result.events)
    assert result.scheme == Scheme.from_yaml(result.scheme.to_yaml(sites))


def test_a_site_without_a_sparser_pattern_stays_as_it_is_and_says_so() -> None:
    result = found("domino", 0.85, keep_dense=["block2*"])
    assert result.scheme["classifier.weight"] == Pattern("1:16")
    assert result.scheme["block2.conv.weight"] == Pattern("4:16")
    assert result.dense_reasons["classifier.weight"] == "1:16 already, and no pattern is sparser"
    assert result.dense_reasons["block2.conv.weight"] == "kept at 4:16 by 'block2*'"


@pytest.mark.parametrize("name", ["mixed", "digits"])
@pytest.mark.parametrize("method", ["domino", "knapsack", "erk", "uniform"])
def test_a_dense_start_is_no_bound(method: str, name: str) -> None:
    model, sites = searched(name)
    free, bound = (find_scheme(model, sites=sites, method=method, target=0.6, within=w) for w in (None, Scheme({})))
    assert (bound.scheme, bound.events, bound.loss) == (free.scheme, free.events, free.loss)


@pytest.mark.parametrize(
    ("target", "limits"),
    [(0.0, None), (0.5, None), ("2x", None), (0.5, {"params": "2x", "macs": 0.5})],
    ids=["zero", "lower", "times", "both"],
)
def test_a_target_that_is_met_already_is_refused(target: Any, limits: Any) -> None:
    with pytest.raises(
        SearchError, match=r"params, now 0\.7\d\d\d.*: the scheme to start from meets it already; give a higher"
    ):
        found("domino", target, limits=limits)
    model, sites, start = sparse()
    exact = start.totals(sites)
    reached = math.floor(exact.sparsity * 10**6) / 10**6
    with pytest.raises(SearchError, match=f"target {reached:g} of params, now .* meets it already"):
        found("erk", reached)
    assert found("erk", reached + 1e-5).totals.sparsity > exact.sparsity
    assert found("erk", 0.5, limits={"params": 0.5, "macs": 0.1}).totals.kept_macs <= 0.1 * exact.macs  # one of two is not met
    with pytest.raises(SearchError, match="meets it already"):
        DominoSearch(model, 0.5, sites=sites, within=start)
    assert not any(True for _ in masked_sites(model)), "the model was not touched"


def test_a_start_of_another_model_or_of_other_groups_is_refused() -> None:
    model, sites, _ = sparse()
    with pytest.raises(SchemeError, match=r"nowhere\.weight"):
        find_scheme(model, sites=sites, target=0.9, within=Scheme({"nowhere.weight": "4:16"}))
    flat = Scheme.uniform(sites, "2:16", layout="flat")
    with pytest.raises(SearchError, match=r"stem\.conv\.weight: .* give layout='flat' \(--layout flat\)"):
        find_scheme(model, sites=sites, target=0.9, within=flat)
    check_within(find_scheme(model, sites=sites, target=0.9, within=flat, layout="flat").scheme, flat, sites)
    short = Scheme.uniform(sites, "3:24", remainder="short")
    with pytest.raises(SearchError, match=r"remainder='short'"):
        find_scheme(model, sites=sites, target=0.9, m=24, within=short)
    check_within(find_scheme(model, sites=sites, target=0.9, m=24, remainder="short", within=short).scheme, short, sites)


def test_erk_is_capped_where_the_start_is() -> None:
    _, sites, start = sparse()
    problem = make_problem(sites, target=0.85, within=start)
    densities = {i: 1 - sparsity for i, sparsity in erk_sparsities(problem).items()}
    most = {i: problem.options[i][-1].density for i in problem.free}
    assert all(densities[i] <= most[i] + 1e-12 for i in densities)
    assert any(densities[i] == pytest.approx(most[i]) for i in densities)
    fixed = sum(start.kept(site) for i, site in enumerate(sites) if i not in problem.free)
    total = fixed + sum(densities[i] * sites.sites[i].weights for i in densities)
    assert total == pytest.approx(0.15 * sites.weights)


def lower_half(values: list[float]) -> float:
    """Mean of the smaller half; 0 for nothing."""
    values = sorted(values)[: max(1, len(values) // 2)]
    return sum(values) / max(1, len(values))


def groups_of(weight: Tensor, m: int) -> list[list[float]]:
    return weight.detach().abs().movedim(1, -1).reshape(-1, m).tolist()


@pytest.mark.parametrize("m", [16, 32, 8])
def test_thresholds_are_of_the_lower_half_of_what_is_kept(m: int) -> None:
    model, sites, start = sparse()
    search = DominoSearch(bake(model), 0.85, sites=sites, within=start, m=m)
    for name, first in search.intermediate.items():
        assert first == -(-start[name].n * m // start[name].m)
        site = sites[name]
        weight = dict(search.model.named_parameters())[name]
        expected = []
        for group in groups_of(weight, m):
            half = lower_half(sorted(group, reverse=True)[:first])
            expected.append(half or lower_half([value for value in group if value]) or torch.inf)
        got = thresholds_of(search.model, site)[0]
        torch.testing.assert_close(got.sort()[0], torch.tensor(expected).sort()[0])
        assert bool((got > 0).all())
    if m >= 16:  # nested groups: the first masks drop nothing
        plain = dict(model.named_parameters())
        for masked in masked_sites(search.model):
            assert torch.equal(getattr(masked.owner, masked.attr), plain[masked.spec.name]), masked.spec.name
    search.detach()


def loop(model: nn.Module, example: Tensor, target: float, limit: int = 400, **options: Any) -> DominoSearch:
    """The published loop in a hurry, on the digits where they fit and on noise otherwise."""
    search = DominoSearch(model, target, example_input=example, **(FAST | options))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator, (x, y) = torch.Generator().manual_seed(0), load_digits_data()[:2]
    for _ in islice(iter(int, 1), limit):
        index = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[index].reshape(-1, *example.shape[1:])), y[index]).backward()
        search.step()
        optimizer.step()
        if search.done:
            return search
    raise AssertionError(f"stuck after {limit} iterations: {search.intermediate}, {search.shares}")


@pytest.mark.parametrize("m", [16, 32, 8])
@pytest.mark.parametrize("kind", ["params", "macs"])
def test_the_loop_ends_within_the_budget_and_the_start(kind: Any, m: int) -> None:
    model, sites, start = sparse()
    search = loop(bake(model).train(), torch.zeros(2, 1, 8, 8), TARGETS[kind], budget=kind, m=m, within=start)
    check_within(search.scheme, start, sites)
    totals = search.scheme.totals(sites)
    assert (totals.sparsity if kind == "params" else totals.mac_sparsity) >= TARGETS[kind]
    assert all(weight.isfinite().all() for weight in search.model.parameters())
    fixed = [masked for masked in masked_sites(search.model) if masked.spec.name == "classifier.weight"]
    if m == 16:  # 1:16 has no choice, and is trained under its mask all the same
        assert [str(masked.spec.pattern) for masked in fixed] == ["1:16"]
    state = search.state_dict()
    again = DominoSearch(bake(model), TARGETS[kind], sites=sites, budget=kind, m=m, within=start, **FAST)
    again.load_state_dict(state)
    assert (again.scheme, again.committed) == (search.scheme, search.committed)


ZEROS = {
    "pruned": (64, {}, lambda w: bake(transform(w, "4:16", example_input=torch.zeros(2, 64)))),
    "half of the groups are zeros": (64, {}, lambda w: _zeroed(w, 2)),
    "zeros only": (64, {}, lambda w: _zeroed(w, 1)),
    "short groups": (64, {"remainder": "short", "m": 48}, lambda w: w),
}


def _zeroed(model: nn.Module, every: int) -> nn.Module:
    with torch.no_grad():
        model[1].weight[::every] = 0
    return model


@pytest.mark.parametrize("case", ZEROS)
def test_zeros_without_a_scheme_do_not_hold_the_loop_up(case: str) -> None:
    width, options, prepare = ZEROS[case]
    model = prepare(nn.Sequential(nn.Flatten(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10)))
    assert find_scheme(model, target=0.8, example_input=torch.zeros(2, width), **options).totals.sparsity >= 0.8
    search = loop(model, torch.zeros(2, width), 0.8, **options)
    assert search.scheme.totals(search.sites).sparsity >= 0.8


def test_words() -> None:
    with pytest.raises(SearchError, match=re.escape("target 0.95 of params is out of reach")):
        found("domino", 0.95)
