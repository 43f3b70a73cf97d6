"""The multiple-choice knapsack: one option a site, the smallest summed loss, the summed cost within the budget.

Source: Kellerer, Pferschy, Pisinger, "Knapsack Problems" (Springer, 2004), chapter 11: dominance, linear relaxation by
slopes, reduction, and dynamic programming over a growing core. Whatever decides is a whole number: costs in their
common unit, losses in fixed point at 2**-60 of the range in play. Floats only bound, rounded so as to keep a choice.
HiGHS, of integer programs, proves less of the hard cases and holds a budget to a tolerance only: docs/search-study.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, pairwise
from operator import index
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmfx.errors import SearchError

DRAFT_STATES = 512  # partial choices kept after a site while only a good choice is wanted, and the fewest ever kept
PART_STATES = 1 << 19  # kept in all to prove that it is the best; a part that needs more is split at its widest site
ROUNDING = 1e-12  # of a loss: differences below it are those of adding up
MAX_STATES = 1 << 22  # kept in all parts together, some seconds; past it the choice comes with the gap proven so far

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """One option a site; `loss` and `cost` are sums, in the units of the tables."""

    options: tuple[int, ...]
    loss: float
    cost: int
    gap: float  # proven: no choice within the budget has a loss below loss - gap

    @property
    def optimal(self) -> bool:
        """Whether it is proven that no choice has a smaller loss, to the last digits of a sum."""
        return self.gap <= ROUNDING * abs(self.loss)


class _Option(NamedTuple):
    cost: int
    loss: float
    number: int
    site: int


Options = list[_Option]  # of one site, each dearer than the one before and of lower loss; or picks, one a site


def solve(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> Choice:
    """Choose one option a site (a row; rows differ in length): the least summed loss, the summed cost in the budget.

    That it is the least is proven where `Choice.optimal` says so; the search for the proof ends after some seconds, and then
    the gap that is left is said.

    Costs and budget are whole parameters or MACs. Of equal losses the lower cost is chosen, of equal options of a site
    the first. An infinite loss forbids its option. Raises SearchError on a NaN, and if no choice is within the budget.
    """
    sites = [_undominated(site, *row) for site, row in enumerate(zip(losses, costs, strict=True))]
    best, states, serial = _cheapest(sites), 0, count()
    if _cost(best) > index(budget):
        raise SearchError(f"budget {budget} is out of reach: the smallest sum of costs is {_cost(best)}")
    parts = [(-math.inf, next(serial), sites)]  # a heap of the parts not yet solved; the least loss each may hold first
    while parts and states < MAX_STATES and parts[0][0] < _loss(best) - ROUNDING * abs(_loss(best)):
        picks, gap, sites, used = _solve_part(heappop(parts)[2], budget)
        best, states = min(best, picks, key=lambda picks: (_loss(picks), _cost(picks))), states + used
        for part in _split(sites) if gap else ():
            if _cost(_cheapest(part)) <= budget:
                heappush(parts, (_loss(picks) - gap, next(serial), part))
    gap = max(0.0, _loss(best) - parts[0][0]) if parts else 0.0
    return Choice(tuple(pick.number for pick in best), _loss(best), _cost(best), gap)


def _cheapest(sites: list[Options]) -> Options:
    return [options[0] for options in sites]


def _cost(picks: Options) -> int:
    return sum(pick.cost for pick in picks)


def _loss(picks: Options) -> float:
    return math.fsum(pick.loss for pick in picks)


def _undominated(site: int, losses: Sequence[float], costs: Sequence[int]) -> Options:
    """The options worth having: each costs more and loses less than the one before."""
    kept: Options = []
    pairs = zip(costs, losses, strict=True)
    for option in sorted(_Option(index(cost), float(loss), number, site) for number, (cost, loss) in enumerate(pairs)):
        if math.isnan(option.loss) or option.loss == -math.inf:
            raise SearchError(f"site {site}, option {option.number}: the loss must be a number, not {option.loss}")
        if option.loss < (kept[-1].loss if kept else math.inf):
            kept.append(option)
    if not kept:
        raise SearchError(f"site {site}: none of its {len(losses)} options has a finite loss")
    return kept


def _solve_part(sites: list[Options], budget: int) -> tuple[Options, float, list[Options], int]:
    """Draft, then prove: picks, their gap, the options that better picks may hold, and the number of states kept."""
    picks, gap, total = _cheapest(sites), 0.0, 0
    for states in (0, PART_STATES):
        core = _Core.build(sites, budget)
        picks, gap, used = core.search(picks, states)
        sites, total = _reduce(sites, picks, core.price, budget), total + used
    return picks, gap, sites, total


def _split(sites: list[Options]) -> Iterator[list[Options]]:
    """One part for each option of the site with most cost at stake, since that option moves the price of all others."""
    widest = max(sites, key=lambda options: options[-1].cost - options[0].cost)
    return ([[option] if options is widest else options for options in sites] for option in widest)


def _reduce(sites: list[Options], picks: Options, price: float, budget: int) -> list[Options]:
    """Drop each option that, its cost paid at this price, is further above its site's best than the picks above all."""
    paid = [[option.loss + price * (option.cost - options[0].cost) for option in options] for options in sites]
    bound = math.fsum(map(min, paid)) - price * (budget - _cost(_cheapest(sites)))
    scale = math.fsum(abs(p.loss) + price * (p.cost - o[0].cost) for p, o in zip(picks, sites, strict=True))
    gap = _loss(picks) - bound + 1e-12 * scale  # the last term outweighs all rounding above
    return [
        [o for o, value in zip(options, values, strict=True) if value <= min(values) + gap or o == pick]
        for options, values, pick in zip(sites, paid, picks, strict=True)
    ]


def _edges(site: int, points: list[tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """Walk the lower convex hull of a site's (cost, loss): added cost, added loss (negative), site, option reached."""
    hull = [0]
    for i, (cost, loss) in enumerate(points[1:], 1):
        while len(hull) > 1:
            (c0, v0), (c1, v1) = points[hull[-2]], points[hull[-1]]
            if (v1 - v0) * (cost - c1) < (loss - v1) * (c1 - c0):
                break
            hull.pop()
        hull.append(i)
    for i, j in pairwise(hull):
        yield points[j][0] - points[i][0], points[j][1] - points[i][1], site, j


def _pareto(states: Ints, cost: Ints, loss: Ints) -> Ints:
    """The states that lose less than every other one of at most their cost, cheapest first."""
    kept: Ints = states[np.argsort(cost[states], kind="stable")]
    kept = kept[np.diff(np.minimum.accumulate(loss[kept]), prepend=1) < 0]  # losses are at most 0
    kept = kept[np.diff(cost[kept], append=-1) != 0]  # of equal costs the last loses least
    return kept


@dataclass(frozen=True)
class _Core:
    """The sites that have a choice, the most undecided first, in whole units of cost and quanta of loss."""

    sites: list[Options]
    tables: list[Ints]  # one a site: [2 options], cost and loss above the cheapest option's
    edges: Ints  # [4 edges] as _edges gives them, steepest first: a leading part is the best choice of its cost
    room: int  # units that the budget leaves above the cheapest options
    quantum: float  # loss
    price: float  # loss per cost, where the linear relaxation meets the budget

    @classmethod
    def build(cls, sites: list[Options], budget: int) -> _Core:
        live = [options for options in sites if len(options) > 1]
        unit = math.gcd(*(option.cost - options[0].cost for options in live for option in options)) or 1
        bits = 60 - math.frexp(math.fsum(options[0].loss - options[-1].loss for options in live))[1]
        whole = [[(o.cost // unit, round(math.ldexp(o.loss, bits))) for o in options] for options in live]
        tables = [[(cost - points[0][0], loss - points[0][1]) for cost, loss in points] for points in whole]
        room = min((budget - _cost(_cheapest(sites))) // unit, sum(points[-1][0] for points in tables))
        # Unequal slopes differ by over 2**-126: the shift compares them exactly, so a site's edges stay in order.
        steps = sorted((e for i, t in enumerate(tables) for e in _edges(i, t)), key=lambda e: (e[1] << 128) // e[0])
        edges = np.array(steps, dtype=np.int64).reshape(-1, 4).T
        slopes = np.append(edges[1] / edges[0], 0.0)
        price = -float(slopes[np.searchsorted(np.cumsum(edges[0]), room, "right")])
        # First the sites that the smallest change of price would change: what is left then bounds the tightest.
        order = list(dict.fromkeys(edges[2, np.argsort(abs(slopes[:-1] + price), kind="stable")].tolist()))
        edges[2] = np.argsort(order)[edges[2]]
        arrays, quantum = [np.array(tables[i]).T for i in order], math.ldexp(1.0, -bits)
        return cls([live[i] for i in order], arrays, edges, room, quantum, price * quantum / unit)

    def search(self, picks: Options, states: int) -> tuple[Options, float, int]:
        """Extend partial choices site by site: the best complete one, or else `picks`; its gap; the states kept."""
        places = [options.index(picks[options[0].site]) for options in self.sites]
        best = tuple(sum(int(t[row, i]) for t, i in zip(self.tables, places, strict=True)) for row in (1, 0))
        option = parent = cost = loss = np.zeros(1, dtype=np.int64)  # [states], at first the choice of nothing
        trail: list[Ints] = []
        used, lost = 0, math.inf  # the states kept, the least bound of those given up
        for depth in range(len(self.sites) + 1):
            if depth:
                table = self.tables[depth - 1]
                option, parent = np.nonzero(table[0, :, None] + cost <= self.room)
                cost, loss = cost[parent] + table[0, option], loss[parent] + table[1, option]
            fitting, spent, total, bound = self._relax(depth, cost, loss)
            ties = np.flatnonzero(total == total.min())
            first = ties[spent[ties].argmin()]
            if (total[first], spent[first]) < best:
                best = int(total[first]), int(spent[first])
                places = self._trace(trail, option[first], parent[first], fitting[first])
            keep = _pareto(np.flatnonzero(bound < best[0]), cost, loss)
            most = max(DRAFT_STATES, (states - used) // 64)
            if keep.size > most:
                keep = keep[np.argpartition(bound[keep], most)]
                lost, keep = min(lost, int(bound[keep[most]])), keep[:most]
            if not keep.size:
                break
            used, cost, loss = used + keep.size, cost[keep], loss[keep]
            trail.append(np.stack((option[keep], parent[keep])))
        chosen = {options[i].site: options[i] for options, i in zip(self.sites, places, strict=True)}
        return [chosen.get(pick.site, pick) for pick in picks], max(0.0, best[0] - lost) * self.quantum, used

    def _relax(self, depth: int, cost: Ints, loss: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Complete each state with the edges that fit whole: how many, its cost, its loss; and bound its best loss."""
        edges = self.edges[:, self.edges[2] >= depth]
        costs, losses = np.pad(np.cumsum(edges[:2], axis=1), ((0, 0), (1, 0)))
        fitting = np.searchsorted(costs, self.room - cost, "right") - 1
        spent, total = cost + costs[fitting], loss + losses[fitting]
        slope = np.append(edges[1] / edges[0], 0.0)[fitting]
        # 2**-50 outweighs the rounding, so that the bound is never above the truth.
        part = np.ceil((self.room - spent) * slope * (1 + 2**-50)).astype(np.int64)  # of the next edge
        return fitting, spent, total, total + part - (slope == 0)  # on a flat end, an equal loss may still cost less

    def _trace(self, trail: list[Ints], option: int, parent: int, fitting: int) -> list[int]:
        """The option of each site: back through the parents, then `fitting` edges up from the cheapest options."""
        places = [0] * len(self.sites)
        for place in reversed(range(len(trail))):
            places[place] = int(option)
            option, parent = trail[place][:, parent]
        for site, reached in self.edges[2:, self.edges[2] >= len(trail)].T[:fitting].tolist():
            places[site] = reached
        return places
