"""DominoSearch in the decay-only limit: an event simulation that needs no data and no iterations (domino.md, section 5)."""

from __future__ import annotations

from collections.abc import Sequence

from nmfx.search.events import Event, Outcome, settle, spend_rest
from nmfx.search.methods.erk import erk_sparsities
from nmfx.search.problem import Problem
from nmfx.search.tables import Tables

WEIGHTS = {
    "params": (0.5, 0.5),
    "macs": (0.8, 0.2),
    "bytes": (0.5, 0.5),
    "latency": (0.8, 0.2),  # as for MACs, which time goes with
}  # b1, b2: of the MAC and the ERK term
SLACK = 0.01  # when no site is further than this below its ERK sparsity, the ERK term is dropped


def penalties(
    problem: Problem, choice: Sequence[int], erk: dict[int, float], b1: float | None = None, b2: float | None = None
) -> dict[int, float]:
    """Layer-wise penalty factors ``eta_l = b1 c_l + b2 r_l`` of the sites with a choice (DominoSearch, section 3).

    `c` is the site's remaining MACs, `r` its distance below its ERK sparsity, each divided by its largest magnitude. An `r` can
    be negative: that site then grows back.

    Args:
        problem: the sites and their options.
        choice: the option that each site has now.
        erk: ERK sparsities of the sites with a choice, by their number.
        b1, b2: shares of both terms; None: the published ones for the budget.

    Returns:
        The factors by the number of the site.
    """
    shares = WEIGHTS[problem.budget.kind]
    b1, b2 = shares[0] if b1 is None else b1, shares[1] if b2 is None else b2
    density = {i: problem.options[i][choice[i]].density for i in problem.free}
    c = {i: problem.sites.sites[i].macs * density[i] for i in problem.free}
    r = {i: erk[i] - (1 - density[i]) for i in problem.free}
    c_most, r_most = max(c.values(), default=0.0), max(map(abs, r.values()), default=0.0)
    if max(r.values(), default=0.0) <= SLACK:
        r, r_most = dict.fromkeys(r, 0.0), 1.0
    return {i: b1 * c[i] / (c_most or 1) + b2 * r[i] / r_most for i in problem.free}


def domino(problem: Problem, tables: Tables) -> Outcome:
    """Sites shrink at rate eta, step when 75 % of their groups agree, and tip the next by what their commits change."""
    points = tables.tipping_points
    choice = [len(options) - 1 for options in problem.options]
    erk, events, time = erk_sparsities(problem), [], 0.0
    working = {i: problem.start_n(i) for i in problem.free}  # n, the intermediate N
    shrinkage = dict.fromkeys(problem.free, 0.0)  # S
    eta = penalties(problem, choice, erk)
    while not problem.fits(choice):
        waiting = {i: points[i][problem.options[i][0].m - working[i]] - shrinkage[i] for i in problem.free if working[i] > 1}
        if not waiting:
            break  # measured times need not fall with N: the sparsest patterns can be too slow
        rates = {i: eta[i] for i in waiting}
        if all(rate <= 0 for rate in rates.values()):
            # Every site that can still step is past its ERK share: let the most expensive ones go on.
            rates = {i: problem.costs[i][choice[i]] / problem.budget.dense + 1e-12 for i in waiting}
        wait, tipping = min((max(0.0, waiting[i]) / rates[i], i) for i in waiting if rates[i] > 0)
        time += wait
        for i in shrinkage:
            shrinkage[i] += wait * rates.get(i, eta[i])
        working[tipping] -= 1
        options = problem.options[tipping]
        if choice[tipping] and working[tipping] == options[choice[tipping] - 1].n:
            before, after = options[choice[tipping]], options[choice[tipping] - 1]
            choice[tipping] -= 1
            reason = f"75 % of groups below T at S = {shrinkage[tipping]:.4g}, eta = {eta[tipping]:.3g}"
            name = problem.sites.sites[tipping].name
            events.append(Event(name, before, after, reason, problem.cost(choice), time))
            eta = penalties(problem, choice, erk)
    choice, settled = settle(problem, choice)
    choice, raised = spend_rest(problem, choice)
    return Outcome(tuple(choice), (*events, *settled, *raised))
