"""The one-line format of the published code: a dict literal from numbered layers to [N, M]."""

from __future__ import annotations

import re

from nmfx.errors import PatternError, SchemeError
from nmfx.files import parsing
from nmfx.models.site import Sites
from nmfx.sparsity.pattern import Pattern

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
        entries[entry["key"]] = parse_pattern(f"{n}:{m}", f"{origin}: {parsing.printable(entry['key'])}")
        place, end = entry.end(), entry["end"]
    if place != len(content):
        raise SchemeError(f"{origin}: not a published scheme: something follows it")
    return entries


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


def parse_pattern(said: str, where: str) -> Pattern:
    """A pattern of a file.

    Raises:
        SchemeError: it is none, naming `where`.
    """
    try:
        return Pattern.DENSE if said == "dense" else Pattern(said)
    except PatternError as error:
        raise SchemeError(f"{where}: {parsing.printable(str(error))}") from error
