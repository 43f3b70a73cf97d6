"""The scheme as a value: weight name to pattern, its totals, and to and from its two file formats.

A few lines over 300, as what it promises of a site, a model and a file is read best in one piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nmfx import text
from nmfx.errors import SchemeError
from nmfx.files import parsing
from nmfx.files.atomic import write_text
from nmfx.models.site import Site, Sites
from nmfx.scheme.document import INFO, VERSION, parse_document
from nmfx.scheme.published import published_entries, published_keys
from nmfx.sparsity.layout import Grouping, crossed
from nmfx.sparsity.pattern import Layout, Pattern, Remainder


@dataclass(frozen=True)
class Totals:
    """Sums over all sites; MACs are per sample. `sparsity` is of the weights, `mac_sparsity` of the MACs."""

    weights: int
    kept: int
    macs: int
    kept_macs: int

    @property
    def sparsity(self) -> float:
        """Share of weights dropped."""
        return 1 - self.kept / self.weights if self.weights else 0.0

    @property
    def mac_sparsity(self) -> float:
        """Share of MACs dropped."""
        return 1 - self.kept_macs / self.macs if self.macs else 0.0


def fit(site: Site, pattern: Pattern, layout: Layout = "strict", remainder: Remainder = "dense") -> tuple[Pattern, str]:
    """The pattern `site` can really take when `pattern` is wanted, and the reason when it is another one.

    In the strict layout, a row of input channels that M does not divide stays dense (``dense``), takes the largest smaller
    M that divides it (``smaller``), or ends in a short group (``short``); a depthwise convolution always stays dense. The
    flat layout is the published behaviour: groups may cross rows, as long as M divides the number of weights.
    """
    if pattern.is_dense or site.length % pattern.m == 0:
        return pattern, ""
    if layout == "flat":
        found = crossed(Grouping(site.rows, pattern.m, True, pattern.vector, site.outputs))
        return (Pattern.DENSE, f"{found[0]} {found[1]} do not divide by {pattern.m}") if found else (pattern, "")
    if site.length == 1:
        return Pattern.DENSE, "depthwise: one input channel a group" if site.conv_groups > 1 else "one input channel"
    if remainder == "short":
        rest = min(pattern.m, site.length)
        return (pattern, "") if rest > pattern.n else (Pattern.DENSE, f"in={site.length} is not more than N={pattern.n}")
    reason = f"in={site.length} does not divide by {pattern.m}"
    smaller = max((m for m in range(2, pattern.m) if site.length % m == 0), default=1)
    if remainder == "dense" or smaller == 1:
        return Pattern.DENSE, reason
    return Pattern(max(1, -(-pattern.n * smaller // pattern.m)), smaller, pattern.vector), f"{reason}; M = {smaller} instead"


@dataclass(frozen=True)
class Scheme(Mapping[str, Pattern]):
    """Patterns by state-dict name; a site that is absent is dense.

    ``Scheme({"layer1.0.conv1.weight": "2:4"})`` works as well as the constructors below. A scheme is a mapping:
    ``scheme["layer1.0.conv1.weight"]`` is its pattern, iteration gives the sparse sites only.

    Attributes:
        layout: how weights are cut into groups, ``strict`` or ``flat``.
        short: rows that M does not divide end in a short group (strict layout).
        shapes: shapes of all sites of the model it was made for, to recognise another one.
        info: where it came from: model, weights, method, budget, target, m, and the hash of the site list.
    """

    patterns: Mapping[str, Pattern]
    layout: Layout = "strict"
    short: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parsed = {name: Pattern(pattern) for name, pattern in self.patterns.items()}
        object.__setattr__(self, "patterns", {name: p for name, p in parsed.items() if not p.is_dense})

    def __getitem__(self, name: str) -> Pattern:
        return self.patterns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.patterns)

    def __len__(self) -> int:
        return len(self.patterns)

    @staticmethod
    def uniform(
        sites: Sites,
        pattern: str | Pattern,
        *,
        keep_dense: Iterable[str] = (),
        layout: Layout = "strict",
        remainder: Remainder = "dense",
    ) -> Scheme:
        """`pattern` on every site that can take it (see `fit`).

        Args: as `from_rules`.

        Returns:
            The scheme.

        Raises:
            SchemeError: a glob of `keep_dense` matches no site.
        """
        return Scheme.from_rules(sites, {"*": pattern}, keep_dense=keep_dense, layout=layout, remainder=remainder)

    @staticmethod
    def from_rules(
        sites: Sites,
        rules: Mapping[str, str | Pattern],
        *,
        keep_dense: Iterable[str] = (),
        layout: Layout = "strict",
        remainder: Remainder = "dense",
    ) -> Scheme:
        """Globs over names of sites, or modules above them, to patterns; the first match counts, and what has none stays dense.

        Args:
            sites: of the model.
            rules: glob -> pattern.
            keep_dense: globs of sites that stay dense whatever the rules say.
            layout, remainder: how rows are cut, and what becomes of those that M does not divide (see `fit`).

        Returns:
            The scheme, with the shapes of all sites.

        Raises:
            SchemeError: a glob matches no site, or a rule that names one site asks for what it cannot take.
        """
        dense, wanted = list(keep_dense), {glob: Pattern(p) for glob, p in rules.items()}
        for glob in (*dense, *wanted):
            if not any(text.matches(site.name, glob) for site in sites):
                why = next((f" (skipped: {skipped.reason})" for skipped in sites.skipped if skipped.name == glob), "")
                why = why or text.unmatched(glob, [site.name for site in sites])
                raise SchemeError(f"no site matches {glob!r}{why}; `nmfx inspect MODEL` lists the sites")
        patterns = {}
        for site in sites:
            rule = next((glob for glob in wanted if text.matches(site.name, glob)), None)
            if rule is not None and not any(text.matches(site.name, glob) for glob in dense):
                patterns[site.name], reason = fit(site, wanted[rule], layout, remainder)
                if rule == site.name and reason and remainder == "dense":
                    site.grouping(wanted[rule], layout)  # raises: this very site was asked for
        return Scheme(patterns, layout, remainder == "short", shapes_of(sites))

    def grouping(self, site: Site) -> Grouping:
        """The groups of `site` under its pattern (one group of everything when it is dense).

        Raises:
            SchemeError: the layout cannot cut the weight so.
        """
        return site.grouping(self.get(site.name, Pattern.DENSE), self.layout, short=self.short)

    def kept(self, site: Site) -> int:
        """Weights of `site` that are kept."""
        return self.grouping(site).kept(self[site.name].n) if site.name in self else site.weights

    def totals(self, sites: Sites) -> Totals:
        """Weights and MACs of all sites of a model, dense and kept.

        Raises:
            SchemeError: the scheme does not fit the model (see `check`).
        """
        self.check(sites)
        kept = [self.kept(site) for site in sites]
        kept_macs = sum(site.macs * k // site.weights for site, k in zip(sites, kept, strict=True))
        return Totals(sites.weights, sum(kept), sites.macs, kept_macs)

    def counts(self, sites: Sites | None = None) -> str:
        """How many sites have each pattern, in words: ``2:16 x 20, 4:16 x 31``; of all `sites`, how many are dense as well."""
        numbers = Counter(sorted(self.values(), key=lambda pattern: pattern.order))
        parts = [f"{pattern} x {number}" for pattern, number in numbers.items()]
        dense = len(sites) - len(self) if sites is not None else 0
        return ", ".join([*parts, f"dense x {dense}"] if dense else parts) or "all dense"

    def check(self, sites: Sites) -> None:
        """Check that every entry names a site whose weight can be cut so.

        Raises:
            SchemeError: naming the first difference and what was expected.
        """
        shapes = shapes_of(sites)
        for name, shape in self.shapes.items():
            if name not in shapes:
                made_for = f" (it was made for {self.info['model']})" if "model" in self.info else ""
                raise SchemeError(f"{name} {shape}: in the scheme, but no site of {sites.model or 'the model'}{made_for}")
            if shapes[name] != shape:
                raise SchemeError(f"{name}: the scheme was made for shape {shape}, the model has {shapes[name]}")
        if "sites" in self.info and self.info["sites"] != sites.fingerprint and set(shapes) == set(self.shapes):
            raise SchemeError(f"the weights of {sites.model or 'the model'} are used otherwise than in the scheme's model")
        if self.shapes and (extra := next((name for name in shapes if name not in self.shapes), None)):
            raise SchemeError(f"{extra} {shapes[extra]}: a site of the model that the scheme does not know")
        for name in self:
            self.grouping(sites[name])

    def save(self, path: str | Path, sites: Sites | None = None, *, force: bool = True) -> None:
        """Write YAML, or for a ``.txt`` file the published one-line format (which needs `sites`).

        Raises:
            SchemeError: the published format is asked for without sites, or cannot say what the scheme says.
        """
        path = Path(path)
        if path.suffix == ".txt":
            content = self.to_published(_needed(sites, path))
        else:
            content = self.to_yaml(sites)
        write_text(path, content, force=force)

    @staticmethod
    def load(path: str | Path, sites: Sites | None = None) -> Scheme:
        """Read a scheme file of either format, and check it against `sites` when they are given.

        Raises:
            SchemeError: the file is missing or malformed, or does not fit the model, naming the first difference.
        """
        path = Path(path)
        content = parsing.read_text(path, "a scheme", SchemeError)
        if content.lstrip().startswith("{"):
            return Scheme.from_published(content, _needed(sites, path), origin=str(path))
        fields, said = parse_document(content, str(path))
        scheme = Scheme(**fields)
        if sites is not None:
            try:
                totals = scheme.totals(sites)
            except SchemeError as error:
                raise SchemeError(f"{path}: {parsing.printable(str(error))}") from error
            for key in ("weights", "kept", "macs", "kept_macs"):
                if (value := getattr(said, key)) is not None and value != (found := getattr(totals, key)):
                    raise SchemeError(f"{path}: says {key} {value}, its patterns come to {found}; make it anew")
        return scheme

    def to_yaml(self, sites: Sites | None = None) -> str:
        """The scheme as YAML; with `sites`, also totals, shapes and the hash of the site list."""
        head: dict[str, Any] = {"nmfx": "scheme", "version": VERSION} | {k: self.info[k] for k in INFO if k in self.info}
        head |= {"layout": self.layout, "short": self.short}
        shapes = self.shapes
        if sites is not None:
            totals, shapes = self.totals(sites), shapes_of(sites)
            head["sites"] = sites.fingerprint
            head["totals"] = {key: getattr(totals, key) for key in ("weights", "kept", "macs", "kept_macs")}
            head["totals"]["sparsity"] = round(totals.sparsity, 6)
        names = shapes or self.patterns
        lines = [yaml.safe_dump(head, sort_keys=False).rstrip(), "patterns:" if names else "patterns: {}"]
        lines += [f"  {text.quote(name)}: {text.quote(str(self[name])) if name in self else 'dense'}" for name in names]
        lines += ["shapes:"] if shapes else []
        lines += [f"  {text.quote(name)}: {text.quote('x'.join(map(str, shape)))}" for name, shape in shapes.items()]
        return "\n".join(lines) + "\n"

    @staticmethod
    def from_yaml(content: str, origin: str = "scheme") -> Scheme:
        """The scheme that `to_yaml` wrote. Unknown keys, doubled names and malformed patterns are errors."""
        return Scheme(**parse_document(content, origin)[0])

    def to_published(self, sites: Sites) -> str:
        """The one-line format of the published code, a Python dict literal (domino.md, section 7).

        Raises:
            SchemeError: a sparse site is neither a convolution nor a linear, or groups are short: it has no words for them.
        """
        keys = published_keys(sites)
        if lost := next((name for name in self if name not in keys), None):
            raise SchemeError(f"{lost}: the published format knows convolutions and linears only; save as .yaml")
        if self.short:
            raise SchemeError("the published format has no short groups; save as .yaml")
        if shared := next((name for name in self if self[name].vector > 1), None):
            raise SchemeError(f"{shared}: the published format has no masks that rows share ({self[shared]}); save as .yaml")
        said = str(self.info.get("m", max((p.m for p in self.values()), default=16)))
        default = max(map(int, said.split(", ")))  # of sites that are dense
        entries = {keys[s.name]: self.get(s.name, Pattern(default, default)) for s in sites if s.name in keys}
        return str({key: [pattern.n, pattern.m] for key, pattern in entries.items()}) + "\n"

    @staticmethod
    def from_published(content: str, sites: Sites, origin: str = "scheme") -> Scheme:
        """Read the published one-line format; parsed as a literal, never evaluated.

        Raises:
            SchemeError: malformed, or its layers are not those of the model, naming the first difference.
        """
        patterns = published_entries(content, origin)
        keys = published_keys(sites)
        for ours, theirs in zip(keys.values(), patterns, strict=False):
            if ours != theirs:
                raise SchemeError(f"{origin}: has {theirs!r} where {sites.model or 'the model'} has {ours!r}")
        if len(keys) != len(patterns):
            raise SchemeError(f"{origin}: has {len(patterns)} layers, {sites.model or 'the model'} has {len(keys)}")
        named = {name: patterns[key] for name, key in keys.items()}
        crossing = any(not p.is_dense and sites[name].length % p.m for name, p in named.items())
        m = max((p.m for p in patterns.values()), default=16)
        return Scheme(named, "flat" if crossing else "strict", shapes=shapes_of(sites), info={"m": str(m)})


def shapes_of(sites: Sites) -> dict[str, tuple[int, ...]]:
    """Shape of every site, by name."""
    return {site.name: site.shape for site in sites}


def _needed(sites: Sites | None, path: Path) -> Sites:
    if sites is None:
        raise SchemeError(f"{path}: the published format has no weight names; give the model's sites=find_sites(model)")
    return sites
