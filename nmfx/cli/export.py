"""nmfx export: scheme files, the compressed checkpoint, and on demand baked weights and ONNX."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from nmfx.cli import tables, work
from nmfx.cli.console import heading, output, warn, working
from nmfx.errors import NmfxError
from nmfx.export.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from nmfx.export.plain import save_baked, save_onnx
from nmfx.files import all_or_nothing
from nmfx.graph.site import Sites
from nmfx.passes.baking import bake, verify
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme


def run(args: Namespace) -> None:
    """Transform the work directory's model by its scheme and write it."""
    found = work.need_work(args.work, "export").check(args)
    scheme_path = Path(args.scheme) if args.scheme else found.scheme_path
    if not args.scheme and not scheme_path.is_file():
        raise NmfxError(f"{found.path} has no scheme yet; run `{found.command('search')}`, or give --scheme FILE")
    folder = Path(args.out) if args.out else found.path / "export"
    name = found.model.partition(":")[2]
    paths = {"scheme": folder / "scheme.yaml", "checkpoint": folder / f"{name}.safetensors"}
    paths |= {"baked": folder / f"{name}.baked.safetensors"} if args.baked else {}
    paths |= {"onnx": folder / f"{name}.onnx"} if args.onnx else {}
    work.check_free([*paths.values(), paths["scheme"].with_suffix(".txt")], force=args.force)
    _write(found, scheme_path, paths, args.epoch)
    for stale in (folder / f"{name}.baked.safetensors", folder / f"{name}.onnx"):
        if stale not in paths.values() and stale.exists():
            warn(f"{stale} was there and is not of this export, so perhaps of another scheme; it is left as it was")


def _write(found: work.Work, scheme_path: Path, paths: Mapping[str, Path], epoch: str) -> None:
    out, folder = output(), paths["scheme"].parent
    with working(f"exporting {found.model}"):
        model = found.load()
        sites, example = found.sites(model), found.example(model)
        scheme = Scheme.load(scheme_path, sites)
        dense = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        weights = _convert(model, scheme, sites, found, epoch)
        checked = verify(model, example_input=example) if len(scheme) else None
        with all_or_nothing(folder) as draft:
            written = work.save_scheme(scheme, draft / paths["scheme"].name, sites)
            save_checkpoint(model, draft / paths["checkpoint"].name, info={**scheme.info, "weights": weights})
            baked = bake(model, inplace=True)
            if "baked" in paths:
                save_baked(baked, draft / paths["baked"].name)
            if "onnx" in paths:
                save_onnx(baked, draft / paths["onnx"].name, example)
    out.print(heading("weights: ", weights))
    out.print(tables.totals_table(scheme.totals(sites)))
    out.print(f"\npatterns: {tables.pattern_counts(scheme, sites)}")
    if checked is not None:
        out.print(f"verified: {checked}", soft_wrap=True)
    if len(written) > 1:
        out.print(f"wrote {folder / written[1].name}", soft_wrap=True)
    for kind, path in paths.items():
        share = f", {path.stat().st_size / dense:.1%} of the dense weights" if kind == "checkpoint" else ""
        out.print(f"wrote {path} ({tables.size(path.stat().st_size)}{share})", soft_wrap=True)
    found.warn()


def _convert(model: nn.Module, scheme: Scheme, sites: Sites, found: work.Work, epoch: str) -> str:
    """Mask the work directory's model, with the fine-tuned or recalibrated weights that are under this scheme; says which."""
    if (path := found.finished(scheme, epoch)) is not None:
        load_checkpoint(path, model)
        return read_checkpoint(path)[0].info.get("weights", "fine-tuned")
    transform(model, scheme, sites=sites, inplace=True)
    return found.weights
