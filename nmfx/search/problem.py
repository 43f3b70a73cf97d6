"""What every search method is given: the options of each site, what they cost, and the budgets."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from nmfx import text
from nmfx.errors import SchemeError, SearchError
from nmfx.models.site import Site, Sites
from nmfx.models.source import identify_quickly
from nmfx.scheme import Scheme, fit, shapes_of
from nmfx.search.budget import Budget, Prices, amount, make_budgets
from nmfx.settings.choices import Choices
from nmfx.settings.target import BudgetKind
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.packing import packed_sizes
from nmfx.sparsity.pattern import Layout, Pattern, Remainder

Costs = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Problem:
    """The choice to make: one of ``options[i]`` for site i, ascending in density, those of several V of one N:M in V; last what
    it is now, as a rule dense.

    ``prices[b][i]`` are the costs of the options of site i in the unit of ``budgets[b]``; the first budget leads: it is
    what methods order their steps by. ``levels[i][k]`` is the option of site i that the k-th smallest wanted density
    comes to.
    """

    sites: Sites
    options: tuple[tuple[Pattern, ...], ...]
    prices: tuple[Costs, ...]
    levels: tuple[tuple[int, ...], ...]
    budgets: tuple[Budget, ...]
    layout: Layout
    remainder: Remainder
    dense_reasons: dict[str, str]

    @property
    def budget(self) -> Budget:
        """The budget that leads."""
        return self.budgets[0]

    @property
    def costs(self) -> Costs:
        """Costs in the unit of the budget that leads."""
        return self.prices[0]

    @property
    def free(self) -> list[int]:
        """Indices of the sites that have a choice."""
        return [index for index, options in enumerate(self.options) if len(options) > 1]

    def cost(self, choice: Sequence[int], budget: int = 0) -> int:
        """Kept parameters, MACs or bytes of one option a site."""
        return sum(costs[option] for costs, option in zip(self.prices[budget], choice, strict=True))

    def left(self, choice: Sequence[int], budget: int = 0) -> int:
        """What a budget has left under a choice; negative when it is exceeded."""
        return self.budgets[budget].limit - self.cost(choice, budget)

    def fits(self, choice: Sequence[int]) -> bool:
        """Whether a choice is within every budget."""
        return all(self.left(choice, budget) >= 0 for budget in range(len(self.budgets)))

    def steps_up(self, index: int, option: int) -> list[int]:
        """The options one step up: of the next denser N:M, those whose masks no more rows share than now, the fewest first.

        That they lose less is certain of the weights, whatever a table has it; of a denser N:M that more rows share it is not.
        """
        options, now = self.options[index], self.options[index][option]
        last = len(options) - 1
        up = [
            k
            for k, other in enumerate(options)
            if k > option and (k == last or (other.vector <= now.vector and (other.n, other.m) != (now.n, now.m)))
        ]
        return [k for k in up if (options[k].n, options[k].m) == (options[up[0]].n, options[up[0]].m)]

    @property
    def groupings(self) -> dict[str, Grouping]:
        """Groups of each site that has a choice, by its name."""
        return {self.sites.sites[i].name: self.grouping(i) for i in self.free}

    @property
    def starts(self) -> dict[str, int]:
        """The N that each site with a choice starts from, by its name."""
        return {self.sites.sites[i].name: self.start_n(i) for i in self.free}

    def start_n(self, index: int) -> int:
        """The N that a site starts from, in groups of its M: M itself, or what the density of a sparse start comes to."""
        start = self.options[index][-1]
        return math.ceil(Fraction(start.n * self.grouping(index).m, start.m))

    def grouping(self, index: int, pattern: Pattern | None = None) -> Grouping:
        """Groups of a site under one of its patterns; all but a sparse start have one M and V, but for methods over several."""
        site = self.sites.sites[index]
        pattern = pattern or self.options[index][0]
        return site.grouping(pattern, self.layout, short=self.remainder == "short")


def make_problem(
    sites: Sites,
    *,
    target: float | str = 0.875,
    budget: BudgetKind = "params",
    limits: Mapping[str, float | str] | None = None,
    latency: Prices | None = None,
    mixed: bool = False,
    within: Scheme | None = None,
    **options: Any,
) -> Problem:
    """The problem of choosing patterns for `sites`; `options` are those of `Choices`.

    Args:
        target, budget, limits: see `make_budgets`.
        latency: nanoseconds of each pattern of each site, for a budget of latency; sites it does not know cost nothing.
        within: the scheme that the weights are under already: a site keeps its pattern there, or takes one of lower density.
        mixed: offer the patterns of every M and V to a site, not only those of the largest M that fits it.

    Returns:
        What each site may take, and what that costs of each budget.

    Raises:
        SearchError: the target is out of range or out of reach; the message says the largest that can be reached. Several V
            that are not `mixed`.
    """
    if unknown := next((name for name in options if name not in Choices.__dataclass_fields__), None):
        known = (*Choices.__dataclass_fields__, "within")
        raise SearchError(f"unknown option {unknown!r}{text.nearest(unknown, known)}; known: {', '.join(known)}")
    choices = Choices(**options)
    choices.check_shared(mixed=mixed)
    budgets, wanted = make_budgets(sites, target, budget, limits, latency), choices.wanted
    choices.check(sites)
    if within is not None:
        within.check(sites)
    if not any(wanted.values()):
        largest = max((m for m, _ in wanted), default=1)
        raise SearchError(f"target {target} is out of reach: no candidate N is below M = {largest}, and M itself is dense")
    reasons: dict[str, str] = {}
    offered = tuple(_options(site, choices, within, wanted, reasons, mixed=mixed) for site in sites)
    every = [pattern for patterns in wanted.values() for pattern in patterns]
    densities = sorted({Fraction(pattern.n, pattern.m) for pattern in every} | {Fraction(1)})
    levels = tuple(tuple(_level(choice, density) for density in densities) for choice in offered)
    prices = tuple(
        tuple(tuple(_cost(s, p, b.kind, choices, latency) for p in choice) for s, choice in zip(sites, offered, strict=True))
        for b in budgets
    )
    problem = Problem(sites, offered, prices, levels, budgets, choices.layout, choices.remainder, reasons)
    for table, one in zip(prices, budgets, strict=True):
        least = sum(min(costs) for costs in table)
        if least > one.limit:
            sparsest = min(every, key=lambda pattern: pattern.density)
            reach = math.floor(10**6 * (1 - Fraction(least, one.dense))) / 10**6
            raise SearchError(
                f"target {float(one.target):g} of {one.kind} is out of reach: with {sparsest} everywhere it can be, "
                f"the largest target is {reach:.6f}{_out_of_reach(problem)}"
            )
    _check_start(problem, within)
    return problem


def _start_pattern(site: Site, choices: Choices, within: Scheme | None) -> Pattern:
    """The pattern that a site is under already; dense without `within`.

    Raises:
        SearchError: it has groups that this layout does not have.
    """
    if within is None or (pattern := within.get(site.name, Pattern.DENSE)).is_dense:
        return Pattern.DENSE
    with contextlib.suppress(SchemeError):
        if site.grouping(pattern, choices.layout, short=choices.remainder == "short") == within.grouping(site):
            return pattern
    how = "layout='flat' (--layout flat)" if within.layout == "flat" else "remainder='short' (--remainder short)"
    raise SearchError(f"{site.name}: the scheme to start from cuts it into other groups of {pattern.m}; give {how}")


def _check_start(problem: Problem, within: Scheme | None) -> None:
    """Raise if a sparse start is within every budget already."""
    start = [len(options) - 1 for options in problem.options]
    if within and problem.fits(start):
        now = [1 - problem.cost(start, b) / one.dense for b, one in enumerate(problem.budgets)]
        said = [f"{float(one.target):g} of {one.kind}, now {at:.4f}" for at, one in zip(now, problem.budgets, strict=True)]
        raise SearchError(f"target {'; '.join(said)}: the scheme to start from meets it already; give a higher target")


def _options(
    site: Site,
    choices: Choices,
    within: Scheme | None,
    wanted: Mapping[tuple[int, int], Sequence[Pattern]],
    reasons: dict[str, str],
    *,
    mixed: bool,
) -> tuple[Pattern, ...]:
    """The patterns of one site; why it has none, or others than those asked for, goes to `reasons`."""
    start = _start_pattern(site, choices, within)
    if rule := next((glob for glob in choices.keep_dense if text.matches(site.name, glob)), None):
        reasons[site.name] = f"kept {'dense' if start.is_dense else f'at {start}'} by {rule!r}"
        return (start,)
    fitted = {
        group: [fit(site, pattern, choices.layout, choices.remainder) for pattern in patterns]
        for group, patterns in wanted.items()  # a group is all of one M and V
        if patterns
    }
    exact = [group for group, found in fitted.items() if not any(reason for _, reason in found)]
    usable = exact or [group for group, found in fitted.items() if not all(p.is_dense for p, _ in found)]
    if not exact:
        reasons[site.name] = next(reason for found in fitted.values() for _, reason in found if reason)
    taken = [p for group in (usable if mixed else usable[:1]) for p, _ in fitted[group] if not p.is_dense]
    least, glob = choices.least_density(site)
    allowed = [p for p in dict.fromkeys(taken) if p.density >= least]
    if taken and not allowed:
        reasons[site.name] = f"no pattern has a density of {least:g} (min-density{f' {glob!r}' if glob != '*' else ''})"
    sparser = [p for p in allowed if p.density < start.density]
    if allowed and not sparser:
        reasons[site.name] = f"{start} already, and no pattern is sparser"
    sparser.sort(key=lambda p: p.order)
    run, _ = site.outputs  # a V beyond it is the same as the next smaller one
    unlike = {(p.n, p.m, min(p.vector, run)): p for p in reversed(sparser)}
    return (*reversed(unlike.values()), start)


def _level(choice: Sequence[Pattern], density: Fraction) -> int:
    """The sparsest option that is no sparser than `density`, or the last where a sparse start has none."""
    return next((i for i, pattern in enumerate(choice) if Fraction(pattern.n, pattern.m) >= density), len(choice) - 1)


def _cost(site: Site, pattern: Pattern, budget: BudgetKind, choices: Choices, latency: Prices | None) -> int:
    if pattern.is_dense or (budget == "bytes" and site.derived):  # a checkpoint stores what a weight is derived from whole
        return amount(site, budget, latency)
    if budget == "latency":
        prices = (latency or {}).get(site.name, {})
        return prices.get(pattern, prices.get(Pattern.DENSE, 0))
    grouping = site.grouping(pattern, choices.layout, short=choices.remainder == "short")
    kept, positions = packed_sizes(pattern.n, grouping)
    if budget == "bytes":
        return kept * (site.bytes // site.weights) + positions
    return kept if budget == "params" else site.macs * kept // site.weights


def _out_of_reach(problem: Problem) -> str:
    fixed = [i for i, options in enumerate(problem.options) if len(options) == 1]
    if not fixed:
        return "; a larger M reaches further"
    largest = problem.sites.sites[max(fixed, key=lambda i: problem.costs[i][0])]
    reason = problem.dense_reasons.get(largest.name, "no pattern fits it")
    return f"; {largest.name} is the largest of {len(fixed)} sites (of {len(problem.options)}) that stay dense ({reason})"


def make_scheme(
    model: nn.Module, problem: Problem, patterns: Mapping[str, Pattern], method: str, score: str = "magnitude"
) -> Scheme:
    """The patterns as a scheme that says where it came from.

    Args:
        model: what it is for.
        problem: the choice that was made.
        patterns: by site name.
        method: what it was found by.
        score: what the masks ranked weights by; magnitudes go without saying.

    Returns:
        The scheme, with the shapes of all sites.
    """
    source, sizes = identify_quickly(model), {p.m for options in problem.options for p in options if not p.is_dense}
    about = {"model": str(source) if source else problem.sites.model, "method": method}
    about |= {"budget": ", ".join(b.kind for b in problem.budgets)}
    about |= {"target": ", ".join(f"{float(b.target):g}" for b in problem.budgets)}
    about |= {"m": ", ".join(map(str, sorted(sizes))), "sites": problem.sites.fingerprint}
    about |= {} if score == "magnitude" else {"score": score}
    return Scheme(patterns, problem.layout, problem.remainder == "short", shapes_of(problem.sites), about)
