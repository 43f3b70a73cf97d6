"""nmfx inspect: what is in a checkpoint, compiled model, scheme, work directory or model."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nmfx.cli import tables
from nmfx.cli.common import warn_random
from nmfx.cli.console import advancing, heading, output, show_json
from nmfx.cli.convert import show_sites
from nmfx.errors import SchemeError
from nmfx.export.checkpoint import read_checkpoint
from nmfx.export.hub import SCHEME, is_hub
from nmfx.files.parsing import printable, read_text
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.models.source import find_source
from nmfx.runtime.saved.reading import read_compiled
from nmfx.scheme import Scheme, published_entries
from nmfx.settings.flags import read_flags
from nmfx.settings.stages import ModelSettings
from nmfx.stages.work import asked, example_of, open_work
from nmfx.text import size

Values = dict[str, Any]


def run(args: Namespace) -> None:
    """Look at what `args.what` names, and show it."""
    what = asked(args.what, "inspect")
    path = Path(what)
    if is_hub(path):
        values = _show_scheme(path / SCHEME)
    elif path.is_dir():
        values = _show_work(path)
    elif path.suffix == ".safetensors":
        values = _show_checkpoint(path)
    elif path.suffix == ".nmfxc":
        values = _show_compiled(path)
    elif path.is_file():
        values = _show_scheme(path)
    else:
        values = _show_model(read_flags(args, ModelSettings, name=what))
    if args.json:
        show_json(values)


def _show_work(path: Path) -> Values:
    found, out = open_work(path), output()
    warn_random(found)
    out.print(heading("work directory", f" {path}: {found.model}, {found.weights} weights"))
    with advancing("finding the sites"):
        sites = found.sites(found.build_meta())
    if start := found.start(sites):
        out.print(heading("starts from a compressed checkpoint: ", tables.start_line(start, sites)), soft_wrap=True)
    scheme = found.scheme(sites) if found.scheme_path.is_file() else None
    if scheme is not None:
        out.print(tables.scheme_bars(sites, scheme, out.width))
        out.print()
        out.print(tables.totals_table(scheme.totals(sites)))
        _show_info(scheme)
    else:
        out.print(tables.site_table(sites, Scheme({}), {}))
        out.print(f"\nno scheme yet; next: {found.command('search')}", soft_wrap=True)
    return {"kind": "work directory", "model": found.model, "weights": found.weights, "note": found.note} | _of(sites, scheme)


def _show_checkpoint(path: Path) -> Values:
    header, tensors = read_checkpoint(path)
    out, scheme = output(), header.scheme
    of = f"{header.source or header.model}, {size(path.stat().st_size)}"
    out.print(heading("checkpoint", f" {path}: {of}, SHA-256 agrees"))
    rows = {name: tensors[f"{name}:values"].numel() for name in header.sites if name not in header.aliases}
    weights = {name: header.grouping(name).numel for name in rows}
    for name, kept in rows.items():
        shape = "x".join(map(str, header.sites[name].shape))
        out.print(f"  {scheme[name]!s:>6}  {name}  {shape}  {kept:,} of {weights[name]:,}", soft_wrap=True)
    packed = f"{len(rows)} sites, {sum(rows.values()):,} of {sum(weights.values()):,} weights kept"
    out.print(f"packed: {packed} ({scheme.counts()})")
    plain = [tensor.numel() for name, tensor in tensors.items() if ":" not in name]
    out.print(f"as they are: {len(plain)} tensors, {sum(plain):,} numbers")
    _show_info(scheme)
    return {
        "kind": "checkpoint",
        "model": str(header.source or header.model),
        "bytes": path.stat().st_size,
        "info": dict(scheme.info),
        "sites": [
            {"site": name, "shape": list(header.sites[name].shape), "pattern": str(scheme[name]), "kept": kept,
             "weights": weights[name]}
            for name, kept in rows.items()
        ],
    }  # fmt: skip


def _show_compiled(path: Path) -> Values:
    header, out = read_compiled(path)[0], output()
    sizes, spans = "x".join(map(str, header.inputs.shape[1:])), header.inputs.batches
    batches = ", ".join(str(least) if least == most else f"{least} to {most}" for least, most in spans[:3])
    of = f"{header.inputs.dtype} {sizes} in batches of {batches}{', ...' * (len(spans) > 3)}, {size(path.stat().st_size)}"
    out.print(heading("compiled model", f" {path}: {of}, SHA-256 agrees"), soft_wrap=True)
    for one in header.choices:
        kept = f"{one.kept:,} of {math.prod(one.shape):,}"
        out.print(f"  {one.chosen:<24}  {printable(one.name)}  {'x'.join(map(str, one.shape))}  {kept}", soft_wrap=True)
    where = f"{header.machine.name}, {header.machine.threads} threads, torch {header.machine.torch}"
    out.print(f"chosen on: {printable(where)}", soft_wrap=True)
    return {
        "kind": "compiled model",
        "bytes": path.stat().st_size,
        "inputs": {"dtype": header.inputs.dtype, "shape": list(header.inputs.shape), "batches": [list(one) for one in spans]},
        "machine": {"name": header.machine.name, "threads": header.machine.threads, "torch": header.machine.torch},
        "sites": [
            {"site": one.name, "shape": list(one.shape), "kept": one.kept, "chosen": one.chosen} for one in header.choices
        ],
    }


def _show_scheme(path: Path) -> Values:
    out, content = output(), read_text(path, "a scheme", SchemeError)
    if content.lstrip().startswith("{"):
        rows = published_entries(content, str(path))
        out.print(heading("scheme", f" {path}: published format, {len(rows)} layers, numbered in module order"))
        for key, pattern in rows.items():
            out.print(f"  {pattern!s:>6}  {key}", soft_wrap=True)
        return {"kind": "published scheme", "patterns": {key: str(pattern) for key, pattern in rows.items()}}
    scheme = Scheme.load(path)
    out.print(heading("scheme", f" {path}: {len(scheme)} sparse sites of {len(scheme.shapes) or '?'}, layout {scheme.layout}"))
    for name in scheme.shapes or scheme:
        out.print(f"  {scheme.get(name, 'dense')!s:>6}  {name}", soft_wrap=True)
    out.print(scheme.counts())
    _show_info(scheme)
    return {
        "kind": "scheme",
        "layout": scheme.layout,
        "info": dict(scheme.info),
        "patterns": {name: str(scheme.get(name, "dense")) for name in scheme.shapes or scheme},
    }


def _show_info(scheme: Scheme) -> None:
    if info := {key: value for key, value in scheme.info.items() if value}:
        output().print("  ".join(f"{key}: {value}" for key, value in info.items()), soft_wrap=True)


def _show_model(settings: ModelSettings) -> Values:
    source = replace(find_source(settings.name), kwargs=dict(settings.kwargs))
    with advancing(f"building {source} without memory"):
        model = source.build_meta()
        sites = find_sites(model, example_of(model, settings.size))
    output().print(heading(str(source), f" ({type(model).__name__}), {len(sites)} sites"))
    show_sites(sites, Scheme({}), {})
    return {"kind": "model", "model": str(source), "class": type(model).__name__} | _of(sites, None)


def _of(sites: Sites, scheme: Scheme | None) -> Values:
    """Sites and totals as plain values, under a scheme where there is one."""
    chosen = scheme or Scheme({})
    return {
        "info": dict(chosen.info),
        "totals": None if scheme is None else asdict(scheme.totals(sites)),
        "sites": [
            {"site": site.name, "kind": site.kind, "shape": list(site.shape), "pattern": str(chosen.get(site.name, "dense")),
             "weights": site.weights, "kept": chosen.kept(site), "macs": site.macs}
            for site in sites
        ],
        "skipped": [{"name": one.name, "shape": list(one.shape), "reason": one.reason} for one in sites.skipped],
    }  # fmt: skip
