"""Erdos-Renyi-kernel densities: what a search has to beat."""

from __future__ import annotations

import math

from nmfx.search.events import Outcome, moves, settle, spend_rest
from nmfx.search.problem import Problem
from nmfx.search.tables import Tables


def erk(problem: Problem, tables: Tables) -> Outcome:
    """ERK densities made N:M: the largest common scale at which the nearest patterns fit the budget; the rest is spent."""
    raw = {i: sum(s.shape) / math.prod(s.shape) for i, s in enumerate(problem.sites) if i in set(problem.free)}

    def nearest(scale: float) -> list[int]:
        choice = [len(options) - 1 for options in problem.options]
        for i, value in raw.items():
            density = min(1.0, scale * value)
            distances = [abs(math.log2(p.density / density)) for p in problem.options[i]]
            choice[i] = min(range(len(distances)), key=lambda option: (distances[option], option))
        return choice

    low, high = 1e-12, 2.0 / min(raw.values(), default=1.0)
    for _ in range(100):  # bisection down to the last bits of a double
        middle = math.sqrt(low * high)
        low, high = (middle, high) if problem.fits(nearest(middle)) else (low, middle)
    choice, forced = settle(problem, nearest(low))
    choice, raised = spend_rest(problem, choice)
    return Outcome(tuple(choice), (*moves(problem, nearest(low), "nearest to its ERK density"), *forced, *raised))


def erk_sparsities(problem: Problem) -> dict[int, float]:
    """ERK sparsity of every site with a choice, for the overall target (Evci et al., 2020; domino.md, section 4).

    Density proportional to ``sum(shape) / prod(shape)``, scaled so that the total matches; sites that would exceed density 1
    (or that of a sparse start) are fixed there and the rest is scaled anew. Sites without a choice count as they are.
    """
    sites, free = problem.sites.sites, set(problem.free)
    raw = {i: sum(sites[i].shape) / math.prod(sites[i].shape) for i in free}
    most = [options[-1] for options in problem.options]
    while free:
        fixed = sum(site.weights * most[i].n // most[i].m for i, site in enumerate(sites) if i not in free)
        scale = ((1 - problem.budget.target) * problem.sites.weights - fixed) / sum(raw[i] * sites[i].weights for i in free)
        over = {i for i in free if scale * raw[i] > most[i].density}
        if not over:
            return {i: 1 - max(0.0, scale) * raw[i] if i in free else most[i].sparsity for i in problem.free}
        free -= over
    return {i: most[i].sparsity for i in problem.free}
