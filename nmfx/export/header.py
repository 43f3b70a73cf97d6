"""What a checkpoint says of itself, in the JSON of its header: parsed, and checked against the tensors beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from nmfx.errors import CheckpointError, PatternError
from nmfx.files import parsing
from nmfx.files.parsing import Form, Size, Text
from nmfx.models.arguments import parse_kwargs
from nmfx.models.source import Source
from nmfx.scheme import Scheme
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.packing import pack
from nmfx.sparsity.pattern import Pattern
from nmfx.sparsity.score import SCORES

VERSION = 2  # of files in which rows share masks; others say 1, as before there were any
MOST_WEIGHTS = 1 << 48  # of one site: sizes that no arithmetic overflows
Decay = Annotated[float, Meta(ge=0, le=1e6)]  # SR-STE's factor: 2e-4 and the like


class PackedSite(Form, frozen=True):
    """A sparse weight of a checkpoint: how it is cut into groups, and how its mask trains (see `MaskSpec`)."""

    text: str = msgspec.field(name="pattern")
    rows: tuple[Size, Size, Size]
    flat: bool
    shape: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=8)]
    decay: Decay | None
    frozen: bool
    derived: bool = False
    score: str = "magnitude"
    outputs: tuple[Size, Size] | None = None  # of rows that share a mask (see `Grouping`)

    def __post_init__(self) -> None:  # msgspec makes an error that names the site of a ValueError
        try:
            _ = self.pattern
        except PatternError as error:
            raise ValueError(f"pattern: {error}") from error
        if self.score not in SCORES:
            raise ValueError(f"score: unknown: {parsing.printable(self.score, 60)}")
        if math.prod(self.rows) != math.prod(self.shape) or math.prod(self.shape) > MOST_WEIGHTS:
            raise ValueError(f"shape {self.shape} does not fit rows {self.rows}")
        if (self.outputs is not None) != (self.pattern.vector > 1) or not self.grouping.fits:
            raise ValueError(f"outputs: {self.outputs} do not fit {self.pattern} over rows {self.rows}")

    @property
    def pattern(self) -> Pattern:
        """N weights kept of each M."""
        return Pattern(self.text)

    @property
    def parts(self) -> tuple[str, ...]:
        """What is stored of it under ``NAME:``; a derived one is stored as it is, all of it counts (see `MaskSpec`)."""
        stored = ("values", "positions") if not self.derived else ("mask",) if self.frozen else ()
        return stored + (("evidence",) if SCORES[self.score].needs != "nothing" else ())

    @property
    def grouping(self) -> Grouping:
        """Its groups."""
        return Grouping(self.rows, self.pattern.m, self.flat, self.pattern.vector, self.outputs)


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself."""

    source: Source | None
    model: str
    sites: Mapping[str, PackedSite]
    aliases: Mapping[str, str]
    info: Mapping[str, str]

    @property
    def scheme(self) -> Scheme:
        """The scheme the weights were packed with."""
        flat = any(site.flat for site in self.sites.values())
        short = any(not site.flat and site.rows[1] % site.pattern.m for site in self.sites.values())
        patterns = {name: site.pattern for name, site in self.sites.items() if name not in self.aliases}
        return Scheme(patterns, "flat" if flat else "strict", short, info=self.info)

    def grouping(self, name: str) -> Grouping:
        """Groups of a packed site."""
        return self.sites[name].grouping


class _SourceForm(Form, frozen=True):
    library: Literal["torchvision", "timm", "demo"]
    name: Annotated[str, Meta(pattern=r"\A[\w.-]{1,200}\Z")]  # of a registry: no colon, no slash
    kwargs: dict[str, Any]


class _HeaderForm(Form, frozen=True):
    version: int
    source: _SourceForm | None
    model: Text
    sites: dict[str, Any]
    aliases: dict[str, str]
    info: dict[str, Text]


def parse_header(content: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Header:
    """The header of a checkpoint, checked against its tensors: every site has its parts, every name its place.

    Raises:
        CheckpointError: naming the first that has not, or the key of the header that is wrong.
    """
    if content.get("kind") == "compiled":
        raise CheckpointError(f"{path}: a compiled model, not a checkpoint; nmfx.load_compiled loads it")
    if "kind" in content:
        raise CheckpointError(f"{path}: the state of a run to resume, not a checkpoint; load what the run has exported")
    form = parsing.convert(content, _HeaderForm, f"{path}: its header is damaged", CheckpointError)
    where = f"{path}: its header is damaged: sites"
    sites = parsing.convert_each(form.sites, PackedSite, where, CheckpointError)
    source = None
    if form.source is not None:
        kwargs = parse_kwargs(form.source.kwargs, f"{path}: its header: source", CheckpointError)
        source = Source(form.source.library, form.source.name, kwargs)
    parts = {f"{name}:{part}" for name, site in sites.items() if name not in form.aliases for part in site.parts}
    plain = {name for name in tensors if ":" not in name}
    if odd := next(iter(sorted(parts ^ (tensors.keys() - plain))), None):
        is_there = "belongs to no site" if odd in tensors else "is missing"
        raise CheckpointError(f"{path}: {parsing.printable(odd)} {is_there}")
    for name, first in form.aliases.items():
        mine, own = sites.get(name), sites.get(first)
        if first in form.aliases or name in plain or not (first in plain or own) or (mine is not None and mine != own):
            raise CheckpointError(f"{path}: aliases: {parsing.printable(f'{name} and {first}')} cannot share memory")
    for name, site in sites.items():
        if name not in form.aliases and (name in plain) != site.derived:
            raise CheckpointError(
                f"{path}: {parsing.printable(name)} is not stored once, {'as it is' if site.derived else 'packed'}"
            )
        if site.derived and site.frozen and name not in form.aliases:
            _check_mask(tensors[f"{name}:mask"], site, f"{path}: {parsing.printable(name)}:mask")
        if (evidence := tensors.get(f"{name}:evidence")) is not None and not (
            evidence.is_floating_point()
            and evidence.dim() == 3
            and all(size in (1, full) for size, full in zip(evidence.shape, site.rows))
        ):
            said = f"expected floats that fit rows {site.rows}, found {evidence.dtype} {tuple(evidence.shape)}"
            raise CheckpointError(f"{path}: {parsing.printable(name)}:evidence: {said}")
    return Header(source, form.model, sites, form.aliases, form.info)


def _check_mask(mask: Tensor, site: PackedSite, where: str) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != site.shape:
        raise CheckpointError(f"{where}: expected torch.bool {site.shape}, found {mask.dtype} {tuple(mask.shape)}")
    try:
        pack(mask, mask, site.pattern.n, site.grouping)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
