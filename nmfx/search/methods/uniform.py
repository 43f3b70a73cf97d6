"""One N for all: what a search has to beat."""

from __future__ import annotations

from nmfx.search.events import Outcome, moves, settle, spend_rest
from nmfx.search.problem import Problem
from nmfx.search.tables import Tables


def uniform(problem: Problem, tables: Tables) -> Outcome:
    """One N for every site, the largest that fits everywhere; what it leaves is spent on single sites."""
    steps = [list(choice) for choice in zip(*problem.levels, strict=True)]  # one choice for each candidate N
    choice = next((c for c in reversed(steps) if problem.fits(c)), steps[0])
    settled, forced = settle(problem, choice)  # only measured times can make the sparsest patterns too slow
    chosen, raised = spend_rest(problem, settled)
    return Outcome(tuple(chosen), (*moves(problem, choice, "the densest pattern that fits everywhere"), *forced, *raised))
