"""What a site may be given: group sizes, N's, how many rows share a mask, what stays dense, how rows are cut into groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmfx import text
from nmfx.errors import SearchError
from nmfx.settings.methods import METHODS
from nmfx.settings.option import option
from nmfx.sparsity.pattern import MAX_M, VECTORS, Layout, Pattern, Remainder

if TYPE_CHECKING:
    from nmfx.models.site import Site, Sites

DEFAULT_M = 16  # the group size


@dataclass(frozen=True)
class Choices:
    """What a site may be given. Of `min_density`, the first glob that matches counts.

    Raises:
        SearchError: a number of rows that cannot share a mask. An M or N out of range is refused when it is asked for.
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
    vector: int | tuple[int, ...] | None = option(
        None,
        "adjacent outputs that share one mask: 1, 2, 4 or 8, or several, of which knapsack and spdy choose one for each site; "
        "1, or that of a compressed start",
        metavar="V,V,...",
    )
    keep_dense: tuple[str, ...] = option((), "sites or modules that stay dense", metavar="GLOB", repeat=True)
    min_density: float | Mapping[str, float] = option(0.0, "least density of the sites", metavar="[GLOB=]SHARE", repeat=True)
    layout: Layout = option("strict", "groups within rows of input channels, or across them")
    remainder: Remainder = option("dense", "rows that M does not divide: stay dense, take a smaller M, or end in a short group")

    def __post_init__(self) -> None:
        for name in ("candidates", "patterns", "keep_dense"):  # iterators would be used up by the first look
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.vector is not None:
            several = tuple(self.vector) if isinstance(self.vector, Iterable) else (self.vector,)
            if not several or any(isinstance(v, bool) or v not in VECTORS for v in several):
                expected = f"how many adjacent outputs share a mask: one of {', '.join(map(str, VECTORS))}, or several"
                raise SearchError(f"vector = {self.vector!r}: expected {expected}")
            object.__setattr__(self, "vector", several if isinstance(self.vector, Iterable) else self.vector)

    @property
    def shared(self) -> tuple[int, ...]:
        """How many adjacent outputs may share a mask, ascending.

        Raises:
            SearchError: patterns of another such number than is asked for.
        """
        asked = {self.vector} if isinstance(self.vector, int) else set(self.vector or ())
        found = {p.vector for p in map(Pattern, self.patterns or ()) if not p.is_dense}
        if asked and found - asked:
            said = ", ".join(map(str, self.patterns or ()))
            raise SearchError(f"patterns {said} and vector = {self.vector}: patterns say how many rows share; leave vector out")
        return tuple(sorted(found or asked or {1}))

    def check_shared(self, *, mixed: bool) -> None:
        """Check that masks are all shared by as many rows, unless the method is one that chooses for each site (`mixed`).

        Raises:
            SearchError: they are not.
        """
        if len(self.shared) > 1 and not mixed:
            several, choosing = ", ".join(map(str, self.shared)), " and ".join(n for n, one in METHODS.items() if one.mixed)
            raise SearchError(f"masks shared by {several} rows: give all patterns one V; {choosing} choose it for each site")

    @property
    def wanted(self) -> dict[tuple[int, int], tuple[Pattern, ...]]:
        """The patterns, the sparsest first, by M and V: the largest M first, then the smallest V; none of them dense.

        Raises:
            SearchError: an M or N out of range.
        """
        if self.patterns is not None:
            found: dict[tuple[int, int], set[Pattern]] = {}
            for pattern in map(Pattern, self.patterns):
                if not pattern.is_dense:
                    found.setdefault((pattern.m, pattern.vector), set()).add(pattern)
            groups = sorted(found, key=lambda group: (-group[0], group[1]))
            return {group: tuple(sorted(found[group], key=lambda one: one.n)) for group in groups}
        m = DEFAULT_M if self.m is None else self.m
        if not isinstance(m, int | tuple | list):
            raise SearchError(f"m = {m!r}: expected a group size in 2..{MAX_M}, or several")
        sizes = {m} if isinstance(m, int) else set(m)
        for m in sizes:
            if not (isinstance(m, int) and 1 < m <= MAX_M):
                raise SearchError(f"m = {m}: expected a group size in 2..{MAX_M}")
        numbers = {m: parse_candidates(m, self.candidates)[:-1] for m in sorted(sizes, reverse=True)}
        return {(m, v): tuple(Pattern(n, m, v) for n in ns) for m, ns in numbers.items() for v in self.shared}

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
