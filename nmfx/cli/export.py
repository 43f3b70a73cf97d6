"""nmfx export: scheme files, the compressed checkpoint, and on demand baked weights, ONNX and a compiled model."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from nmfx.cli import tables
from nmfx.cli.common import data_settings, work_of
from nmfx.cli.console import advancing, heading, output, show_json, warn
from nmfx.errors import NmfxError
from nmfx.settings.flags import read_flags, typed
from nmfx.settings.formats import FORMATS
from nmfx.settings.stages import DataSettings, ExportSettings, PrecisionSettings
from nmfx.stages.export import ExportRecord, export, stamp_export
from nmfx.stages.runs import Runs, json_of, shown
from nmfx.stages.work import EXPORT
from nmfx.text import size


def run(args: Namespace) -> None:
    """Write the work directory's model under its scheme, show."""
    work, settings, out = work_of(args), read_flags(args, ExportSettings), output()
    folder = Path(args.out) if args.out else work.path / EXPORT
    precision = read_flags(args, PrecisionSettings)
    if precision.precision == "int8" and "compiled" not in settings.formats:
        raise NmfxError("--precision says nothing without --compiled")
    pictures = data_settings(args) if typed(args, DataSettings) else None
    with advancing(f"exporting {work.model}") as progress:
        how = {"scheme": args.scheme, "force": args.force, "precision": precision, "pictures": pictures}
        done = export(work, settings, folder, progress=progress, **how)
    for line in done.notes:
        warn(line)
    out.print(heading("weights: ", done.weights))
    out.print(tables.totals_table(done.scheme.totals(done.sites)))
    out.print(f"\npatterns: {done.scheme.counts(done.sites)}")
    if done.verified is not None:
        out.print(f"verified: {done.verified}", soft_wrap=True)
    for line in done.told:
        out.print(line, soft_wrap=True)
    for kind, name in done.files.items():
        taken = (folder / name).stat().st_size
        share = f", {taken / done.dense_bytes:.1%} of the dense weights" if kind == "checkpoint" else ""
        said = "kept, as it is the same:" if name in done.kept else "wrote"
        out.print(f"{said} {folder / name} ({size(taken)}{share})", soft_wrap=True)
    if not args.out:
        own = args.scheme is None and precision.precision == "float32"  # no recipe says int8
        stamp_export(work, settings, done, own=own)
    if done.runs is not None:
        _show_runs(done.runs, folder / done.files[done.runs.platform.format])
    checkpoint = folder / done.files["checkpoint"]
    for kind, one in FORMATS.items():
        stale = folder / f"{work.source.name}{one.ending}"
        if kind in done.files or not stale.exists():
            continue
        if checkpoint.name not in done.kept or stale.stat().st_mtime_ns < checkpoint.stat().st_mtime_ns:
            warn(f"{stale} was there and is not of this export, so perhaps of another scheme; it is left as it was")
    if args.json:
        show_json(_values(done, folder))


def _show_runs(runs: Runs, file: Path) -> None:
    """What a platform runs sparse, a row a site; where that is said, and what comes next."""
    out, there = output(), runs.platform
    out.print(heading(f"\n{there.label}", f": {there.gain}"), soft_wrap=True)
    rows = tables.table("site~", "shape?", "pattern>?", "runs", "why~")
    for run in runs.sites:
        ran = Text("sparse", "green") if run.sparse else Text("dense", "dim")
        rows.add_row(run.site, "x".join(map(str, run.shape)), shown(run.pattern), ran, run.why)
    out.print(rows)
    out.print(f"{runs}; {there.checked}", soft_wrap=True)
    out.print(f"next: {there.then.replace('FILE', str(file))}", soft_wrap=True)
    for source in there.sources:
        out.print(f"see {source}", soft_wrap=True)


def _values(done: ExportRecord, folder: Path) -> dict[str, Any]:
    totals = done.scheme.totals(done.sites)
    return {
        "weights": done.weights,
        "totals": {**asdict(totals), "sparsity": totals.sparsity, "mac_sparsity": totals.mac_sparsity},
        "dense_bytes": done.dense_bytes,
        "files": [
            {"kind": kind, "path": str(folder / name), "bytes": (folder / name).stat().st_size}
            for kind, name in done.files.items()
        ],
        "verified": None if done.verified is None else str(done.verified),
        "notes": done.notes,
        "told": done.told,
        "runs": None if done.runs is None else json_of(done.runs),
    }
