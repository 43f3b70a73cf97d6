"""nmfx compare: schemes for one network side by side."""

from __future__ import annotations

import string
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rich.table import Table
from rich.text import Text

from nmfx.cli.common import model_settings
from nmfx.cli.console import heading, output, working
from nmfx.cli.tables import table
from nmfx.errors import NmfxError
from nmfx.models.site import Site
from nmfx.report.record import Report
from nmfx.stages import report as reports_io
from nmfx.stages.compare import find_network, read_scheme, weight_error


def run(args: Namespace) -> None:
    """Read the schemes, find their network, show where they differ, and write what is asked for."""
    paths = [Path(name) for name in args.schemes]
    if len(paths) < 2:
        raise NmfxError("compare needs two schemes or more; `nmfx inspect` shows one")
    if len(paths) > len(string.ascii_uppercase):
        raise NmfxError(f"{len(paths)} schemes: at most {len(string.ascii_uppercase)} can be told apart side by side")
    if lost := next((path for path in paths if not path.exists()), None):
        raise NmfxError(f"{lost}: no such file or directory")
    reports_io.check(args.figure, args.html, force=args.force)
    with working("finding the sites"):
        network = find_network(paths, model_settings(args, args.model or ""))
        schemes = [read_scheme(path, network) for path in paths]
    errors = [weight_error(network, scheme) for scheme in schemes] if network.model else []
    labels = [path.name if [p.name for p in paths].count(path.name) == 1 else str(path) for path in paths]
    reports = [
        Report(network.sites, scheme, label=label, model=network.name, method=str(scheme.info.get("method", "")))
        for label, scheme in zip(labels, schemes, strict=True)
    ]
    _show(args.schemes, reports, errors, everything=args.all)
    if errors:
        reports = [replace(r, facts={"squared weight error": f"{e:.4%}"}) for r, e in zip(reports, errors, strict=True)]
    if written := reports_io.write_comparison(reports, args.figure, args.html, force=args.force):
        output().print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)


def _show(names: Sequence[str], reports: Sequence[Report], errors: Sequence[float], *, everything: bool) -> None:
    out, sites = output(), reports[0].sites
    out.print(heading(reports[0].model, f": {len(reports)} schemes, {len(sites)} sites"))
    for letter, name, report in zip(string.ascii_uppercase, names, reports, strict=False):
        info = report.scheme.info
        said = [str(info[key]) for key in ("method", "target") if info.get(key)]
        budget = [f"of {info['budget']}"] if said and info.get("budget") else []
        out.print(
            Text.assemble((letter, "bold"), f"  {name}", f"  ({' '.join(said + budget)})" if said else ""), soft_wrap=True
        )
    out.print()
    out.print(_site_table(reports, everything=everything))
    out.print()
    out.print(_totals(reports, errors))
    differing = sum(_differs(reports, site) for site in sites)
    out.print(f"\n{differing} of {len(sites)} sites differ" if differing else f"\nthe same pattern at all {len(sites)} sites")


def _site_table(reports: Sequence[Report], *, everything: bool) -> Table:
    """A row for every site that differs, marked; neighbours that agree are one row, unless `everything`."""
    letters = [f"{letter}>" for letter, _ in zip(string.ascii_uppercase, reports, strict=False)]
    result = table("site~", *letters, "")
    for differs, run in groupby(reports[0].sites, lambda site: _differs(reports, site)):
        sites = list(run)
        if differs or everything:
            for site in sites:
                cells = [_cell(report, site, style="yellow" if differs else "dim") for report in reports]
                result.add_row(Text(site.name), *cells, "*" if differs else "")
        else:
            result.add_row(Text(f"... {len(sites)} that agree" if len(sites) > 1 else "... 1 that agrees", "dim"))
    return result


def _cell(report: Report, site: Site, style: str) -> Text:
    pattern = report.pattern(site)
    return Text("dense" if pattern.is_dense else str(pattern), style)


def _differs(reports: Sequence[Report], site: Site) -> bool:
    return len({report.pattern(site) for report in reports}) > 1


def _totals(reports: Sequence[Report], errors: Sequence[float]) -> Table:
    """One row a scheme: what it keeps, the squared weight error where weights are at hand, and where it leaves the first."""
    error = ("error>",) if errors else ()
    result = table("", "weights kept>", "sparsity>", "MACs kept>", "sparsity>", *error, "unlike A>")
    for index, report in enumerate(reports):
        totals, share = report.totals, [f"{errors[index]:.3%}"] if errors else []
        unlike = sum(_differs((reports[0], report), site) for site in report.sites)
        cells = (f"{totals.kept:,}", f"{totals.sparsity:.3%}", f"{totals.kept_macs:,}", f"{totals.mac_sparsity:.3%}", *share)
        result.add_row(string.ascii_uppercase[index], *cells, f"{unlike}" if index else "-")
    return result
