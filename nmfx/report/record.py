"""What a report is made from: plain values, whoever found the scheme."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from nmfx.models.site import Site, Sites
from nmfx.scheme import Scheme, Totals
from nmfx.sparsity.pattern import Pattern

STAGES = (5, 14)  # as many stages as can be labelled along seven inches


class Step(Protocol):
    """One step of a search, as `nmfx.search.events.Event` is: a site went from one pattern to another."""

    @property
    def site(self) -> str: ...  # noqa: D102
    @property
    def before(self) -> Pattern: ...  # noqa: D102
    @property
    def after(self) -> Pattern: ...  # noqa: D102
    @property
    def reason(self) -> str: ...  # noqa: D102
    @property
    def cost(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Limit:
    """A budget: at most `limit` of `dense`, of which `used` are; `unit` is weights, MACs or bytes."""

    unit: str
    limit: int
    dense: int
    used: int


@dataclass(frozen=True)
class Report:
    """A scheme on its network, with what is known of how it was found.

    Attributes:
        label: a short name beside other schemes.
        model, method: of what, and by what.
        limits: the budgets it was found under; steps count their cost in the unit of the first.
        steps: which site stepped when; none of a method that decides at once.
        curve: of an exact method, the least loss against the budget: (share kept, loss as a share of the largest).
        point: where this scheme is on it.
        reasons: why a site stayed dense, or took another M, whatever the budget.
        seconds: time of the search.
        facts: more to say in the head of a page, such as versions.
        lost: share of all squared weights that the scheme drops, where weights are at hand.
    """

    sites: Sites
    scheme: Scheme
    label: str = ""
    model: str = ""
    method: str = ""
    limits: tuple[Limit, ...] = ()
    steps: Sequence[Step] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    curve: Sequence[tuple[float, float]] = ()
    point: tuple[float, float] | None = None
    lost: float | None = None

    @cached_property
    def totals(self) -> Totals:
        """Weights and MACs of all sites, dense and kept."""
        return self.scheme.totals(self.sites)

    @property
    def title(self) -> str:
        """The model, the method, and the budget reached."""
        limit = self.limits[0] if self.limits else Limit("weights", 0, self.totals.weights, self.totals.kept)
        most = f"; at most {limit.limit:,}" if limit.limit else ""
        name = ", ".join(filter(None, (self.model, self.method or self.label)))
        return f"{name}: {limit.used:,} of {limit.dense:,} {limit.unit} kept ({limit.used / (limit.dense or 1):.2%}{most})"

    def pattern(self, site: Site) -> Pattern:
        """The pattern of a site, ``Pattern.DENSE`` when it has none."""
        return self.scheme.get(site.name, Pattern.DENSE)

    def density(self, site: Site) -> float:
        """Share of a site's weights that is kept."""
        return self.scheme.kept(site) / site.weights


@dataclass(frozen=True)
class Point:
    """One measured accuracy: of the method `label`, with the share `kept` of the weights; `spread` is half an error bar."""

    label: str
    kept: float
    accuracy: float
    spread: float = 0.0


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the best dense engine one engine is, within a `group` of the same batch and threads."""

    engine: str
    group: str
    median: float
    low: float
    high: float


def stages_of(names: Iterable[str]) -> list[str]:
    """The stage of each weight: the shortest prefixes of module names that make 5 to 14 stages.

    Where no depth does, as in a ViT of 24 blocks, neighbours under one parent share a stage: ``blocks.0-1``.
    """
    paths = [name.split(".")[:-1] or [name] for name in names]
    least, most = STAGES
    stages: list[str] = []
    for depth in range(1, max((len(path) for path in paths), default=1) + 1):
        coarser, stages = stages, [".".join(path[:depth]) for path in paths]
        found = len(set(stages))
        if least <= found <= most:
            return stages
        if found > most:
            merged = _merge(stages, families=True)
            if len(set(merged)) <= most:
                return merged
            return coarser if len(set(coarser)) > 2 else _merge(stages, families=False)
    return stages


def _merge(stages: list[str], *, families: bool) -> list[str]:
    """Neighbours put together in runs, the shortest that make few enough; of `families`, those that differ in a number only."""
    unique = list(dict.fromkeys(stages))
    kin = [list(run) for _, run in itertools.groupby(unique, key=lambda s: re.sub(r"\d+$", "", s) if families else "")]
    size = next((n for n in range(2, len(unique)) if sum(-(-len(family) // n) for family in kin) <= STAGES[1]), len(unique))
    label: dict[str, str] = {}
    for family in kin:
        for start in range(0, len(family), size):
            run = family[start : start + size]
            end = run[-1].removeprefix(re.sub(r"\d+$", "", run[0]))
            label |= dict.fromkeys(run, run[0] if len(run) == 1 else f"{run[0]}-{end}")
    return [label[stage] for stage in stages]


def short_names(stages: Iterable[str]) -> dict[str, str]:
    """The shortest endings that still tell stages apart, a number with the word before it: ``encoder.layers.3 -> layers.3``."""
    unique = list(dict.fromkeys(stages))
    for depth in range(1, max((stage.count(".") for stage in unique), default=0) + 2):
        short = {stage: _ending(stage, depth) for stage in unique}
        if len(set(short.values())) == len(unique):
            return short
    return {stage: stage for stage in unique}


def _ending(stage: str, depth: int) -> str:
    parts = stage.split(".")
    while depth < len(parts) and re.fullmatch(r"\d+(-\d+)?", parts[-depth]):
        depth += 1
    return ".".join(parts[-depth:])
