"""Budgets: at most this share of the dense network's parameters, MACs, bytes on disk, or measured time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import cast, get_args

from nmfx import text
from nmfx.errors import SearchError
from nmfx.models.site import Site, Sites
from nmfx.settings.target import BudgetKind, parse_limit, parse_target
from nmfx.sparsity.pattern import Pattern

Prices = Mapping[str, Mapping[Pattern, int]]
KINDS: tuple[str, ...] = get_args(BudgetKind)
UNITS = {"params": "weights", "macs": "MACs", "bytes": "bytes", "latency": "ns"}


@dataclass(frozen=True)
class Budget:
    """At most `limit` kept parameters, MACs per sample, bytes of the packed weights, or nanoseconds of the sites, of `dense`.

    Bytes are those of the sites: biases, norms and the header of a file come on top, and no scheme changes them.
    """

    kind: BudgetKind
    target: float | Fraction
    dense: int

    @property
    def unit(self) -> str:
        """What it counts, in words."""
        return UNITS[self.kind]

    @property
    def limit(self) -> int:
        """The most that may be kept, exactly: a float target counts as the decimal number it is written as."""
        target = self.target if isinstance(self.target, Fraction) else Fraction(repr(self.target))
        return math.floor((1 - target) * self.dense)


def amount(site: Site, kind: BudgetKind, latency: Prices | None = None) -> int:
    """What a dense site costs."""
    if kind == "latency":
        return (latency or {}).get(site.name, {}).get(Pattern.DENSE, 0)
    return {"params": site.weights, "macs": site.macs, "bytes": site.bytes}[kind]


def make_budgets(
    sites: Sites,
    target: float | str,
    kind: BudgetKind,
    limits: Mapping[str, float | str] | None,
    latency: Prices | None = None,
) -> tuple[Budget, ...]:
    """The budgets of a search: of `limits` if there are any, else of `target` and `kind`.

    Args:
        sites: what the shares are of.
        target: a sparsity, or times fewer, as ``"8x"``.
        kind: what it counts.
        limits: by kind, the share to keep, or times fewer.
        latency: nanoseconds of each pattern of each site, for a budget of latency.

    Returns:
        One or more, the one that leads first.

    Raises:
        SearchError: a kind or a number that is none, or nothing to save.
    """
    if limits is not None and not isinstance(limits, Mapping):
        raise SearchError(f"limits: expected budgets by name, as {{'params': 0.125}}, got {limits!r}")
    budgets = []
    for name in limits or (kind,):
        if name not in KINDS:
            raise SearchError(f"budget {name!r}{text.nearest(str(name), KINDS)}; expected params, macs, bytes or latency")
        if name == "latency" and latency is None:
            where = "nmfx.runtime.measuring.latency.measure_latency"
            raise SearchError(f"budget latency: give latency=, the measured times of {where}")
        value = parse_limit(limits[name]) if limits else parse_target(target)
        checked = cast(BudgetKind, name)
        dense = sum(amount(site, checked, latency) for site in sites)
        if not dense:
            raise SearchError(f"{sites.model or 'the model'} has no {name} to save: no sites")
        budgets.append(Budget(checked, value, dense))
    return tuple(budgets)
