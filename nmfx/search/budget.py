"""Budgets: at most this share of the dense network's parameters, MACs, bytes on disk, or measured time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast, get_args

from nmfx import text
from nmfx.errors import SearchError
from nmfx.models.site import Site, Sites
from nmfx.sparsity.pattern import Pattern

BudgetKind = Literal["params", "macs", "bytes", "latency"]
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
    def limit(self) -> int:
        """The most that may be kept, exactly: a float target counts as the decimal number it is written as."""
        target = self.target if isinstance(self.target, Fraction) else Fraction(repr(self.target))
        return math.floor((1 - target) * self.dense)


def amount(site: Site, kind: BudgetKind, latency: Prices | None = None) -> int:
    """What a dense site costs."""
    if kind == "latency":
        return (latency or {}).get(site.name, {}).get(Pattern.DENSE, 0)
    return {"params": site.weights, "macs": site.macs, "bytes": site.bytes}[kind]


def parse_target(target: float | str) -> float | Fraction:
    """A sparsity: ``0.875`` as it is, ``"8x"`` (eight times fewer) as 7/8.

    Raises:
        SearchError: it is neither, or not in 0 <= target < 1.
    """
    value: float | Fraction = -1.0
    if isinstance(target, str):
        if found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]\s*", target):
            value = 1 - 1 / Fraction(found[1]) if Fraction(found[1]) >= 1 else -1.0
        elif re.fullmatch(r"\s*\d*\.?\d+\s*", target):
            value = float(target)
    elif isinstance(target, int | float | Fraction) and not isinstance(target, bool):
        value = target if isinstance(target, Fraction) else float(target)
    if not 0 <= value < 1:
        raise SearchError(f"target {target}: expected a sparsity in 0 <= target < 1, such as 0.875, or times fewer, such as 8x")
    return value


def parse_limit(share: float | str) -> float | Fraction:
    """The target of a limit: ``0.125`` is the share that may be kept, ``"8x"`` is eight times fewer.

    Raises:
        SearchError: it is neither, or keeps nothing or more than everything.
    """
    written = str(share).strip()
    try:
        kept = 1 - Fraction(parse_target(written)) if written.lower().endswith("x") else Fraction(written)
    except ValueError:
        kept = Fraction(0)
    if not 0 < kept <= 1:
        raise SearchError(
            f"limit {share}: expected the share to keep in 0 < share <= 1, such as 0.125, or times fewer, such as 8x"
        )
    return 1 - kept


def make_budgets(
    sites: Sites,
    target: float | str,
    kind: BudgetKind,
    limits: Mapping[str, float | str] | None,
    latency: Prices | None = None,
) -> tuple[Budget, ...]:
    """The budgets of a search, the one that leads first: of `limits` if there are any, else of `target` and `kind`.

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
            raise SearchError("budget latency: give latency=, the measured times of nmfx.runtime.latency.measure_latency")
        value = parse_limit(limits[name]) if limits else parse_target(target)
        checked = cast(BudgetKind, name)
        dense = sum(amount(site, checked, latency) for site in sites)
        if not dense:
            raise SearchError(f"{sites.model or 'the model'} has no {name} to save: no sites")
        budgets.append(Budget(checked, value, dense))
    return tuple(budgets)
