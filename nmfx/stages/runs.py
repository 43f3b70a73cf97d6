"""What a platform will run sparse of an exported network, site by site, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nmfx.models.site import Sites
from nmfx.runtime.saved.reading import read_compiled
from nmfx.scheme import Scheme
from nmfx.settings.platforms import PLATFORMS, Platform
from nmfx.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Run:
    """How one site runs.

    Attributes:
        site: its name.
        kind: the operation that reads it.
        shape: of the weight.
        pattern: in the scheme; ``Pattern.DENSE`` where it is dense.
        sparse: whether its zeros are made use of.
        why: where they are not, why; else what that means, where there is something to say.
    """

    site: str
    kind: str
    shape: tuple[int, ...]
    pattern: Pattern
    sparse: bool
    why: str = ""


@dataclass(frozen=True)
class Runs:
    """How the sites of a network run on a platform; `name` is its key in `PLATFORMS`."""

    name: str
    sites: tuple[Run, ...]

    @property
    def platform(self) -> Platform:
        """Its entry."""
        return PLATFORMS[self.name]

    def __str__(self) -> str:
        sparse = sum(run.sparse for run in self.sites)
        return f"{self.platform.label}: {sparse} of {len(self.sites)} sites run sparse"


def runs_on(name: str, sites: Sites, scheme: Scheme, written: Path) -> Runs:
    """What a platform will run sparse of a network under a scheme: by its rules, or as it was timed for the file `written`."""
    platform = PLATFORMS[name]
    chosen = {one.name: one.chosen for one in read_compiled(written)[0].choices} if platform.measured else None
    found = []
    for site in sites:
        pattern = scheme.get(site.name, Pattern.DENSE)
        if chosen is None or pattern.is_dense:
            why = platform.reason(site, pattern) or (_cut(site.length, pattern, scheme) if platform.whole else "")
            sparse, why = not why, why or platform.how(site)
        else:
            way = chosen.get(site.name, "")
            sparse, why = way.startswith("sparse"), way if way else "it is no site of the compiled graph"
        found.append(Run(site.name, site.kind, site.shape, pattern, sparse, why))
    return Runs(name, tuple(found))


def _cut(length: int, pattern: Pattern, scheme: Scheme) -> str:
    """Why groups that a scheme cuts otherwise than in whole ones within rows are not what a platform reads."""
    if length % pattern.m == 0:
        return ""
    return f"groups of {pattern.m} {'cross rows' if scheme.layout == 'flat' else 'are short at the end of rows'} of {length}"


def json_of(runs: Runs) -> dict[str, object]:
    """The same as plain values."""
    sites: Sequence[Run] = runs.sites
    return {
        "platform": runs.name,
        "label": runs.platform.label,
        "gain": runs.platform.gain,
        "sources": list(runs.platform.sources),
        "checked": runs.platform.checked,
        "sites": [
            {"site": run.site, "kind": run.kind, "shape": list(run.shape), "pattern": shown(run.pattern), "sparse": run.sparse,
             "why": run.why}
            for run in sites
        ],
    }  # fmt: skip


def shown(pattern: Pattern) -> str:
    """A pattern in words."""
    return "dense" if pattern.is_dense else str(pattern)
