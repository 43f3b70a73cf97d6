"""nmfx export: scheme files, the compressed checkpoint, and on demand baked weights, ONNX and a compiled model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from nmfx.cli import tables
from nmfx.cli.common import data_settings, warn_random, work_of
from nmfx.cli.console import advancing, heading, output, warn
from nmfx.errors import NmfxError
from nmfx.settings.flags import read_flags, typed
from nmfx.settings.formats import FORMATS
from nmfx.settings.stages import DataSettings, ExportSettings, PrecisionSettings
from nmfx.stages.export import export, stamp_export
from nmfx.stages.work import EXPORT
from nmfx.text import size


def run(args: Namespace) -> None:
    """Write the work directory's model under its scheme, show."""
    work, settings, out = work_of(args), read_flags(args, ExportSettings), output()
    folder = Path(args.out) if args.out else work.path / EXPORT
    precision = read_flags(args, PrecisionSettings)
    if precision.precision == "int8" and "compiled" not in settings.formats:
        raise NmfxError("`precision` says nothing without `compiled`")
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
    for kind, name in done.files.items():
        taken = (folder / name).stat().st_size
        share = f", {taken / done.dense_bytes:.1%} of the dense weights" if kind == "checkpoint" else ""
        said = "kept, as it is the same:" if name in done.kept else "wrote"
        out.print(f"{said} {folder / name} ({size(taken)}{share})", soft_wrap=True)
    warn_random(work)
    if not args.out:
        stamp_export(work, settings, done, own=args.scheme is None)
    checkpoint = folder / done.files["checkpoint"]
    for kind, one in FORMATS.items():
        stale = folder / f"{work.source.name}{one.ending}"
        if kind in done.files or not stale.exists():
            continue
        if checkpoint.name not in done.kept or stale.stat().st_mtime_ns < checkpoint.stat().st_mtime_ns:
            warn(f"{stale} was there and is not of this export, so perhaps of another scheme; it is left as it was")
