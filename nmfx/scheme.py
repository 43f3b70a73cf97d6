"""The scheme: which pattern each site gets. A value from weight name to pattern, its totals, and its two file formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from nmfx import text
from nmfx.errors import PatternError, SchemeError
from nmfx.files import parsing
from nmfx.files.atomic import write_atomic
from nmfx.files.parsing import Count, Finite, Form, Text
from nmfx.models.site import Site, Sites
from nmfx.sparsity.layout import Grouping, group
from nmfx.sparsity.pattern import Layout, Pattern, Remainder

VERSION = 1
INFO = ("model", "weights", "method", "score", "budget", "target", "m", "sites")  # what a scheme file says of its origin


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
        fits = site.weights % pattern.m == 0
        return (pattern, "") if fits else (Pattern.DENSE, f"{site.weights} weights do not divide by {pattern.m}")
    if site.length == 1:
        return Pattern.DENSE, "depthwise: one input channel a group" if site.conv_groups > 1 else "one input channel"
    if remainder == "short":
        rest = min(pattern.m, site.length)
        return (pattern, "") if rest > pattern.n else (Pattern.DENSE, f"in={site.length} is not more than N={pattern.n}")
    reason = f"in={site.length} does not divide by {pattern.m}"
    smaller = max((m for m in range(2, pattern.m) if site.length % m == 0), default=1)
    if remainder == "dense" or smaller == 1:
        return Pattern.DENSE, reason
    return Pattern(max(1, -(-pattern.n * smaller // pattern.m)), smaller), f"{reason}; M = {smaller} instead"


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
        """`pattern` on every site that can take it (see `fit`), except those matching a glob of `keep_dense`."""
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
                    group(site.name, site.rows, wanted[rule], layout)  # raises: this very site was asked for
        return Scheme(patterns, layout, remainder == "short", shapes_of(sites))

    def grouping(self, site: Site) -> Grouping:
        """The groups of `site` under its pattern (one group of everything when it is dense).

        Raises:
            SchemeError: the layout cannot cut the weight so.
        """
        return group(site.name, site.rows, self.get(site.name, Pattern.DENSE), self.layout, short=self.short)

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

        def write(temporary: Path) -> None:
            temporary.write_text(content, encoding="utf-8")

        write_atomic(path, write, force=force)

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
        scheme, said = _parse(content, str(path))
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
        return _parse(content, origin)[0]

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


class _Totals(Form, frozen=True):
    """Totals as a scheme file states them."""

    weights: Count | None = None
    kept: Count | None = None
    macs: Count | None = None
    kept_macs: Count | None = None
    sparsity: Finite | None = None


class _Body(Form, frozen=True):
    """A scheme file below its first two lines."""

    layout: Layout = "strict"
    short: bool = False
    totals: _Totals = _Totals()
    patterns: dict[str, str] = msgspec.field(default_factory=dict)
    shapes: dict[str, str] = msgspec.field(default_factory=dict)


def _parse(content: str, origin: str) -> tuple[Scheme, _Totals]:
    """A scheme in YAML, and the totals that it states."""
    tree = parsing.yaml_tree(content, origin, SchemeError)
    if tree.pop("nmfx", None) != "scheme":
        raise SchemeError(f"{origin}: not a scheme file (it should begin with 'nmfx: scheme')")
    if (version := tree.pop("version", "1")) != str(VERSION):
        said = parsing.printable(str(version), 20)
        raise SchemeError(f"{origin}: scheme version {said}, this nmfx reads version {VERSION}; upgrade nmfx")
    text.check_keys(tree, (*INFO, "layout", "short", "totals", "patterns", "shapes"), origin, SchemeError)
    info = parsing.convert({key: tree.pop(key) for key in INFO if key in tree}, dict[str, Text], origin, SchemeError)
    layout, short = tree.get("layout", "strict"), tree.get("short", "false")
    if layout not in ("strict", "flat") or short not in ("true", "false"):
        said = parsing.printable(f"layout {layout!r} or short {short!r}", 120)
        raise SchemeError(f"{origin}: {said}: expected strict or flat, true or false")
    if not all(re.fullmatch(r"[0-9]{1,3}", size) for size in info.get("m", "1").split(", ")):
        raise SchemeError(f"{origin}: m: {parsing.printable(info['m'], 60)!r} is not a group size")
    if not all(isinstance(tree.get(key, {}), dict) for key in ("patterns", "shapes")):
        raise SchemeError(f"{origin}: 'patterns' and 'shapes' should map weight names to N:M and to shapes")
    body = parsing.convert(tree, _Body, origin, SchemeError, strict=False)
    if "patterns" not in tree or ("sites" in info and body.shapes.keys() != body.patterns.keys()):
        raise SchemeError(f"{origin}: patterns or shapes are missing: the file is truncated; make it anew")
    patterns = {name: _pattern(p, f"{origin}: patterns.{parsing.printable(name)}") for name, p in body.patterns.items()}
    shapes = {name: _shape(shape, f"{origin}: shapes.{parsing.printable(name)}") for name, shape in body.shapes.items()}
    return Scheme(patterns, body.layout, body.short, shapes, info), body.totals


def _pattern(said: str, where: str) -> Pattern:
    try:
        return Pattern.DENSE if said == "dense" else Pattern(said)
    except PatternError as error:
        raise SchemeError(f"{where}: {parsing.printable(str(error))}") from error


def _shape(said: str, where: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,12}(x[0-9]{1,12}){0,7}", said):
        raise SchemeError(f"{where}: {parsing.printable(said, 60)!r} is not a shape, as 64x3x7x7")
    return tuple(map(int, said.split("x")))


ENTRY = re.compile(
    r"""\s*(?P<quote>['"])(?P<key>[^'"\\]{0,200})(?P=quote)\s*:\s*"""
    r"""(?:\[\s*(?P<n>[0-9]{1,3})\s*,\s*(?P<m>[0-9]{1,3})\s*,?\s*\]|\(\s*(?P<n2>[0-9]{1,3})\s*,\s*(?P<m2>[0-9]{1,3})\s*,?\s*\))"""
    r"""\s*(?P<end>,\s*\}|,|\})"""
)


def published_entries(content: str, origin: str = "scheme") -> dict[str, Pattern]:
    """The layers of the published one-line format and their patterns: a dict of ``'layer': [N, M]``, read letter by letter.

    Raises:
        SchemeError: it is something else, or a layer is there twice.
    """
    entries: dict[str, Pattern] = {}
    content = content.strip()
    place, end = 1, ""
    while not end.endswith("}"):
        entry = ENTRY.match(content, place) if content.startswith("{") else None
        if entry is None or entry["key"] in entries:
            near = parsing.printable(content[place : place + 30])
            raise SchemeError(f"{origin}: not a published scheme, a dict of 'layer': [N, M], once each: at {near!r}")
        n, m = entry["n"] or entry["n2"], entry["m"] or entry["m2"]
        entries[entry["key"]] = _pattern(f"{n}:{m}", f"{origin}: {parsing.printable(entry['key'])}")
        place, end = entry.end(), entry["end"]
    if place != len(content):
        raise SchemeError(f"{origin}: not a published scheme: something follows it")
    return entries


def shapes_of(sites: Sites) -> dict[str, tuple[int, ...]]:
    """Shape of every site, by name."""
    return {site.name: site.shape for site in sites}


def published_keys(sites: Sites) -> dict[str, str]:
    """Site name -> key of the published format: convolutions and linears numbered in module order."""
    keys, convolutions, linears = {}, 0, 0
    for site in sites:
        if site.kind.startswith("conv") and "transpose" not in site.kind:
            width = site.shape[1] * site.conv_groups
            keys[site.name] = f"SparseConv{convolutions}_{width}-{site.shape[0]}-{tuple(site.shape[2:])}"
            convolutions += 1
        elif site.kind == "linear":
            keys[site.name] = f"Linear{linears}_{site.shape[1]}-{site.shape[0]}"
            linears += 1
    return keys


def _needed(sites: Sites | None, path: Path) -> Sites:
    if sites is None:
        raise SchemeError(f"{path}: the published format has no weight names; give the model's sites=find_sites(model)")
    return sites
