"""Laws of Domino: the events of domino.md section 5, told again group by group, and the penalty factors worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from small import MODELS, searched
from torch import Tensor, nn

from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.passes.transform import transform
from nmfx.search.finder import find_scheme
from nmfx.search.methods.domino import WEIGHTS, domino, penalties
from nmfx.search.methods.erk import erk_sparsities
from nmfx.search.problem import Problem, make_problem
from nmfx.search.tables import Tables

# The plain restatement, from the text alone: domino.md, sections 2 to 6.


class Layer:
    """One layer of the restatement: its groups, its thresholds, N and n, and how far it has shrunk."""

    def __init__(self, weight: Tensor, macs: int, m: int) -> None:
        self.shape, self.numel, self.macs, self.m = tuple(weight.shape), weight.numel(), macs, m
        out, length = weight.shape[:2]
        lines = weight.detach().double().abs().reshape(out, length, -1)
        self.groups = [
            sorted(lines[o, start : start + m, k].tolist(), reverse=True)
            for o in range(out)
            for k in range(lines.shape[2])
            for start in range(0, length, m)
        ]
        self.thresholds = [sum(group[-(m // 2) :]) / (m // 2) for group in self.groups]
        self.n, self.committed, self.shrunk = m, m, 0.0
        self.tips = {}
        reached = 0.0  # nothing can happen before the search begins, and q is non-decreasing as n falls
        for n in range(m, 1, -1):
            logs = sorted(math.log(g[n - 1] / t) for g, t in zip(self.groups, self.thresholds, strict=True))
            agreed = next(value for index, value in enumerate(logs, 1) if index >= 0.75 * len(logs))
            reached = max(reached, agreed)
            self.tips[n] = reached

    @property
    def density(self) -> float:
        return self.committed / self.m


def erk_by_the_text(layers: list[Layer], dense_weights: int, target: float) -> list[float]:
    """Density in proportion to sum(shape) / prod(shape); what exceeds 1 is fixed dense, the rest is scaled anew."""
    fixed: set[int] = set()
    while True:
        room = (1 - target) * (dense_weights + sum(x.numel for x in layers)) - dense_weights
        room -= sum(layers[i].numel for i in fixed)
        rest = [i for i in range(len(layers)) if i not in fixed]
        scale = room / sum(sum(layers[i].shape) for i in rest)  # of raw * numel = sum(shape)
        density = {i: scale * sum(layers[i].shape) / layers[i].numel for i in rest}
        over = {i for i in rest if density[i] > 1}
        if not over:
            return [0.0 if i in fixed else 1 - density[i] for i in range(len(layers))]
        fixed |= over


def etas_by_the_text(layers: list[Layer], erk: list[float], b1: float, b2: float) -> list[float]:
    c = [x.macs * x.density for x in layers]
    r = [e - (1 - x.density) for x, e in zip(layers, erk, strict=True)]
    if not any(value > 0.01 for value in r):
        r = [0.0] * len(r)
    largest = max(abs(value) for value in r) or 1.0
    return [b1 * mine / max(c) + b2 * far / largest for mine, far in zip(c, r, strict=True)]


def commits_by_the_text(
    layers: list[Layer], fixed: tuple[int, int], kind: str, target: float, candidates: list[int]
) -> list[tuple[int, int, float]]:
    """(layer, N, time) of every commit; `fixed` are weights and MACs of the layers that stay dense."""
    b1, b2 = (0.5, 0.5) if kind == "params" else (0.8, 0.2)

    def kept() -> float:
        return fixed[kind == "macs"] + sum((x.numel if kind == "params" else x.macs) * x.density for x in layers)

    dense, commits, time = kept(), [], 0.0
    erk = erk_by_the_text(layers, fixed[0], target)
    eta = etas_by_the_text(layers, erk, b1, b2)
    while kept() > (1 - target) * dense * (1 + 1e-12):
        open_layers = [i for i, x in enumerate(layers) if x.n > 1 and eta[i] > 0]
        assert open_layers, "the text does not say what happens then"
        waits = {i: max(0.0, (layers[i].tips[layers[i].n] - layers[i].shrunk) / eta[i]) for i in open_layers}
        first = min(waits, key=lambda i: (waits[i], i))
        time += waits[first]
        for x, rate in zip(layers, eta, strict=True):
            x.shrunk += rate * waits[first]
        layers[first].n -= 1
        if layers[first].n in candidates:
            layers[first].committed = layers[first].n
            commits.append((first, layers[first].n, time))
            eta = etas_by_the_text(layers, erk, b1, b2)
    return commits


class Net(nn.Module):
    """Five sites that 8 divides, and a stem that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 32, 1, stride=2)
        self.c, self.d, self.e = nn.Conv2d(32, 16, 3, padding=1), nn.Linear(16, 48), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(torch.relu(self.d(self.c(self.b(self.a(self.stem(x)))).mean((2, 3)))))


def trained_like(seed: int) -> nn.Module:
    """Heavy-tailed weights on several scales, in double precision."""
    torch.manual_seed(seed)
    model = Net().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) ** (1 + 2 * int(torch.randint(2, ()))) * torch.rand(()))
    return model


@pytest.mark.parametrize(
    ("m", "candidates"),
    [(8, None), (8, [1, 3, 5, 7]), (8, [2]), (4, None), (16, [1, 2, 4, 8])],
    ids=["8", "odd", "one", "4", "16"],
)
@pytest.mark.parametrize("target", [0.3, 0.5, 0.65])
@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("seed", range(2))
def test_domino_is_the_text(seed: int, kind: Any, target: float, m: int, candidates: list[int] | None) -> None:
    model = trained_like(seed)
    sites = find_sites(model, torch.empty(1, 3, 12, 12))
    free = [site for site in sites if site.length % m == 0]
    fixed = [site for site in sites if site not in free]
    allowed = candidates or [1 << k for k in range(6) if 1 << k < m]
    weights = dict(model.named_parameters())
    layers = [Layer(weights[site.name], site.macs, m) for site in free]
    least = {"params": sum(s.weights for s in fixed), "macs": sum(s.macs for s in fixed)}[kind]
    least += sum((s.weights if kind == "params" else s.macs) * min(allowed) / m for s in free)
    if 1 - least / (sites.weights if kind == "params" else sites.macs) < target:
        pytest.skip("out of reach")
    sums = sum(s.weights for s in fixed), sum(s.macs for s in fixed)
    expected = commits_by_the_text(layers, sums, kind, target, allowed)
    result = find_scheme(model, method="domino", target=target, budget=kind, m=m, candidates=candidates, sites=sites)
    found = [event for event in result.events if not event.reason.startswith("trim")]
    assert [(event.site, event.after.n) for event in found] == [(free[i].name, n) for i, n, _ in expected]
    assert [event.time for event in found] == pytest.approx([time for _, _, time in expected], rel=1e-9)
    assert found


@pytest.mark.parametrize("name", MODELS)
def test_a_trim_only_gives_back(name: str) -> None:
    model, sites = searched(name)
    for target in (0.3, 0.5, 0.65):
        problem = make_problem(sites, target=target, m=16)
        outcome = domino(problem, Tables(problem, model))
        trims = [event for event in outcome.events if event.reason.startswith("trim")]
        assert outcome.events[len(outcome.events) - len(trims) :] == tuple(trims)
        steps = [event.after.density > event.before.density for event in outcome.events]
        assert steps == [False] * (len(steps) - len(trims)) + [True] * len(trims)
        last = outcome.events[len(outcome.events) - len(trims) - 1]
        assert last.cost <= problem.budget.limit, "the budget holds before the trim begins"


def test_scale_and_sign_of_a_site_do_not_matter() -> None:
    """q is a ratio within a group: what counts is the shape of the magnitudes, not their scale."""
    model = trained_like(0)
    sites = find_sites(model, torch.empty(1, 3, 12, 12))
    first = find_scheme(model, method="domino", target=0.6, m=8, sites=sites)
    with torch.no_grad():
        for index, site in enumerate(sites):
            weight = dict(model.named_parameters())[site.name]
            weight.mul_(2.0 ** (3 * index)).mul_(torch.randint(2, weight.shape) * 2 - 1)
    assert find_scheme(model, method="domino", target=0.6, m=8, sites=sites).events == first.events


def test_a_site_of_equal_weights_goes_first() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(0.5)
    result = find_scheme(model, method="domino", target=0.4, m=8, example_input=torch.empty(1, 32))
    assert [(event.site, event.after.n, event.time) for event in result.events[:2]] == [("1.weight", 4, 0), ("1.weight", 2, 0)]


# The penalty factors by hand.


class Three(nn.Module):
    """12 x 8 weights read once, 8 x 8 read at four positions, 4 x 8 read once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Conv1d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[:, :, 0]).sum(1, keepdim=True) + self.c(self.b(x).mean(2))


def three(kind: Any, target: float = 0.5) -> Problem:
    sites = find_sites(Three(), torch.empty(1, 8, 4))
    assert [(site.weights, site.macs) for site in sites] == [(96, 96), (64, 256), (32, 32)]
    return make_problem(sites, target=target, budget=kind, m=8)


def test_the_weights_of_the_two_terms() -> None:
    assert WEIGHTS == {"params": (0.5, 0.5), "macs": (0.8, 0.2), "bytes": (0.5, 0.5), "latency": (0.8, 0.2)}


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_erk_of_three_sites_by_hand(kind: Any) -> None:
    # sum(shape): 20, 17 (8 + 8 + 1), 12; at half of 192 weights the scale is 96 / 49.
    erk = erk_sparsities(three(kind))
    assert erk == pytest.approx({0: 1 - 96 / 49 * 20 / 96, 1: 1 - 96 / 49 * 17 / 64, 2: 1 - 96 / 49 * 12 / 32})


@pytest.mark.parametrize(("kind", "b1", "b2"), [("params", 0.5, 0.5), ("macs", 0.8, 0.2)], ids=["params", "macs"])
def test_eta_of_three_sites_by_hand(kind: Any, b1: float, b2: float) -> None:
    problem, erk = three(kind), {0: 0.6, 1: 0.5, 2: 0.3}
    dense = [3, 3, 3]  # options 1:8, 2:8, 4:8, dense
    assert penalties(problem, dense, erk) == pytest.approx(
        {0: b1 * 96 / 256 + b2 * 1.0, 1: b1 * 1.0 + b2 * 0.5 / 0.6, 2: b1 * 32 / 256 + b2 * 0.5}
    )
    # Site 1 at 1:8 keeps 32 MACs and is 0.375 past its ERK sparsity; site 2 at 4:8 is 0.2 past.
    assert penalties(problem, [3, 0, 2], erk) == pytest.approx(
        {0: b1 * 1.0 + b2 * 1.0, 1: b1 * 32 / 96 - b2 * 0.375 / 0.6, 2: b1 * 16 / 96 - b2 * 0.2 / 0.6}
    )
    # The largest magnitude may be a negative one.
    assert penalties(problem, [2, 0, 0], erk) == pytest.approx(
        {0: b1 * 1.0 + b2 * 0.1 / 0.575, 1: b1 * 32 / 48 - b2 * 0.375 / 0.575, 2: b1 * 4 / 48 - b2 * 0.575 / 0.575}
    )
    # No site is more than 0.01 below its ERK sparsity: the ERK term is dropped (the published code crashes there).
    assert penalties(problem, [1, 2, 2], {0: 0.755, 1: 0.5, 2: 0.3}) == pytest.approx(
        {0: b1 * 24 / 128, 1: b1, 2: b1 * 16 / 128}
    )


def test_eta_falls_where_a_site_commits() -> None:
    """Why it is called Domino: the penalty of a committed site falls, so that the next one tips."""
    problem = three("params")
    erk = erk_sparsities(problem)
    before, after = penalties(problem, [3, 3, 3], erk), penalties(problem, [3, 2, 3], erk)
    assert after[1] < before[1]
    assert after[0] > before[0]


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero groups": lambda w: w * (torch.arange(len(w)) % 2).view(-1, *[1] * (w.dim() - 1)),
    "pruned 2 of 16": lambda w: torch.where(w.abs() >= w.abs().topk(2, dim=1)[0][:, -1:], w, 0 * w) if w.shape[1] > 2 else w,
    "all zero": torch.zeros_like,
    "ties": torch.sign,
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("kind", ["params", "macs"])
def test_zeros_and_ties_do_no_harm(kind: Any, draw: str) -> None:
    model, sites = trained_like(0), None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(DRAWS[draw](parameter))
    sites = find_sites(model, torch.empty(1, 3, 12, 12))
    problem = make_problem(sites, target=0.6, budget=kind, m=8)
    tables = Tables(problem, model)
    outcome = domino(problem, tables)
    for points in tables.tipping_points:
        assert all(0 <= a <= b < math.inf for a, b in pairwise(points))
    assert problem.left(outcome.choice) >= 0
    again = find_scheme(transform(model, "1:8", sites=sites), method="domino", target=0.6, budget=kind, m=8, sites=sites)
    assert again.events == outcome.events


def test_sites_without_a_choice_take_no_part() -> None:
    model, sites = searched("mixed")
    assert isinstance(sites, Sites)
    problem = make_problem(sites, target=0.3, keep_dense=["deep*"])
    assert set(penalties(problem, [len(o) - 1 for o in problem.options], erk_sparsities(problem))) == set(problem.free)
    outcome = domino(problem, Tables(problem, model))
    assert all(outcome.choice[i] == 0 for i in range(len(sites)) if i not in problem.free)
