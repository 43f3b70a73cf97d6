"""Laws of the knapsack: as good as trying everything, the cheapest of equals, the same twice, honest when cut short."""

from __future__ import annotations

import math
import random
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmfx.errors import SearchError
from nmfx.search.solver import knapsack
from nmfx.search.solver.knapsack import Choice, solve

Table = tuple[list[list[float]], list[list[int]]]

LOSSES = {
    "whole": lambda rng, cost: rng.randrange(6),
    "fine": lambda rng, cost: rng.random() * 10 ** rng.uniform(-6, 3),
    "convex": lambda rng, cost: 8.0 / (cost + rng.randrange(1, 3)),
    "linear": lambda rng, cost: 100.0 - cost,
    "signed": lambda rng, cost: rng.uniform(-1, 1),
    "forbidding": lambda rng, cost: rng.choice([math.inf, rng.randrange(9)]),
    "far": lambda rng, cost: rng.choice([1e300, 1e9, 1.0, 1e-9, 0.0]),
}
COSTS = {
    "tiny": lambda rng, number: rng.randrange(4),
    "doubling": lambda rng, number: rng.choice([36, 64, 100]) << number,
    "huge": lambda rng, number: rng.randrange(10**13),
}


def draw(rng: random.Random, losses: str, costs: str, sites: int, options: int) -> Table:
    rows = [[COSTS[costs](rng, number) for number in range(rng.randint(1, options))] for _ in range(sites)]
    return [[LOSSES[losses](rng, cost) for cost in row] for row in rows], rows


def try_all(losses: list[list[float]], costs: list[list[int]], budget: int) -> list[tuple[float, int, tuple[int, ...]]]:
    """Loss, cost and options of every choice within the budget that loses least, cheapest first."""
    found: list[tuple[float, int, tuple[int, ...]]] = []
    for options in product(*map(range, map(len, losses))):
        cost = sum(row[i] for row, i in zip(costs, options, strict=True))
        if cost <= budget and (loss := math.fsum(row[i] for row, i in zip(losses, options, strict=True))) < math.inf:
            found.append((loss, cost, options))
    least = min(found, default=(0.0, 0, ()))
    return sorted(choice for choice in found if choice[0] == least[0])


def check(choice: Choice, losses: list[list[float]], costs: list[list[int]], budget: int) -> None:
    assert choice.cost == sum(row[i] for row, i in zip(costs, choice.options, strict=True)) <= budget
    assert choice.loss == math.fsum(row[i] for row, i in zip(losses, choice.options, strict=True))


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("losses", LOSSES)
def test_as_good_as_trying_everything(losses: str, costs: str) -> None:
    rng = random.Random(f"{losses} {costs}")
    for _ in range(20):
        table = draw(rng, losses, costs, sites=rng.randint(1, 6), options=4)
        low, high = sum(map(min, table[1])), sum(map(max, table[1]))
        for budget in {low, low + 1, high - 1, high, *(rng.randint(low, high) for _ in range(2))}:
            best = try_all(*table, budget)
            if not best:
                with pytest.raises(SearchError):
                    solve(*table, budget)
                continue
            choice = solve(*table, budget)
            check(choice, *table, budget)
            assert (choice.loss, choice.gap) == (best[0][0], 0.0)
            if losses != "far":  # there, sums that round to the same float are not equal
                assert choice.cost == best[0][1]


def test_equal_losses_go_to_the_lower_cost_then_to_the_first_option() -> None:
    assert solve([[1, 1, 1, 2]], [[9, 5, 5, 1]], 9).options == (1,)
    assert solve([[3, 2], [3, 2]], [[1, 4], [1, 3]], 5) == Choice((0, 1), 5.0, 4, 0.0)
    assert solve([[2, 1, 0], [2, 1]], [[0, 1, 3], [0, 1]], 3) == Choice((1, 1), 2.0, 2, 0.0)


def test_one_option_leaves_no_choice_and_no_site_costs_nothing() -> None:
    assert solve([[2.5], [4, 1, 0], [0.5]], [[7], [1, 2, 9], [10]], 20) == Choice((0, 1, 0), 4.0, 19, 0.0)
    assert solve([[math.nextafter(1e300, 0)], [1e-300, 0]], [[1], [0, 1]], 1).options == (0, 0)
    assert solve([], [], 0) == Choice((), 0.0, 0, 0.0)


def test_a_large_loss_elsewhere_hides_no_small_one() -> None:
    losses = [[1e12, 3e-9, 1e-9], [1e12, 2e-9, 1e-9], [2e-9, 1e-9]]
    assert solve(losses, [[0, 1, 3], [0, 1, 2], [0, 3]], 4).options == (2, 1, 0)


def test_what_cannot_be_reached_says_what_can() -> None:
    with pytest.raises(SearchError, match=r"budget 9 .* smallest sum of costs is 11"):
        solve([[1, 0], [1, 0]], [[5, 6], [6, 7]], 9)
    with pytest.raises(SearchError, match="smallest sum of costs is 12"):
        solve([[math.inf, 0], [1, 0]], [[5, 6], [6, 7]], 11)


@pytest.mark.parametrize(
    ("row", "message"),
    [([0.0, math.nan], "site 1, option 1: .* nan"), ([-math.inf], "site 1"), ([math.inf], "site 1: none of its 1")],
)
def test_a_loss_that_is_no_number_names_its_site(row: list[float], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        solve([[0.0], row], [[1], [1] * len(row)], 9)


def test_costs_are_whole() -> None:
    with pytest.raises(TypeError):
        solve([[1.0]], [[1.5]], 9)  # type: ignore[list-item]


def realistic(rng: random.Random, sites: int, macs: bool) -> tuple[list[list[float]], list[list[int]], int]:
    losses, costs = [], []
    for _ in range(sites):
        channels = [rng.choice([32, 64, 96, 128, 256, 512]) for _ in "oi"]
        weights = math.prod(channels) * rng.choice([1, 9]) * (rng.choice([7, 14, 28, 56]) ** 2 if macs else 1)
        scale = 10 ** rng.uniform(-4, 2)
        costs.append([weights * n // 16 for n in (1, 2, 4, 6, 8, 16)])
        losses.append([scale * (1 - n / 16) ** 2 * rng.uniform(0.9, 1.1) for n in (1, 2, 4, 6, 8, 16)])
    low, high = sum(map(min, costs)), sum(map(max, costs))
    return losses, costs, rng.randint(low, (low + high) // 2)


@pytest.mark.parametrize("macs", [False, True], ids=["params", "macs"])
@pytest.mark.parametrize("sites", [54, 300])
def test_a_network_is_solved_exactly_and_the_same_each_time(sites: int, macs: bool) -> None:
    losses, costs, budget = realistic(random.Random(sites), sites, macs)
    choice = solve(losses, costs, budget)
    check(choice, losses, costs, budget)
    assert choice.gap == 0.0
    assert solve(losses, costs, budget) == choice
    smaller = solve(losses, costs, choice.cost - 1)
    assert smaller.cost < choice.cost
    assert smaller.loss > choice.loss


def few_states(monkeypatch: pytest.MonkeyPatch, in_all: int) -> None:
    monkeypatch.setattr(knapsack, "DRAFT_STATES", 2)
    monkeypatch.setattr(knapsack, "PART_STATES", 0)
    monkeypatch.setattr(knapsack, "MAX_STATES", in_all)


def test_a_search_that_is_split_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [realistic(random.Random(seed), 12, True) for seed in range(30)]
    whole = [solve(*problem) for problem in problems]
    few_states(monkeypatch, 1 << 22)
    assert [solve(*problem) for problem in problems] == whole


def test_a_search_cut_short_admits_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [realistic(random.Random(seed), 12, True) for seed in range(30)]
    best = [solve(*problem) for problem in problems]
    few_states(monkeypatch, 1)
    cut = [solve(*problem) for problem in problems]
    for problem, low, high in zip(problems, best, cut, strict=True):
        check(high, *problem)
        assert low.loss <= high.loss <= low.loss + high.gap * (1 + 1e-12)
    assert sum(choice.gap > 0 for choice in cut) > 5


rows = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.one_of(st.integers(0, 9), st.floats(0, 100)), min_size=n, max_size=n),
        st.lists(st.integers(0, 40), min_size=n, max_size=n),
    )
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(table=st.lists(rows, min_size=1, max_size=5), share=st.floats(0, 1), cut=st.booleans())
def test_optimal_means_that_trying_everything_finds_nothing_better(table: Any, share: float, cut: bool) -> None:
    losses, costs = [list(map(float, row)) for row, _ in table], [row for _, row in table]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    budget = low + int(share * (high - low))
    with pytest.MonkeyPatch.context() as patch:
        if cut:
            few_states(patch, 1)
        choice = solve(losses, costs, budget)
    best = try_all(losses, costs, budget)[0][0]
    check(choice, losses, costs, budget)
    assert choice.loss - choice.gap <= best * (1 + 1e-12) <= choice.loss * (1 + 1e-12)
    if choice.optimal:
        assert choice.loss <= best * (1 + 1e-12)
    if choice.loss > best * (1 + 1e-9):
        assert not choice.optimal


def correlated(rng: random.Random, sites: int, options: int) -> tuple[list[list[float]], list[list[int]], int]:
    """What a dearer option saves is its price but for a little noise: the hardest kind (Pisinger, 2005)."""
    costs = [sorted(rng.randrange(10**6) for _ in range(options)) for _ in range(sites)]
    losses = [[10.0**6 - cost + rng.uniform(-1000, 1000) for cost in row] for row in costs]
    return losses, costs, sum(map(min, costs)) + (sum(map(max, costs)) - sum(map(min, costs))) // 3


@pytest.mark.parametrize("states", [1, 1 << 10, None], ids=["at once", "early", "as ever"])
@pytest.mark.parametrize("seed", range(3))
def test_hard_ones_against_another_solver(seed: int, states: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """scipy's branch and bound (HiGHS) is the referee: what is called the optimum is, and the gap holds what it says."""
    optimize = pytest.importorskip("scipy.optimize")
    losses, costs, budget = correlated(random.Random(seed), 7, 5)
    if states is not None:
        few_states(monkeypatch, states)
    choice = solve(losses, costs, budget)
    flat = np.concatenate([np.array(row) for row in losses])
    one_each = np.kron(np.eye(len(losses)), np.ones(len(losses[0])))
    limits = [
        optimize.LinearConstraint(one_each, 1, 1),
        optimize.LinearConstraint(np.concatenate([np.array(row) for row in costs])[None], -np.inf, budget),
    ]
    referee = optimize.milp(
        flat, constraints=limits, integrality=1, bounds=optimize.Bounds(0, 1), options={"mip_rel_gap": 0, "time_limit": 20}
    )
    check(choice, losses, costs, budget)
    assert choice.loss - choice.gap <= referee.fun * (1 + 1e-9)
    if choice.optimal:
        assert choice.loss <= referee.fun * (1 + 1e-9)
    assert choice.optimal or states is not None
    assert not (states == 1 and choice.optimal and choice.loss > referee.fun * (1 + 1e-9))
