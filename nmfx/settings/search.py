"""How patterns are chosen: what a site may be given, the numbers of the published loop, the method and its budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmfx import text
from nmfx.errors import NmfxError, SearchError
from nmfx.settings.methods import METHODS, SENSITIVITIES, default_sensitivity
from nmfx.settings.option import check_options, inline, option
from nmfx.settings.target import BudgetKind, parse_limit, parse_target
from nmfx.sparsity.pattern import MAX_M, Layout, Pattern, Remainder
from nmfx.sparsity.score import SCORES, check_score

if TYPE_CHECKING:
    from nmfx.models.site import Site, Sites

QUANTILE = 0.75  # share of a site's groups that must agree before it steps (domino.md, section 4)
DEFAULT_TARGET, DEFAULT_M = 0.875, 16  # the sparsity where it can be reached, and the group size
DOUBLINGS = (30_000, 40_000, 50_000, 60_000, 70_000, 80_000)
ALONE = {"scheme": (), "pattern": ("keep_dense", "layout", "remainder")}  # keys that a search by neither can have beside them


@dataclass(frozen=True)
class Choices:
    """What a site may be given. Of `min_density`, the first glob that matches counts.

    Raises:
        SearchError: an M or N out of range.
    """

    m: int | tuple[int, ...] | None = option(
        None,
        "group size M, or several: knapsack and spdy mix them, the others take the largest that fits a site; 16, or that of a "
        "compressed start",
        metavar="M,M,...",
    )
    candidates: tuple[int, ...] | None = option(
        None, "the N's to choose from besides M; powers of two up to M", metavar="N,N,..."
    )
    patterns: tuple[Pattern, ...] | None = option(
        None, "only these patterns, as 2:4 for hardware, instead of M and N's", metavar="N:M,..."
    )
    keep_dense: tuple[str, ...] = option((), "sites or modules that stay dense", metavar="GLOB", repeat=True)
    min_density: float | Mapping[str, float] = option(0.0, "least density of the sites", metavar="[GLOB=]SHARE", repeat=True)
    layout: Layout = option("strict", "groups within rows of input channels, or across them")
    remainder: Remainder = option("dense", "rows that M does not divide: stay dense, take a smaller M, or end in a short group")

    def __post_init__(self) -> None:
        for name in ("candidates", "patterns", "keep_dense"):  # iterators would be used up by the first look
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))

    @property
    def wanted(self) -> dict[int, tuple[int, ...]]:
        """The N's below M, ascending, of each M, the largest first.

        Raises:
            SearchError: an M or N out of range.
        """
        if self.patterns is not None:
            found: dict[int, set[int]] = {}
            for pattern in map(Pattern, self.patterns):
                if not pattern.is_dense:
                    found.setdefault(pattern.m, set()).add(pattern.n)
            return {m: tuple(sorted(found[m])) for m in sorted(found, reverse=True)}
        m = DEFAULT_M if self.m is None else self.m
        if not isinstance(m, int | tuple | list):
            raise SearchError(f"m = {m!r}: expected a group size in 2..{MAX_M}, or several")
        sizes = {m} if isinstance(m, int) else set(m)
        for m in sizes:
            if not (isinstance(m, int) and 1 < m <= MAX_M):
                raise SearchError(f"m = {m}: expected a group size in 2..{MAX_M}")
        return {m: parse_candidates(m, self.candidates)[:-1] for m in sorted(sizes, reverse=True)}

    def least_density(self, site: Site) -> tuple[float, str]:
        """The least density of a site, and the glob that says so."""
        rules = self.min_density if isinstance(self.min_density, Mapping) else {"*": self.min_density}
        glob = next((glob for glob in rules if text.matches(site.name, glob)), "")
        return (rules[glob], glob) if glob else (0.0, "")

    def check(self, sites: Sites) -> None:
        """Check that every glob matches a site and every density is one.

        Raises:
            SearchError: naming the glob and the nearest site.
        """
        rules = self.min_density if isinstance(self.min_density, Mapping) else {}
        for name, globs in (("keep-dense", self.keep_dense), ("min-density", rules)):
            for glob in globs:
                if not any(text.matches(site.name, glob) for site in sites):
                    raise SearchError(f"{name}: no site matches {glob!r}{text.unmatched(glob, [s.name for s in sites])}")
        for share in rules.values() if rules else [self.min_density]:
            if not (isinstance(share, int | float) and 0 <= share <= 1):
                raise SearchError(f"min-density {share}: expected a density in 0..1, such as 0.25")


@dataclass(frozen=True)
class DominoSettings:
    """The numbers of the published loop (domino.md, section 4); see `DominoSearch`."""

    eta: bool = option(True, "layer-wise penalty factors; the ablation is without them", flag="no-eta")
    b1: float | None = option(None, "share of MACs in eta; 0.5, or 0.8 for a budget of MACs", flag=None)
    b2: float | None = option(None, "share of ERK in eta; 0.5, or 0.2 for a budget of MACs", flag=None)
    decay: float = option(0.1, "domino: penalty on kept weights", least=0)
    penalty_every: int = option(5, "iterations between penalties", flag=None, least=1)
    vote_every: int = option(100, "domino: iterations between votes", least=1, metavar="T")
    quorum: float = option(QUANTILE, "share of a site's groups that must agree before it steps", flag=None, least=0, most=1)
    tolerance: float = option(0.001, "the search is done this near to the target", flag=None, least=0, most=1)
    doublings: tuple[int, ...] = option(DOUBLINGS, "iterations at which decay doubles", flag=None)

    def __post_init__(self) -> None:
        if not isinstance(self.eta, bool):
            raise SearchError(f"eta={self.eta!r}: expected True or False")
        check_options(self, "DominoSearch", SearchError)
        object.__setattr__(self, "doublings", tuple(self.doublings))

    def decay_at(self, t: int) -> float:
        """The decay of iteration t: doubled at each of the `doublings`."""
        return self.decay * 2.0 ** sum(t >= doubling for doubling in self.doublings)


@dataclass(frozen=True)
class SearchSettings:
    """Which patterns: by a `method` under a budget, or `pattern` on every site that can take it, or the `scheme` of a file."""

    method: str = option("knapsack", ", ".join(dict.fromkeys(("knapsack", *METHODS))))
    target: float | str | None = option(None, "sparsity to reach, as 0.875, or times fewer, as 8x; 0.875, or what is in reach")
    budget: BudgetKind = option("params", "what the target counts; bytes: of the packed weights; latency: see --target-latency")
    limits: Mapping[str, float | str] | None = option(
        None,
        "instead of target and budget, one or two of: params, macs or bytes, and the share to keep or times fewer, as in "
        "params=0.125 or macs=4x",
        flag="limit",
        metavar="KIND=SHARE",
        repeat=True,
    )
    pattern: Pattern | None = option(None, "this pattern on every site that can take it", flag=None)
    scheme: str = option("", "a scheme file", flag=None)
    data: bool = option(False, "look at training pictures: domino runs the published loop, others measure on a few", flag=None)
    sensitivity: str = option(
        "", "what the knapsack sums up: weight, activation, gradient or measured; gradient with data, weight without"
    )
    score: str = option("magnitude", f"what masks rank weights by: {', '.join(SCORES)}")
    pictures: int = option(256, "training pictures to look at", least=1)
    seconds: float = option(60.0, "time limit of spdy", least=0, above=True)
    lr: float = option(0.01, "domino: learning rate", least=0)
    batch_size: int = option(64, "pictures a batch, of all processes together", least=1)
    most: int = option(100_000, "domino: iterations to give up after", least=1, metavar="T")
    seed: int = option(0, "of the pictures, and of spdy", least=0, most=2**32 - 1)
    choices: Choices = inline(Choices())
    loop: DominoSettings = inline(DominoSettings())

    @staticmethod
    def check_keys(tree: Mapping[str, Any], where: str) -> None:
        """Refuse keys that cannot stand beside each other, or would say nothing."""
        for lonely, allowed in ALONE.items():
            if lonely in tree and (extra := next((key for key in tree if key not in (lonely, *allowed)), None)):
                raise NmfxError(
                    f"{where}: {extra!r} says nothing beside {lonely!r}; {lonely} takes {', '.join(allowed) or 'no other'}"
                )
        if "limits" in tree and (extra := next((key for key in ("target", "budget") if key in tree), None)):
            raise NmfxError(f"{where}: {extra!r} and 'limits' say the same thing; give one")
        method = METHODS.get(tree.get("method", ""))
        loops = tree.get("data") == "true" and method is not None and method.looped
        if not loops and (extra := next((key for key in tree if key in DominoSettings.__dataclass_fields__), None)):
            raise NmfxError(f"{where}: {extra!r} is of the published loop: it needs method domino with data: true")

    def __post_init__(self) -> None:
        first = dict.fromkeys((type(self).method, *METHODS))  # the default one first
        for key, word, known in (("method", self.method, first), ("sensitivity", self.sensitivity, ("", *SENSITIVITIES))):
            if word not in known:
                raise NmfxError(f"unknown {key} {word!r}{text.nearest(word, known)}; known: {', '.join(filter(None, known))}")
        needs, scored = METHODS[self.method], check_score(self.score).needs
        check_options(self, "search settings")
        if self.target is not None:
            parse_target(self.target)
        for share in (self.limits or {}).values():
            parse_limit(share)
        measures, looks = SENSITIVITIES[self.measured].pictures, needs.pictures == "always"
        if self.looping and self.score != "magnitude":
            raise NmfxError(f"score {self.score}: the published loop ranks weights by magnitude; leave one of them out")
        if self.data and not (self.looping or looks or measures or scored != "nothing"):
            raise NmfxError(f"data: true, but {self.method} with sensitivity {self.measured} looks at none: leave it out")
        if not self.data and (looks or measures or scored != "nothing"):
            which = self.method if looks else f"sensitivity {self.measured}" if measures else f"score {self.score}"
            raise NmfxError(f"{which} looks at training pictures: say data: true")

    @property
    def measured(self) -> str:
        """The sensitivity that is summed up: what is asked for, or the best that the data at hand allow."""
        return self.sensitivity or default_sensitivity(self.method, self.data)

    @property
    def looping(self) -> bool:
        """Whether it is the published loop over training batches."""
        return self.data and METHODS[self.method].looped


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
