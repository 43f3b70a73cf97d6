"""A scheme file in YAML: every key known, every pattern and shape parsed."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from nmfx import text
from nmfx.errors import SchemeError
from nmfx.files import parsing
from nmfx.files.parsing import Count, Finite, Form, Text
from nmfx.scheme.published import parse_pattern
from nmfx.sparsity.pattern import Layout

VERSION = 1
INFO = ("model", "weights", "method", "score", "budget", "target", "m", "sites")  # what a scheme file says of its origin


class StatedTotals(Form, frozen=True):
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
    totals: StatedTotals = StatedTotals()
    patterns: dict[str, str] = msgspec.field(default_factory=dict)
    shapes: dict[str, str] = msgspec.field(default_factory=dict)


def parse_document(content: str, origin: str) -> tuple[dict[str, Any], StatedTotals]:
    """The fields of a `Scheme` out of what `Scheme.to_yaml` wrote, and the totals that it states.

    Raises:
        SchemeError: naming `origin` and the key: unknown keys, doubled names, malformed patterns, another version.
    """
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
    patterns = {name: parse_pattern(p, f"{origin}: patterns.{parsing.printable(name)}") for name, p in body.patterns.items()}
    shapes = {name: _shape(shape, f"{origin}: shapes.{parsing.printable(name)}") for name, shape in body.shapes.items()}
    fields = {"patterns": patterns, "layout": body.layout, "short": body.short, "shapes": shapes, "info": info}
    return fields, body.totals


def _shape(said: str, where: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,12}(x[0-9]{1,12}){0,7}", said):
        raise SchemeError(f"{where}: {parsing.printable(said, 60)!r} is not a shape, as 64x3x7x7")
    return tuple(map(int, said.split("x")))
