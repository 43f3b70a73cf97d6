"""nmfx compare: schemes for one network side by side."""

from __future__ import annotations

import string
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn

from nmfx.cli.common import model_settings
from nmfx.cli.console import heading, output, working
from nmfx.errors import ModelError, NmfxError, SchemeError
from nmfx.export.checkpoint import read_checkpoint
from nmfx.files.parsing import read_text
from nmfx.models.building import build_meta
from nmfx.models.census import find_sites
from nmfx.models.site import Site, Sites, weight_of
from nmfx.models.source import Source, find_source
from nmfx.passes.thresholds import sorted_magnitudes
from nmfx.report.record import Report
from nmfx.scheme import Scheme
from nmfx.stages import report as reports_io
from nmfx.stages.work import WorkDirectory, around, example_of, open_work


@dataclass(frozen=True)
class Network:
    """What the schemes are for: its sites, and its weights where they are at hand and not random."""

    name: str
    sites: Sites
    model: nn.Module | None = None
    guessed: bool = False  # from a name alone, which does not say what it was built with


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
        network = _network(paths, args)
        schemes = [_scheme(path, network) for path in paths]
    errors = [_error(network, scheme) for scheme in schemes] if network.model else []
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


def _network(paths: Sequence[Path], args: Namespace) -> Network:
    """The network of --model, of the first work directory that is or holds one of `paths`, or that the first scheme names."""
    size, kwargs = model_settings(args).size, {"num_classes": args.classes} if args.classes else {}
    if args.model is not None:
        directory = Path(args.model)
        return _of_work(open_work(directory)) if directory.is_dir() else _of_name(args.model, kwargs, size)
    for path in [] if kwargs or size else [*filter(Path.is_dir, paths), *filter(Path.is_file, paths)]:
        if (found := open_work(path) if path.is_dir() else around(path)) is not None:
            return _of_work(found)
    for path in paths:
        if (source := _source(path)) is not None:
            return _of_name(str(source), {**source.kwargs, **kwargs}, size)
    raise NmfxError(f"{paths[0]}: does not say which network it is for; give --model NAME, or a work directory")


def _of_work(found: WorkDirectory) -> Network:
    if found.weights == "random":
        return Network(found.model, _named(found.sites(found.build_meta()), found.model))
    model = found.load()
    return Network(found.model, _named(found.sites(model), found.model), model)


def _of_name(name: str, kwargs: Mapping[str, Any], size: tuple[int, ...] | None) -> Network:
    source = replace(find_source(name), kwargs=dict(kwargs))
    model = build_meta(source)
    sites = find_sites(model, example_of(model, size))
    return Network(str(source), _named(sites, str(source)), guessed=True)


def _named(sites: Sites, name: str) -> Sites:
    """With the network's name instead of its class: resnet18 and resnet34 are both a ResNet."""
    return replace(sites, model=name)


def _source(path: Path) -> Source | None:
    """What a checkpoint or a scheme says of its network; None when it says nothing that we could build."""
    if path.suffix == ".safetensors":
        return read_checkpoint(path)[0].source
    if read_text(path, "a scheme", SchemeError).lstrip().startswith("{"):
        return None  # the published format
    try:
        return find_source(str(Scheme.load(path).info["model"]))
    except (ModelError, KeyError):
        return None


def _scheme(path: Path, network: Network) -> Scheme:
    """The scheme of a file or work directory, checked against the network.

    Raises:
        NmfxError: naming the file and the first difference.
    """
    sites = network.sites
    try:
        if path.is_dir():
            found = open_work(path)
            if not found.scheme_path.is_file():
                raise NmfxError(f"{path}: has no scheme yet; make one with `nmfx search {path}`")
            return Scheme.load(found.scheme_path, sites)
        scheme = read_checkpoint(path)[0].scheme if path.suffix == ".safetensors" else Scheme.load(path, sites)
        scheme.check(sites)
    except SchemeError as error:
        said = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        if network.guessed:
            said = said.removesuffix("; make it anew")
            said += "; made for other classes or another input? say --classes N, --input-size CxHxW, or --model DIR"
        raise SchemeError(said) from error
    return scheme


def _error(network: Network, scheme: Scheme) -> float:
    """Share of all squared weights that `scheme` drops."""
    assert network.model is not None
    lost = energy = 0.0
    for site in network.sites:
        weight = weight_of(network.model, site)
        energy += float(weight.detach().double().square().sum())
        if site.name in scheme:
            dropped = sorted_magnitudes(weight, scheme.grouping(site))[scheme[site.name].n :]
            lost += float(dropped.double().square().sum())
    return lost / (energy or 1.0)


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
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("site", overflow="fold")
    for letter, _ in zip(string.ascii_uppercase, reports, strict=False):
        table.add_column(letter, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for differs, run in groupby(reports[0].sites, lambda site: _differs(reports, site)):
        sites = list(run)
        if differs or everything:
            for site in sites:
                cells = [_cell(report, site, style="yellow" if differs else "dim") for report in reports]
                table.add_row(Text(site.name), *cells, "*" if differs else "")
        else:
            table.add_row(Text(f"... {len(sites)} that agree" if len(sites) > 1 else "... 1 that agrees", "dim"))
    return table


def _cell(report: Report, site: Site, style: str) -> Text:
    pattern = report.pattern(site)
    return Text("dense" if pattern.is_dense else str(pattern), style)


def _differs(reports: Sequence[Report], site: Site) -> bool:
    return len({report.pattern(site) for report in reports}) > 1


def _totals(reports: Sequence[Report], errors: Sequence[float]) -> Table:
    """One row a scheme: what it keeps, the squared weight error where weights are at hand, and where it leaves the first."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    columns = ("", "weights kept", "sparsity", "MACs kept", "sparsity", *(["error"] if errors else []), "unlike A")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for index, report in enumerate(reports):
        totals, error = report.totals, [f"{errors[index]:.3%}"] if errors else []
        unlike = sum(_differs((reports[0], report), site) for site in report.sites)
        cells = (f"{totals.kept:,}", f"{totals.sparsity:.3%}", f"{totals.kept_macs:,}", f"{totals.mac_sparsity:.3%}", *error)
        table.add_row(string.ascii_uppercase[index], *cells, f"{unlike}" if index else "-")
    return table
