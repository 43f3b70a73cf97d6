"""nmfx models: the models that can be converted by name, and what was measured of them."""

from __future__ import annotations

import difflib
from argparse import Namespace
from collections.abc import Mapping
from fnmatch import fnmatchcase

from rich.progress import track
from rich.table import Table

from nmfx.cli.console import errors, output, warn
from nmfx.cli.tables import count, table
from nmfx.errors import ModelError
from nmfx.models.coverage import measure
from nmfx.models.source import find_source, list_models, versions
from nmfx.models.table import Entry, load_table


def run(args: Namespace) -> None:
    """Show the models that match `args.pattern`."""
    known, measured, out = list_models(), load_table(), output()
    names = matching(args.pattern, known)
    entries = dict(measured.entries)
    if args.measure:
        entries |= _measure([name for name in names if name not in entries])
    out.print(_table(names, entries))
    said = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    changed = [f"{name} {version}" for name, version in versions().items() if measured.versions.get(name) != version]
    installed = f"; installed now: {', '.join(changed)}" if changed else ""
    out.print(f"{len(names):,} of {len(known):,} models; measured {measured.date} with {said}{installed}", soft_wrap=True)


def matching(pattern: str, known: list[str]) -> list[str]:
    """Names that a glob matches, or that hold a plain text; without a prefix such as ``timm:``, those of all libraries.

    Raises:
        ModelError: there is none; the message lists the nearest names.
    """
    pattern = pattern.lower()
    is_glob, prefixed = any(mark in pattern for mark in "*?["), ":" in pattern

    def matches(name: str) -> bool:
        library, _, plain = name.partition(":")
        text = (name if prefixed else plain).lower()
        return fnmatchcase(text, pattern) if is_glob else pattern in text or pattern == library

    if names := [name for name in known if matches(name)]:
        return names
    plain = {name.partition(":")[2]: name for name in reversed(known)}
    near = difflib.get_close_matches(pattern.rpartition(":")[2].strip("*?"), plain, n=4, cutoff=0.5)
    hint = f"nearest: {', '.join(plain[name] for name in near)}" if near else "`nmfx models` lists them all"
    raise ModelError(f"no model of torchvision or timm matches {pattern!r}; {hint}")


def _measure(names: list[str]) -> dict[str, Entry]:
    """Entries of the models that can be measured; the others are told of on standard error."""
    found: dict[str, Entry] = {}
    for name in track(names, "measuring", console=errors(), transient=True, disable=not errors().is_terminal):
        try:
            found[name] = measure(find_source(name))
        except Exception as error:  # a library's builder may raise anything, and the next model is none the worse for it
            warn(f"{name} cannot be measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return found


def _table(names: list[str], entries: Mapping[str, Entry]) -> Table:
    result = table("model~", "parameters>", "sites>", "covered>", "fx>", "CPU")
    for name in names:
        if (entry := entries.get(name)) is None:
            result.add_row(name, "", "", "", "not measured")
            continue
        graph = f"{entry.parts} parts, " if entry.parts > 1 else ""
        reach = graph + percent(entry.reach) if entry.parts else "none"
        result.add_row(name, count(entry.parameters), str(entry.sites), percent(entry.share), reach, entry.numerics or "-")
    return result


def percent(share: float) -> str:
    """``99.8%``; ``100%`` is all of it, never a rounded figure."""
    return "100%" if share == 1 else f"{min(share, 0.999):.1%}"
