"""Several budgets at once: the second and later ones are priced into the losses, the first is met exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nmfx.errors import SearchError
from nmfx.search.knapsack import Choice, solve

STEPS = 24  # halvings of the price of the second budget


def solve_all(losses: Sequence[Sequence[float]], prices: Sequence[Sequence[Sequence[int]]], limits: Sequence[int]) -> Choice:
    """The least summed loss with every summed cost within its limit.

    One limit is a knapsack (see `solve`). For two, the Lagrangian of the second: a bisection over its price, each step a
    knapsack under the first (Everett, 1963); `gap` is proven by weak duality.

    Args:
        prices: one table of costs a limit, shaped as `losses`.

    Raises:
        SearchError: no choice is within the limits, or there are more than two.
    """
    if len(limits) == 1:
        return solve(losses, prices[0], limits[0])
    if len(limits) > 2:
        raise SearchError(f"{len(limits)} budgets at once: at most two are solved together")
    first, second = prices
    spent = lambda choice: sum(costs[o] for costs, o in zip(second, choice.options, strict=True))  # noqa: E731

    def priced(price: float) -> Choice:
        table = [
            [value + price * cost for value, cost in zip(row, costs, strict=True)]
            for row, costs in zip(losses, second, strict=True)
        ]
        return solve(table, first, limits[0])

    best = priced(0.0)
    if spent(best) <= limits[1]:
        return best
    total = math.fsum(max(row) - min(row) for row in losses) or 1.0
    low, high, bound = 0.0, total / max(1, limits[1]), best.loss - best.gap
    found: Choice | None = None
    for step in range(STEPS * 4):
        price = high if found is None else math.sqrt(low * high) if low else high / 16
        choice = priced(price)
        bound = max(bound, choice.loss - choice.gap - price * limits[1])
        if spent(choice) <= limits[1]:
            loss = math.fsum(row[o] for row, o in zip(losses, choice.options, strict=True))
            if found is None or loss < found.loss:
                found = Choice(choice.options, loss, choice.cost, 0.0)
            high = price
        else:
            low, high = price, high if found is not None else high * 16
        if found is not None and (step >= STEPS or high / max(low, 1e-300) < 1 + 1e-9):
            break
    if found is None:
        raise SearchError(f"no choice is within both limits, {limits[0]} and {limits[1]}")
    return Choice(found.options, found.loss, found.cost, max(0.0, found.loss - bound))
