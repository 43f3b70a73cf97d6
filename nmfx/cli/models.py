"""nmfx models: the models that can be converted by name, and what was measured of them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from nmfx.cli.console import advancing, output, show_json, warn
from nmfx.cli.tables import table
from nmfx.models.coverage import measure
from nmfx.models.source import find_source, list_models, matching, versions
from nmfx.models.table import Entry, load_table
from nmfx.text import count, percent


def run(args: Namespace) -> None:
    """Show the models that match `args.pattern`."""
    known, measured, out = list_models(), load_table(), output()
    names = matching(args.pattern, known)
    entries = dict(measured.entries)
    if args.measure:
        entries |= _measure([name for name in names if name not in entries])
    if args.json:
        show_json({"measured": measured.date, "versions": dict(measured.versions), "models": [*_values(names, entries)]})
        return
    out.print(_table(names, entries))
    said = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    changed = [f"{name} {version}" for name, version in versions().items() if measured.versions.get(name) != version]
    installed = f"; installed now: {', '.join(changed)}" if changed else ""
    out.print(f"{len(names):,} of {len(known):,} models; measured {measured.date} with {said}{installed}", soft_wrap=True)


def _measure(names: list[str]) -> dict[str, Entry]:
    """Entries of the models that can be measured; the others are told of on standard error."""
    found: dict[str, Entry] = {}
    with advancing("measuring") as progress:
        for index, name in enumerate(names):
            progress(index / len(names), f"measuring {name}")
            try:
                found[name] = measure(find_source(name))
            except Exception as error:  # a library's builder may raise anything, and the next model is none the worse for it
                warn(f"{name} cannot be measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return found


def _table(names: list[str], entries: Mapping[str, Entry]) -> Table:
    result = table("model~", "parameters>", "sites>", "covered>?", "fx>?", "CPU?")
    for name in names:
        if (entry := entries.get(name)) is None:
            result.add_row(name, "", "", "", "not measured")
            continue
        graph = f"{entry.parts} parts, " if entry.parts > 1 else ""
        reach = graph + percent(entry.reach) if entry.parts else "none"
        result.add_row(name, count(entry.parameters), str(entry.sites), percent(entry.share), reach, entry.numerics or "-")
    return result


def _values(names: list[str], entries: Mapping[str, Entry]) -> Iterator[dict[str, Any]]:
    for name in names:
        entry = entries.get(name)
        yield {"model": name, "measured": False} if entry is None else {**asdict(entry), "share": entry.share, "measured": True}
