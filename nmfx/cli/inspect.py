"""nmfx inspect: what is in a checkpoint, scheme, work directory or model."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from nmfx.cli import tables
from nmfx.cli.common import model_settings, warn_random
from nmfx.cli.console import heading, output, working
from nmfx.cli.convert import show_sites
from nmfx.errors import SchemeError
from nmfx.export.checkpoint import read_checkpoint
from nmfx.files.parsing import read_text
from nmfx.models.census import find_sites
from nmfx.models.source import find_source
from nmfx.scheme import Scheme, published_entries
from nmfx.stages.work import asked, example_of, open_work


def run(args: Namespace) -> None:
    """Look at what `args.what` names, and show it."""
    what = asked(args.what, "inspect")
    path = Path(what)
    if path.is_dir():
        _show_work(path)
    elif path.suffix == ".safetensors":
        _show_checkpoint(path)
    elif path.is_file():
        _show_scheme(path)
    else:
        _show_model(what, model_settings(args).size, args.classes)


def _show_work(path: Path) -> None:
    found, out = open_work(path), output()
    out.print(heading("work directory", f" {path}: {found.model}, {found.weights} weights"))
    with working("finding the sites"):
        model = found.build_meta()
        sites = found.sites(model)
    if start := found.start(sites):
        out.print(heading("starts from a compressed checkpoint: ", tables.start_line(start, sites)), soft_wrap=True)
    scheme = Scheme.load(found.scheme_path, sites) if found.scheme_path.is_file() else None
    if scheme is None:
        out.print(tables.site_table(sites, Scheme({}), {}))
        out.print(f"\nno scheme yet; next: {found.command('search')}", soft_wrap=True)
    else:
        out.print(tables.scheme_bars(sites, scheme, out.width))
        out.print()
        out.print(tables.totals_table(scheme.totals(sites)))
        _show_info(scheme)
    warn_random(found)


def _show_checkpoint(path: Path) -> None:
    header, tensors = read_checkpoint(path)
    out, scheme = output(), header.scheme
    made_of = header.source or header.model
    out.print(heading("checkpoint", f" {path}: {made_of}, {tables.size(path.stat().st_size)}, SHA-256 agrees"))
    rows = {name: tensors[f"{name}:values"].numel() for name in header.sites if name not in header.aliases}
    weights = sum(header.grouping(name).numel for name in rows)
    for name, kept in rows.items():
        numel, shape = header.grouping(name).numel, "x".join(map(str, header.sites[name].shape))
        out.print(f"  {scheme[name]!s:>6}  {name}  {shape}  {kept:,} of {numel:,}", soft_wrap=True)
    plain = [tensor for name, tensor in tensors.items() if ":" not in name]
    counts = tables.pattern_counts(scheme)
    out.print(f"packed: {len(rows)} sites, {sum(rows.values()):,} of {weights:,} weights kept ({counts})")
    out.print(f"as they are: {len(plain)} tensors, {sum(t.numel() for t in plain):,} numbers")
    _show_info(scheme)


def _show_scheme(path: Path) -> None:
    out = output()
    try:
        scheme = Scheme.load(path)
    except SchemeError:
        content = read_text(path, "a scheme", SchemeError)
        if not content.lstrip().startswith("{"):
            raise
        rows = published_entries(content, str(path))
        out.print(heading("scheme", f" {path}: published format, {len(rows)} layers, numbered in module order"))
        for key, pattern in rows.items():
            out.print(f"  {pattern!s:>6}  {key}", soft_wrap=True)
        return
    out.print(heading("scheme", f" {path}: {len(scheme)} sparse sites of {len(scheme.shapes) or '?'}, layout {scheme.layout}"))
    for name in scheme.shapes or scheme:
        out.print(f"  {scheme.get(name, 'dense')!s:>6}  {name}", soft_wrap=True)
    out.print(tables.pattern_counts(scheme))
    _show_info(scheme)


def _show_info(scheme: Scheme) -> None:
    if info := {key: value for key, value in scheme.info.items() if value}:
        output().print("  ".join(f"{key}: {value}" for key, value in info.items()), soft_wrap=True)


def _show_model(name: str, size: tuple[int, ...] | None, classes: int | None) -> None:
    source, out = replace(find_source(name), kwargs={"num_classes": classes} if classes else {}), output()
    with working(f"building {source} without memory"):
        model = source.build_meta()
        sites = find_sites(model, example_of(model, size))
    out.print(heading(str(source), f" ({type(model).__name__}), {len(sites)} sites"))
    show_sites(sites, Scheme({}), {})
