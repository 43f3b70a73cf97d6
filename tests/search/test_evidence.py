"""Laws of searches that look at pictures, of several budgets at once, and of what a site may be given."""

from __future__ import annotations

import itertools
import math
import random
from functools import cache
from typing import Any

import pytest
import torch
from cases import cases
from small import MODELS, searched
from torch import Tensor, nn

from nmfx.demo.digits import load_demo
from nmfx.errors import NmfxError, SearchError
from nmfx.models.census import find_sites
from nmfx.models.site import weight_of
from nmfx.passes.calibration import Calibration
from nmfx.search.budget import Budget
from nmfx.search.domino_loop import DominoSearch
from nmfx.search.finder import find_scheme
from nmfx.search.problem import make_problem
from nmfx.search.solver.lagrange import solve_all
from nmfx.search.tables import Tables
from nmfx.search.trial import Trial, loss_on
from nmfx.settings.target import parse_limit, parse_target
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.packing import pack
from nmfx.sparsity.pattern import Pattern


@cache
def digits() -> tuple[tuple[Tensor, Tensor], ...]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    pictures, labels = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(y)
    return tuple(zip(pictures[:192].split(32), labels[:192].split(32), strict=True))


@cache
def demo() -> tuple[nn.Module, Any]:
    model = load_demo(trained=True)
    return model, find_sites(model, torch.empty(1, 1, 8, 8))


# --- budgets


@pytest.mark.parametrize(("text", "kept"), [("8x", 1 / 8), ("0.875", 0.125), (0.5, 0.5), ("1x", 1.0), ("2.5X", 0.4), (0, 1.0)])
def test_targets_are_sparsities_or_times_fewer(text: Any, kept: float) -> None:
    assert float(1 - parse_target(text)) == pytest.approx(kept, abs=1e-12)


@pytest.mark.parametrize(("text", "kept"), [("8x", 1 / 8), ("0.125", 0.125), (0.5, 0.5), (1, 1.0), ("3x", 1 / 3)])
def test_limits_are_shares_to_keep_or_times_fewer(text: Any, kept: float) -> None:
    assert float(1 - parse_limit(text)) == pytest.approx(kept, abs=1e-12)


@pytest.mark.parametrize("text", ["", "x", "0x", "0", "-1", "1.5", "nan", "0.5x", None])
def test_what_is_no_limit(text: Any) -> None:
    with pytest.raises(SearchError, match="expected"):
        parse_limit(text)


def test_three_times_fewer_is_exact() -> None:
    assert Budget("params", parse_target("3x"), 999_999_999).limit == 333_333_333


@cases(["domino", "knapsack", "erk", "uniform"], arg="method")
@cases(list(MODELS), arg="name")
def test_bytes_are_those_of_the_packed_weights(name: str, method: str) -> None:
    model, sites = searched(name)
    result = find_scheme(model, sites=sites, target="2x", budget="bytes", method=method)
    total = 0
    for site in sites:
        weight = weight_of(model, site).detach()
        if site.name in result.scheme:
            n, grouping = result.scheme[site.name].n, result.scheme.grouping(site)
            values, positions = pack(weight, make_mask(weight, n, grouping), n, grouping)
            total += values.nbytes + positions.nbytes
        else:
            total += weight.nbytes
    assert result.budget.dense == sum(site.bytes for site in sites)
    assert total + result.left == result.budget.limit
    assert result.left >= 0


@cases(["domino", "knapsack", "erk", "uniform"], arg="method")
@cases(list(MODELS), arg="name")
@pytest.mark.parametrize("first", ["params", "macs"])
def test_two_limits_hold_at_once(name: str, method: str, first: str) -> None:
    model, sites = searched(name)
    limits = {"params": 0.6, "macs": "1.5x"}
    limits = limits if first == "params" else dict(reversed(limits.items()))
    result = find_scheme(model, sites=sites, limits=limits, method=method)
    assert result.budget.kind == first
    totals = result.totals
    assert totals.kept <= 0.6 * totals.weights
    assert totals.kept_macs <= totals.macs / 1.5 + len(sites)  # MACs of a site are rounded down
    assert result.lefts == tuple(b.limit - k for b, k in zip(result.budgets, _spent(result, first), strict=True))


def _spent(result: Any, first: str) -> tuple[int, int]:
    macs = sum(s.macs * result.scheme.kept(s) // s.weights for s in result.sites)
    return (result.totals.kept, macs) if first == "params" else (macs, result.totals.kept)


@pytest.mark.parametrize("seed", range(40))
def test_two_limits_are_near_the_optimum_and_the_gap_is_true(seed: int) -> None:
    """Against all combinations, on problems small enough to enumerate."""
    draw = random.Random(seed)
    shape = [draw.randint(2, 4) for _ in range(6)]
    first, second = ([sorted(draw.randint(1, 40) for _ in range(n)) for n in shape] for _ in range(2))
    losses = [sorted((draw.random() for _ in range(n)), reverse=True) for n in shape]
    limits = [int(draw.uniform(0.4, 0.8) * sum(row[-1] for row in table)) for table in (first, second)]
    within = [
        options
        for options in itertools.product(*map(range, shape))
        if all(
            sum(r[o] for r, o in zip(t, options, strict=True)) <= limit
            for t, limit in zip((first, second), limits, strict=True)
        )
    ]
    if not within:
        with pytest.raises(SearchError):
            solve_all(losses, (first, second), limits)
        return
    optimum = min(math.fsum(r[o] for r, o in zip(losses, options, strict=True)) for options in within)
    found = solve_all(losses, (first, second), limits)
    assert found.options in within
    assert found.loss - found.gap - 1e-9 <= optimum <= found.loss + 1e-12


# --- what a site may be given


def test_two_four_for_hardware() -> None:
    model, sites = searched("mixed")
    result = find_scheme(model, sites=sites, target=0.4, method="knapsack", patterns=["2:4"])
    assert {str(p) for p in result.scheme.values()} == {"2:4"}


@cases(["domino", "knapsack", "erk", "uniform"], arg="method")
def test_no_site_is_below_its_least_density(method: str) -> None:
    model, sites = searched("digits")
    rules = {sites.sites[1].name: 0.5, "*": 0.25}
    result = find_scheme(model, sites=sites, target=0.6, method=method, min_density=rules)
    for site in sites:
        assert result.scheme.get(site.name, Pattern.DENSE).density >= (0.5 if site.name == sites.sites[1].name else 0.25)


def test_several_m_offer_the_knapsack_more() -> None:
    model, sites = searched("timm")
    single = [find_scheme(model, sites=sites, target=0.7, method="knapsack", m=m).loss for m in (8, 16, 32)]
    mixed = find_scheme(model, sites=sites, target=0.7, method="knapsack", m=(8, 16, 32))
    assert mixed.loss <= min(single)
    assert len({p.m for p in mixed.scheme.values()}) > 1


@cases(["domino", "erk", "uniform"], arg="method")
def test_several_m_give_the_others_the_largest_that_fits(method: str) -> None:
    model, sites = searched("mixed")
    result = find_scheme(model, sites=sites, target=0.5, method=method, m=(4, 8, 16))
    for name, pattern in result.scheme.items():
        assert pattern.m == max(m for m in (4, 8, 16) if sites[name].length % m == 0)


TWO = torch.zeros(2, dtype=torch.int64)
BAD = {
    "glob": ({"min_density": {"nowhere*": 0.5}}, "min-density: no site matches 'nowhere\\*'"),
    "density": ({"min_density": 1.5}, "min-density 1.5: expected a density in 0..1"),
    "sensitivity": ({"sensitivity": "gradeint"}, "did you mean 'gradient'"),
    "no data": ({"method": "knapsack", "sensitivity": "gradient"}, "give data="),
    "empty data": ({"method": "knapsack", "sensitivity": "gradient", "data": []}, "no batches"),
    "no labels": ({"method": "knapsack", "sensitivity": "gradient", "data": [torch.zeros(1, 1, 8, 8)]}, "needs labels"),
    "no tensors": ({"method": "knapsack", "sensitivity": "gradient", "data": ["picture"]}, "expected batches"),
    "NaN": ({"method": "knapsack", "sensitivity": "measured", "data": [(torch.full((2, 1, 8, 8), torch.nan), TWO)]}, "NaN"),
    "shape": ({"method": "knapsack", "sensitivity": "activation", "data": [torch.zeros(2, 3, 8, 8)]}, "cannot be run on it"),
    "label": ({"method": "spdy", "data": [(torch.zeros(2, 1, 8, 8), TWO + 100)]}, "labels 0..classes-1"),
    "option": ({"min_densty": 0.5}, "unknown option 'min_densty'.*did you mean 'min_density'"),
    "method option": ({"method": "spdy", "options": {"secs": 2}}, "options of method 'spdy'.*secs"),
    "spdy": ({"method": "spdy"}, "give data="),
    "kind": ({"limits": {"flops": 0.5}}, "budget 'flops'"),
    "m": ({"m": (16, 65)}, "m = 65"),
}


@cases(BAD)
def test_what_cannot_be_asked_says_why(name: str) -> None:
    (model, sites), (options, message) = demo(), BAD[name]
    with pytest.raises(SearchError, match=message):
        find_scheme(model, sites=sites, **{"target": 0.5, **options})


# --- sensitivities


@pytest.mark.parametrize("sensitivity", ["activation", "corrected", "gradient", "measured"])
def test_a_table_is_finite_zero_for_dense_and_leaves_the_model_alone(sensitivity: str) -> None:
    model, sites = demo()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    problem = make_problem(sites, target=0.5)
    table = Tables(problem, model, calibration=Calibration.of(digits())).table(sensitivity)
    assert [len(row) for row in table] == [len(options) for options in problem.options]
    assert all(row[-1] == 0 and all(value >= 0 and math.isfinite(value) for value in row) for row in table)
    assert any(value > 0 for row in table for value in row)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert find_scheme(model, sites=sites, target=0.5, method="knapsack", sensitivity=sensitivity, data=digits()).left >= 0


def test_activation_sensitivity_is_the_output_error_of_uncorrelated_inputs() -> None:
    """A linear and a convolution fed independent noise: the table is the share of the output's energy that is lost."""
    torch.manual_seed(0)
    noise = lambda *shape: torch.randn(shape) * torch.linspace(0.1, 3, shape[1]).view(-1, *[1] * (len(shape) - 2))  # noqa: E731
    for layer, x in (
        (nn.Linear(32, 64, bias=False), noise(20_000, 32)),
        (nn.Conv2d(16, 32, 1, bias=False), noise(400, 16, 7, 7)),
        (nn.Conv2d(32, 8, 1, groups=2, bias=False), noise(400, 32, 7, 7)),
        (nn.ConvTranspose2d(16, 8, 1, bias=False), noise(400, 16, 7, 7)),
    ):
        model = nn.Sequential(layer)
        sites = find_sites(model, x[:1])
        problem = make_problem(sites, target=0.4, m=8)
        batches = ((x, torch.zeros(len(x), dtype=torch.long)),)
        table = Tables(problem, model, calibration=Calibration(batches)).table("activation")
        weight, dense = weight_of(model, sites.sites[0]).detach(), model(x).detach()
        for option, pattern in enumerate(problem.options[0][:-1]):
            kept = weight * make_mask(weight, pattern.n, problem.grouping(0, pattern))
            lost = torch.func.functional_call(model, {"0.weight": kept}, (x,)).detach() - dense
            assert table[0][option] == pytest.approx(float(lost.square().sum() / dense.square().sum()), rel=0.05)


def test_corrected_sensitivity_is_what_correction_leaves() -> None:
    """Below the error of plain masking, falling with density, and nearly nothing where inputs repeat one another."""
    torch.manual_seed(0)
    for layer, size in (
        (nn.Linear(16, 8), (16,)),
        (nn.Conv2d(16, 8, 3, padding=1, bias=False), (16, 6, 6)),
        (nn.Conv2d(32, 8, 3, groups=2), (32, 6, 6)),
        (nn.ConvTranspose2d(16, 8, 2, 2), (16, 5, 5)),
    ):
        model = nn.Sequential(layer)
        twice = torch.randn(64, size[0] // 2, *size[1:]).repeat_interleave(2, 1)  # half of the columns are enough
        batches = tuple((x, torch.zeros(len(x), dtype=torch.long)) for x in twice.split(8))
        problem = make_problem(find_sites(model, twice[:1]), target=0.4, m=4)
        tables = Tables(problem, model, calibration=Calibration(batches))
        corrected, plain = tables.table("corrected")[0], tables.table("activation")[0]
        assert corrected == sorted(corrected, reverse=True)
        assert all(one < other for one, other in zip(corrected[:-1], plain[:-1], strict=True))
        assert corrected[-2] < 0.05  # 2:4, so one of each two


def test_gradient_sensitivity_is_its_definition() -> None:
    model, sites = demo()
    problem, batches = make_problem(sites, target=0.5), digits()[:3]
    table = Tables(problem, model, calibration=Calibration(batches)).table("gradient")
    i = problem.free[1]
    weight, pattern = weight_of(model, sites.sites[i]), problem.options[i][1]
    change = -(weight * ~make_mask(weight, pattern.n, problem.grouping(i, pattern))).detach()
    expected = 0.0
    for x, y in batches:
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model.eval()(x), y), [weight])
        expected += len(y) / 2 * float((gradient * change).sum()) ** 2 / len(batches)
    assert table[i][1] == pytest.approx(expected, rel=1e-4)


def test_measured_sensitivity_is_measured() -> None:
    model, sites = demo()
    problem, evidence = make_problem(sites, target=0.5), Calibration(digits())
    trial = Trial(problem, model, evidence)
    i = problem.free[0]
    table = Tables(problem, model, calibration=evidence).table("measured")
    assert table[i][0] == max(0.0, trial.loss({i: problem.options[i][0]}) - trial.loss({}))


# --- whole schemes


def test_a_trial_is_the_loss_of_the_baked_recalibrated_model() -> None:
    from nmfx.passes.baking import bake
    from nmfx.passes.statistics import recalibrate_bn
    from nmfx.passes.transform import transform

    model, sites = demo()
    problem, evidence = make_problem(sites, target=0.5), Calibration(digits())
    trial = Trial(problem, model, evidence)
    trial.loss([0] * len(sites))  # what was tried before leaves no trace
    choice = [min(1, len(options) - 1) for options in problem.options]
    scheme = {s.name: o[c] for s, o, c in zip(sites, problem.options, choice, strict=True) if not o[c].is_dense}
    baked = bake(transform(model, scheme, sites=sites))
    recalibrate_bn(baked, evidence.for_statistics)
    assert trial.loss(choice) == pytest.approx(loss_on(baked.eval(), evidence.held_back), rel=1e-6)


def test_spdy_is_never_worse_than_its_starts_on_what_it_scores() -> None:
    model, sites = demo()
    result = find_scheme(model, sites=sites, target=0.8, method="spdy", data=digits(), options={"steps": 8})
    again = find_scheme(model, sites=sites, target=0.8, method="spdy", data=digits(), options={"steps": 8})
    assert result.scheme == again.scheme
    assert result.left >= 0
    problem, evidence = make_problem(sites, target=0.8, mixed=True), Calibration.of(digits())
    trial = Trial(problem, model, evidence)

    def score(scheme: Any) -> float:
        return trial.loss({i: scheme[s.name] for i, s in enumerate(sites) if s.name in scheme})

    for sensitivity in ("weight", "activation", "gradient"):
        other = find_scheme(model, sites=sites, target=0.8, method="knapsack", sensitivity=sensitivity, data=digits())
        assert score(result.scheme) <= score(other.scheme) + 1e-6


def test_a_search_that_was_not_asked_for_is_refused() -> None:
    model = load_demo(trained=True)
    search = DominoSearch(model, 0.75, example_input=torch.empty(1, 1, 8, 8), decay=5.0)
    state = search.state_dict()
    search.detach()
    with pytest.raises(SearchError, match="detached"):
        search.state_dict()
    other = DominoSearch(model, 0.5, example_input=torch.empty(1, 1, 8, 8))
    for wrong in (state, {}):
        with pytest.raises(SearchError, match="the state is of another search"):
            other.load_state_dict(wrong)
    with pytest.raises(NmfxError, match=r"detach\(\) the search before"):
        DominoSearch(model, 0.5, example_input=torch.empty(1, 1, 8, 8))
    other.detach()
    for bad in ({"eta": "x"}, {"vote_every": 0}, {"bogus": 1}, {"quorum": 2.0}):
        with pytest.raises(SearchError):
            DominoSearch(model, 0.5, example_input=torch.empty(1, 1, 8, 8), **bad)
    assert type(model.get_submodule("block1.conv")) is nn.Conv2d


def test_measured_losses_of_noise_still_use_the_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
    data = [(torch.randn(64, 32), torch.randint(0, 8, (64,))) for _ in range(4)]
    problem = make_problem(find_sites(model, data[0][0]), target=0.5, m=8)
    result = find_scheme(model, example_input=data[0][0], target=0.5, m=8, method="knapsack", sensitivity="measured", data=data)
    steps = [row[o + 1] - row[o] for row in problem.costs for o in range(len(row) - 1)]
    assert result.left < max(steps)
