"""Two budgets at once: each in turn is priced into the losses while the other is met exactly; then sites change in pairs.

benchmarks/solver.py compares this and `knapsack` with a solver of integer programs (docs/search-study.md, "The solver").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nmfx.errors import SearchError
from nmfx.search.solver.knapsack import Choice, solve

STEPS = 32  # prices tried for each budget; mostly five to ten suffice

Losses = Sequence[Sequence[float]]
Options = tuple[int, ...]


class _Limit(NamedTuple):
    costs: Sequence[Sequence[int]]  # one a (site, option)
    most: int

    def left(self, options: Sequence[int]) -> int:
        return self.most - sum(row[option] for row, option in zip(self.costs, options, strict=True))


def solve_all(losses: Losses, prices: Sequence[Sequence[Sequence[int]]], limits: Sequence[int]) -> Choice:
    """The least summed loss with every summed cost within its limit: one limit is a knapsack (see `solve`), two are near it.

    `gap` is proven by weak duality; `cost` is that of the first limit. Deterministic. An infinite loss forbids its option.

    Args:
        losses: one row a site, one number an option.
        prices: one table of whole costs a limit, shaped as `losses`.

    Raises:
        SearchError: no choice is within the limits, or there are more than two.
    """
    if len(limits) == 1:
        return solve(losses, prices[0], limits[0])
    if len(limits) > 2:
        raise SearchError(f"{len(limits)} budgets at once: at most two are solved together")
    first, second = (_Limit(costs, most) for costs, most in zip(prices, limits, strict=True))
    best, bound = _price(losses, first, second)
    if _loss(losses, best) > bound:
        other, higher = _price(losses, second, first, best)
        found = [_exchange(losses, (first, second), options) for options in (best, other)]
        best, bound = min(found, key=lambda options: (_loss(losses, options), -first.left(options))), max(bound, higher)
    loss = _loss(losses, best)
    return Choice(best, loss, first.most - first.left(best), max(0.0, loss - bound))


def _loss(losses: Losses, options: Options) -> float:
    return math.fsum(row[option] for row, option in zip(losses, options, strict=True))


def _price(losses: Losses, exact: _Limit, priced: _Limit, known: Options | None = None) -> tuple[Options, float]:
    """The best choice within both limits at any price of the second, and what no choice loses less than.

    The prices are those of Handler and Zang ("A dual algorithm for the constrained shortest path problem", 1980).
    """
    free = solve(losses, exact.costs, exact.most)
    if priced.left(free.options) >= 0:
        return free.options, free.loss - free.gap
    best, over, bound = known or _cheapest(losses, exact, priced), free.options, free.loss - free.gap
    for _ in range(STEPS):  # the price at which the two cost the same; if no choice is cheaper then, none bounds higher
        dearer = priced.left(best) - priced.left(over)
        price = max(0.0, _loss(losses, best) - _loss(losses, over)) / dearer
        table = [[loss + price * cost for loss, cost in zip(*rows)] for rows in zip(losses, priced.costs)]
        choice = solve(table, exact.costs, exact.most)
        loss, left = _loss(losses, choice.options), priced.left(choice.options)
        rounding = 2**-51 * (abs(loss) + price * (priced.most - left))  # of the table
        bound = max(bound, loss - price * left - choice.gap - rounding)
        line = _loss(losses, over) - price * priced.left(over)
        if choice.options in (best, over) or loss - price * left >= line - 2 * rounding:
            break
        best, over = (choice.options, over) if left >= 0 else (best, choice.options)
    return best, bound


def _cheapest(losses: Losses, exact: _Limit, priced: _Limit) -> Options:
    costs = [[cost if loss < math.inf else math.inf for cost, loss in zip(*rows)] for rows in zip(priced.costs, losses)]
    choice = solve(costs, exact.costs, exact.most)
    if (left := priced.left(choice.options)) < 0:
        of = "the least" if choice.optimal else "the least found"
        least = f"{of} of the other is {priced.most - left}, above {priced.most}"
        raise SearchError(f"within {exact.most} of the one budget, {least}")
    return choice.options


def _exchange(losses: Losses, limits: Sequence[_Limit], options: Options) -> Options:
    """Change one or two sites, the pair that saves most first, while that stays within the limits."""
    sizes = [len(row) for row in losses]
    site, chosen = np.repeat(np.arange(len(sizes)), sizes), np.array(options)
    start = np.cumsum([0, *sizes[:-1]])
    loss, *costs = (np.array([value for row in table for value in row]) for table in (losses, *(one.costs for one in limits)))
    while True:
        now = start + chosen
        saved = loss[now][site] - loss  # [options of all sites], by changing to each of them alone
        steps = [cost - cost[now][site] for cost in costs]
        left = [one.left(chosen.tolist()) for one in limits]
        most, pair = 1e-12 * abs(loss[now].sum()), (0, 0)
        for one in np.argsort(-saved, kind="stable").tolist():  # the one that saves more of the pair
            if not 2 * saved[one] > most:
                break
            fits = (site != site[one]) | (np.arange(len(site)) == now[site[one]])
            for step, room in zip(steps, left, strict=True):
                fits &= step <= room - step[one]
            other = int(np.where(fits, saved, -np.inf).argmax())
            if fits[other] and saved[one] + saved[other] > most:
                most, pair = saved[one] + saved[other], (other, one)
        if pair == (0, 0):
            return tuple(chosen.tolist())
        for one in pair:
            chosen[site[one]] = one - start[site[one]]
