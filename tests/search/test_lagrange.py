"""Laws of two budgets: never above one, a gap that holds, an optimum only where trying everything finds nothing better."""

from __future__ import annotations

import math
import random
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmfx.errors import SearchError
from nmfx.search.solver.knapsack import solve
from nmfx.search.solver.lagrange import solve_all


def spend(costs: list[list[int]], options: tuple[int, ...]) -> int:
    return sum(row[option] for row, option in zip(costs, options, strict=True))


def least(losses: list[list[float]], prices: list[list[list[int]]], limits: list[int]) -> float:
    """The least loss of all choices within the limits; infinite without one."""
    choices = product(*map(range, map(len, losses)))
    fitting = (o for o in choices if all(spend(costs, o) <= most for costs, most in zip(prices, limits, strict=True)))
    return min((math.fsum(row[i] for row, i in zip(losses, o, strict=True)) for o in fitting), default=math.inf)


cells = st.tuples(
    st.one_of(st.integers(0, 9).map(float), st.floats(0, 100), st.just(math.inf)), st.integers(0, 40), st.integers(0, 3 * 10**8)
)
rows = st.lists(cells, min_size=1, max_size=4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(table=st.lists(rows, min_size=1, max_size=5), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_as_good_as_the_gap_says(table: Any, shares: tuple[float, float]) -> None:
    losses, *prices = ([[cell[part] for cell in row] for row in table] for part in range(3))
    limits = [
        sum(map(min, costs)) + int(share * (sum(map(max, costs)) - sum(map(min, costs))))
        for costs, share in zip(prices, shares, strict=True)
    ]
    best = least(losses, prices, limits)
    if best == math.inf:
        with pytest.raises(SearchError):
            solve_all(losses, prices, limits)
        return
    choice = solve_all(losses, prices, limits)
    assert all(spend(costs, choice.options) <= most for costs, most in zip(prices, limits, strict=True))
    assert choice.cost == spend(prices[0], choice.options)
    assert choice.loss == math.fsum(row[i] for row, i in zip(losses, choice.options, strict=True))
    assert choice.loss - choice.gap <= best * (1 + 1e-12) <= choice.loss * (1 + 1e-12)
    if choice.optimal:
        assert choice.loss <= best * (1 + 1e-12)
    assert solve_all(losses, prices, limits) == choice


def network(rng: random.Random, sites: int) -> tuple[list[list[float]], list[list[list[int]]], list[int]]:
    """Parameters up to those of a ViT-L, and noisy times in nanoseconds that do not rise with density."""
    losses, parameters, times = [], [], []
    for _ in range(sites):
        weights, dense, scale = rng.randrange(10**4, 3 * 10**8), rng.randrange(10**4, 3 * 10**6), 10 ** rng.uniform(-2, 2)
        losses.append([scale * (1 - n / 16) ** 2 * rng.uniform(0.9, 1.1) for n in (1, 2, 4, 8, 16)])
        parameters.append([weights * n // 16 for n in (1, 2, 4, 8, 16)])
        times.append([int(dense * (0.2 + n / 20) * rng.uniform(0.7, 1.3)) for n in (1, 2, 4, 8, 16)])
    limits = [sum(row[-1] for row in parameters) // 4, sum(row[-1] for row in times) // 2]
    return losses, [parameters, times], limits


@pytest.mark.parametrize("seed", range(5))
def test_two_budgets_are_not_below_one_and_their_order_is_no_matter_of_limits(seed: int) -> None:
    losses, prices, limits = network(random.Random(seed), 40)
    choice = solve_all(losses, prices, limits)
    turned = solve_all(losses, prices[::-1], limits[::-1])
    singles = [solve(losses, costs, most) for costs, most in zip(prices, limits, strict=True)]
    for found in (choice, turned):
        assert all(spend(costs, found.options) <= most for costs, most in zip(prices, limits, strict=True))
        assert found.loss >= max(single.loss for single in singles) * (1 - 1e-12)
        assert 0 <= found.gap < 0.03 * found.loss
    assert choice.loss - choice.gap <= turned.loss * (1 + 1e-12)
    assert turned.loss - turned.gap <= choice.loss * (1 + 1e-12)


def test_no_pair_of_sites_could_change_for_less() -> None:
    losses, prices, limits = network(random.Random(7), 12)
    choice = solve_all(losses, prices, limits)
    for i, j in product(range(12), repeat=2):
        for a, b in product(range(5), repeat=2):
            other = list(choice.options)
            other[i], other[j] = a, b
            if all(spend(costs, tuple(other)) <= most for costs, most in zip(prices, limits, strict=True)):
                assert math.fsum(row[o] for row, o in zip(losses, other, strict=True)) >= choice.loss * (1 - 1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_another_solver_finds_nothing_below_the_gap(seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    import numpy as np

    losses, prices, limits = network(random.Random(seed), 30)
    constraints = [optimize.LinearConstraint(np.kron(np.eye(30), np.ones(5)), 1, 1)]
    for costs, most in zip(prices, limits, strict=True):
        constraints.append(optimize.LinearConstraint(np.concatenate(costs)[None] / most, -np.inf, 1.0))
    referee = optimize.milp(
        np.concatenate(losses), constraints=constraints, integrality=1, bounds=optimize.Bounds(0, 1), options={"time_limit": 20}
    )
    choice = solve_all(losses, prices, limits)
    # HiGHS admits a choice that is a millionth above a limit
    assert choice.loss - choice.gap <= referee.fun * (1 + 1e-5)
    assert choice.loss <= referee.fun * 1.01


def test_limits_that_exclude_each_other_say_what_is_within_the_first() -> None:
    with pytest.raises(SearchError, match="within 3 of the one budget, the least of the other is 9, above 8"):
        solve_all([[0.0, 1.0]], [[[3, 4]], [[9, 0]]], [3, 8])
    with pytest.raises(SearchError, match="at most two"):
        solve_all([[0.0]], [[[1]]] * 3, [1, 1, 1])


def test_a_forbidden_option_is_not_taken_even_where_it_is_cheapest() -> None:
    losses = [[math.inf, 2.0, 0.0], [math.inf, 3.0, 0.0]]
    prices = [[[0, 2, 5], [0, 2, 5]], [[0, 3, 4], [0, 1, 4]]]
    assert solve_all(losses, prices, [7, 5]).options == (2, 1)
    assert solve_all(losses, prices, [9, 4]).options == (1, 1)
