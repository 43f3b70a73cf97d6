"""The least summed sensitivity: a multiple-choice knapsack."""

from __future__ import annotations

from nmfx.search.events import Event, Outcome, moves, spend_rest
from nmfx.search.problem import Problem
from nmfx.search.solver.lagrange import solve_all
from nmfx.search.tables import Tables


def knapsack(problem: Problem, tables: Tables) -> Outcome:
    """The smallest summed sensitivity under the budget, or near it: the gap is said; what it leaves is used all the same."""
    best = solve_all(tables.losses, problem.prices, [budget.limit for budget in problem.budgets])
    proof = "least" if best.optimal else f"summed loss proven within {best.gap:.3g} of the least:"
    reason = f"{proof} summed sensitivity ({tables.sensitivity}) under the budget"
    choice, raised = list(best.options), list[Event]()
    if tables.sensitivity != "weight":  # where no loss was seen at all, the optimum leaves room: use it
        choice, raised = spend_rest(problem, choice)
    return Outcome(tuple(choice), (*moves(problem, list(best.options), reason), *raised))
