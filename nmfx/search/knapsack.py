"""The exact choice of one option a site under a budget: the multiple-choice knapsack problem.

Source: Kellerer, Pferschy, Pisinger, Knapsack Problems, Springer 2004, chapter 11: dominance (11.2.1), the linear
relaxation by slopes (11.2), reduction of the sites (11.4), dynamic programming over a core with bounds (11.5, 11.6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nmfx.errors import SearchError

DRAFT_STATES = 1 << 9  # of the first, quick search, which only has to find a good choice
MAX_STATES = 1 << 17  # kept after a site in the exact search; beyond it the worst are dropped and `gap` says so


@dataclass(frozen=True)
class Choice:
    """One option a site: its summed loss, its summed cost (the unit of `costs`), and how far the optimum can be."""

    options: tuple[int, ...]
    loss: float
    cost: int
    gap: float  # proven: no feasible choice has a loss below loss - gap; 0.0 is exact


class _Option(NamedTuple):
    cost: int
    loss: float
    index: int


def solve(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> Choice:
    """Choose one option a site with the smallest summed loss whose summed cost is at most the budget.

    Of choices with equal loss the cheapest is returned, and of equal options of one site the first.
    """
    sites = [_useful(*site) for site in zip(range(len(losses)), losses, costs, strict=True)]
    least = sum(site[0].cost for site in sites)
    if least > budget:
        raise SearchError(f"budget {budget} is out of reach: the cheapest options already cost {least}")
    picks, gap = [site[0] for site in sites], 0.0
    for most in (DRAFT_STATES, MAX_STATES):
        core = _Core.build(sites, budget)
        picks, gap = core.search(picks, most)
        sites = core.reduce(picks)
    return Choice(
        tuple(pick.index for pick in picks), math.fsum(pick.loss for pick in picks), sum(p.cost for p in picks), gap
    )
