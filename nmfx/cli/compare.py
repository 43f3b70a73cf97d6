"""nmfx compare: schemes for one network side by side."""

from __future__ import annotations

import string
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from nmfx.cli.console import advancing, heading, output, show_json
from nmfx.cli.tables import table
from nmfx.errors import NmfxError
from nmfx.models.site import Site
from nmfx.report.record import Report
from nmfx.settings.flags import read_flags
from nmfx.settings.stages import ModelSettings
from nmfx.stages import report as reports_io
from nmfx.stages.compare import compare

LETTERS = string.ascii_uppercase


def run(args: Namespace) -> None:
    """Read the schemes, find their network, show where they differ, and write what is asked for."""
    paths, out = [Path(name) for name in args.schemes], output()
    if len(paths) < 2:
        raise NmfxError("compare needs two schemes or more; `nmfx inspect` shows one")
    if len(paths) > len(LETTERS):
        raise NmfxError(f"{len(paths)} schemes: at most {len(LETTERS)} can be told apart side by side")
    if lost := next((path for path in paths if not path.exists()), None):
        raise NmfxError(f"{lost}: no such file or directory")
    reports_io.check(args.figure, args.html, force=args.force)
    with advancing("finding the sites"):
        reports = compare(paths, read_flags(args, ModelSettings, name=args.model or ""))
    sites = reports[0].sites
    out.print(heading(reports[0].model, f": {len(reports)} schemes, {len(sites)} sites"))
    for letter, name, report in zip(LETTERS, args.schemes, reports, strict=False):
        info = report.scheme.info
        said = [str(info[key]) for key in ("method", "target") if info.get(key)]
        said += [f"of {info['budget']}"] if said and info.get("budget") else []
        out.print(Text.assemble((letter, "bold"), f"  {name}", f"  ({' '.join(said)})" if said else ""), soft_wrap=True)
    out.print()
    out.print(_site_table(reports, everything=args.all))
    out.print()
    out.print(_totals(reports))
    differing = sum(_differs(reports, site) for site in sites)
    out.print(f"\n{differing} of {len(sites)} sites differ" if differing else f"\nthe same pattern at all {len(sites)} sites")
    if written := reports_io.write_comparison(reports, args.figure, args.html, force=args.force):
        out.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
    if args.json:
        show_json(_values(reports, args.schemes))


def _site_table(reports: Sequence[Report], *, everything: bool) -> Table:
    """A row for every site that differs, marked; neighbours that agree are one row, unless `everything`."""
    result = table("site~", *(f"{letter}>" for letter in LETTERS[: len(reports)]), "")
    for differs, run in groupby(reports[0].sites, lambda site: _differs(reports, site)):
        sites = list(run)
        if not (differs or everything):
            result.add_row(Text(f"... {len(sites)} that agree" if len(sites) > 1 else "... 1 that agrees", "dim"))
            continue
        for site in sites:
            patterns = [report.scheme.get(site.name, "dense") for report in reports]
            cells = [Text(str(pattern), "yellow" if differs else "dim") for pattern in patterns]
            result.add_row(Text(site.name), *cells, "*" if differs else "")
    return result


def _differs(reports: Sequence[Report], site: Site) -> bool:
    return len({report.pattern(site) for report in reports}) > 1


def _totals(reports: Sequence[Report]) -> Table:
    """One row a scheme: what it keeps, the squared weight error where weights are at hand, and where it leaves the first."""
    error = ("error>",) if reports[0].lost is not None else ()
    result = table("", "weights kept>", "sparsity>", "MACs kept>", "sparsity>", *error, "unlike A>")
    for letter, report in zip(LETTERS, reports, strict=False):
        totals, share = report.totals, [] if report.lost is None else [f"{report.lost:.3%}"]
        unlike = sum(_differs((reports[0], report), site) for site in report.sites)
        cells = (f"{totals.kept:,}", f"{totals.sparsity:.3%}", f"{totals.kept_macs:,}", f"{totals.mac_sparsity:.3%}", *share)
        result.add_row(letter, *cells, "-" if letter == "A" else f"{unlike}")
    return result


def _values(reports: Sequence[Report], names: Sequence[str]) -> dict[str, Any]:
    """All sites, those that agree too, and the totals of each scheme, in the order that they were named."""
    schemes = [
        {"scheme": name, "info": dict(report.scheme.info), "totals": asdict(report.totals), "error": report.lost}
        for name, report in zip(names, reports, strict=True)
    ]
    sites = [
        {
            "site": site.name,
            "shape": list(site.shape),
            "patterns": [str(report.scheme.get(site.name, "dense")) for report in reports],
            "differs": _differs(reports, site),
        }
        for site in reports[0].sites
    ]
    return {"model": reports[0].model, "schemes": schemes, "sites": sites}
