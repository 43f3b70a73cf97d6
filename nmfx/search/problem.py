"""What every search method is given: the options of each site, what they cost, and the budget."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from nmfx import text
from nmfx.errors import SearchError
from nmfx.graph.site import Site, Sites
from nmfx.scheme import Remainder, fit
from nmfx.sparsity.layout import Grouping, Layout, group
from nmfx.sparsity.pattern import Pattern

BudgetKind = Literal["params", "macs"]


@dataclass(frozen=True)
class Budget:
    """At most `limit` kept parameters, or MACs per sample, of `dense`: a share of ``1 - target``."""

    kind: BudgetKind
    target: float
    dense: int

    @property
    def limit(self) -> int:
        """The most that may be kept, exactly: the target counts as the decimal number it is written as."""
        return math.floor((1 - Fraction(repr(self.target))) * self.dense)


@dataclass(frozen=True)
class Problem:
    """The choice to make: one of ``options[i]`` for site i, ascending in density, dense last; ``costs[i]`` likewise.

    ``levels[i][k]`` is the option of site i that the k-th smallest candidate N comes to.
    """

    sites: Sites
    options: tuple[tuple[Pattern, ...], ...]
    costs: tuple[tuple[int, ...], ...]
    levels: tuple[tuple[int, ...], ...]
    budget: Budget
    layout: Layout
    remainder: Remainder
    dense_reasons: dict[str, str]

    @property
    def free(self) -> list[int]:
        """Indices of the sites that have a choice."""
        return [index for index, options in enumerate(self.options) if len(options) > 1]

    def cost(self, choice: Sequence[int]) -> int:
        """Kept parameters or MACs of one option a site."""
        return sum(costs[option] for costs, option in zip(self.costs, choice, strict=True))

    def left(self, choice: Sequence[int]) -> int:
        """What the budget has left under a choice; negative when it is exceeded."""
        return self.budget.limit - self.cost(choice)

    def grouping(self, index: int) -> Grouping:
        """Groups of a site under its own M."""
        site, pattern = self.sites.sites[index], self.options[index][0]
        return group(site.name, site.rows, pattern, self.layout, short=self.remainder == "short")


def parse_candidates(m: int, candidates: Iterable[int] | None) -> tuple[int, ...]:
    """The N's of a search, ascending, M (dense) among them; powers of two by default.

    Raises:
        SearchError: one is not in 1..M.
    """
    chosen = [1 << e for e in range(m.bit_length()) if 1 << e <= m] if candidates is None else list(candidates)
    for n in chosen:
        if not (isinstance(n, int) and 1 <= n <= m):
            raise SearchError(f"candidate N = {n}: expected a whole number in 1..M = {m}")
    return tuple(sorted({*chosen, m}))


def pose(
    sites: Sites,
    *,
    target: float,
    budget: BudgetKind = "params",
    m: int = 16,
    candidates: Iterable[int] | None = None,
    keep_dense: Iterable[str] = (),
    layout: Layout = "strict",
    remainder: Remainder = "dense",
) -> Problem:
    """The problem of choosing patterns N:m for `sites`.

    Raises:
        SearchError: the target is out of range or out of reach; the message says the largest that can be reached.
    """
    if not (isinstance(target, int | float) and 0 <= target < 1):
        raise SearchError(f"target {target}: expected a sparsity in 0 <= target < 1, such as 0.875")
    if budget not in ("params", "macs"):
        raise SearchError(f"budget {budget!r}{text.nearest(str(budget), ('params', 'macs'))}; expected params or macs")
    numbers, wanted = parse_candidates(m, candidates), list(keep_dense)
    for glob in wanted:
        if not any(fnmatch.fnmatchcase(site.name, glob) for site in sites):
            raise SearchError(f"keep-dense: no site matches {glob!r}{text.nearest(glob, [s.name for s in sites])}")
    if numbers == (m,):
        raise SearchError(f"target {target:g} is out of reach: no candidate N is below M = {m}, and M itself is dense")
    options: list[tuple[Pattern, ...]] = []
    levels: list[tuple[int, ...]] = []
    reasons: dict[str, str] = {}
    for site in sites:
        if rule := next((glob for glob in wanted if fnmatch.fnmatchcase(site.name, glob)), None):
            reasons[site.name] = f"kept dense by {rule!r}"
            options.append((Pattern.DENSE,))
            levels.append((0,) * len(numbers))
            continue
        fitted = [fit(site, Pattern(n, m), layout, remainder) for n in numbers if n < m]
        if reason := next((reason for _, reason in fitted if reason), ""):
            reasons[site.name] = reason
        choice = (*dict.fromkeys(p for p, _ in fitted if not p.is_dense), Pattern.DENSE)
        options.append(choice)
        levels.append((*(len(choice) - 1 if p.is_dense else choice.index(p) for p, _ in fitted), len(choice) - 1))
    costs = tuple(
        tuple(_cost(site, p, budget, layout, remainder) for p in choice) for site, choice in zip(sites, options, strict=True)
    )
    limit = Budget(budget, float(target), sites.weights if budget == "params" else sites.macs)
    if not limit.dense:
        raise SearchError(f"{sites.model or 'the model'} has no {budget} to save: no sites")
    problem = Problem(sites, tuple(options), costs, tuple(levels), limit, layout, remainder, reasons)
    least = sum(min(choice) for choice in costs)
    if least > limit.limit:
        raise SearchError(
            f"target {target:g} of {budget} is out of reach: with {numbers[0]}:{m} everywhere it can be, the largest target is "
            f"{math.floor(10**6 * (1 - Fraction(least, limit.dense))) / 10**6:.6f}{_out_of_reach(problem)}"
        )
    return problem


def _cost(site: Site, pattern: Pattern, budget: BudgetKind, layout: Layout, remainder: Remainder) -> int:
    kept = site.weights
    if not pattern.is_dense:
        kept = group(site.name, site.rows, pattern, layout, short=remainder == "short").kept(pattern.n)
    return kept if budget == "params" else site.macs * kept // site.weights


def _out_of_reach(problem: Problem) -> str:
    fixed = [i for i, options in enumerate(problem.options) if len(options) == 1]
    if not fixed:
        return "; a larger M reaches further"
    largest = problem.sites.sites[max(fixed, key=lambda i: problem.costs[i][0])]
    reason = problem.dense_reasons.get(largest.name, "no pattern fits it")
    return f"; of the {len(fixed)} of {len(problem.options)} sites that stay dense {largest.name} is the largest ({reason})"
