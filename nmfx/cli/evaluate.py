"""nmfx evaluate: top-1, top-5 and loss of a checkpoint, baked weights, a work directory or a model by name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from torch import nn

from nmfx.cli import work
from nmfx.cli.console import output, warn, working
from nmfx.cli.processes import processes
from nmfx.data.config import PictureConfig, check_classes, picture_config
from nmfx.data.loader import validation_loader
from nmfx.data.source import Data, open_data
from nmfx.errors import NmfxError
from nmfx.export.checkpoint import load_checkpoint
from nmfx.export.start import is_compressed
from nmfx.passes.transform import transform
from nmfx.processes import world
from nmfx.scheme import Scheme
from nmfx.training.evaluation import Evaluation, evaluate
from nmfx.zoo.building import build_model


def run(args: Namespace) -> None:
    """Load, evaluate, show."""
    with processes(args.device) as device:
        _run(args, device)


def _run(args: Namespace, device: str) -> None:
    reference = _load(args.reference, None).to(device) if args.reference else None
    data: Data | None = None
    rows: list[tuple[str, Evaluation]] = []
    for label, model, size in _models(args):
        data, config = pictures(args, model, size, data)
        batch = max(1, args.batch_size // world())
        with working(f"evaluating {label} on {data.name}"):
            batches = validation_loader(data, config, batch_size=batch, workers=args.workers)
            rows.append((label, evaluate(model.to(device), batches, reference=reference)))
        if reference is None and label in ("dense", "start"):
            reference = model
    output().print(_table(rows))
    output().print(f"{rows[0][1].samples:,} validation pictures of {data}", soft_wrap=True)


def pictures(
    args: Namespace, model: nn.Module, size: tuple[int, ...] | None, data: Data | None = None
) -> tuple[Data, PictureConfig]:
    """The data that --data names, fit for `model`, and how its pictures are brought to it."""
    data = data or open_data(args.data, root=args.data_root)
    check_classes(data, model)
    given = size if size is not None and len(size) == 3 else None
    return data, picture_config(model, data, input_size=given)


def _models(args: Namespace) -> Iterator[tuple[str, nn.Module, tuple[int, ...] | None]]:
    """What is asked for, with a label; a work directory has its dense model (or sparse start), the masked and the tuned one."""
    size, path = work.parse_size(args.input_size), Path(args.what)
    if not path.is_dir():
        yield args.what, _load(args.what, args.model), size
        return
    found = work.open_work(path)
    found.warn()
    size = size or found.input_size
    dense = found.load()
    yield "start" if found.start_path.is_file() else "dense", dense, size
    if found.scheme_path.is_file():
        sites = found.sites(dense)
        yield "masked, untrained", transform(dense, Scheme.load(found.scheme_path, sites), sites=sites), size
    if found.tuned_path.is_file():
        yield "fine-tuned", load_checkpoint(found.tuned_path), size


def _load(what: str, model: str | None) -> nn.Module:
    """A compressed checkpoint, weights of the model called `model`, a work directory's dense model, or a model by name."""
    path = Path(what)
    if path.is_dir():
        return work.open_work(path).load()
    if path.is_file() or path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        if is_compressed(path):
            return load_checkpoint(path)
        if model is None:
            raise NmfxError(f"{what}: plain weights; give --model NAME, the network they are for")
        return build_model(model, weights=what).model
    built = build_model(what)
    if built.weights == "random":
        warn(f"{what} has random weights ({built.note or 'it has no others'}): its scores mean nothing", red=True)
    return built.model


def _table(rows: list[tuple[str, Evaluation]]) -> Table:
    agreed = any(found.agreement is not None for _, found in rows)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    first = "start" if rows[0][0] == "start" else "dense"
    for name in ("top-1", "top-5", "loss", *([f"agreement with {first}"] if agreed else [])):
        table.add_column(name, justify="right")
    for label, found in rows:
        agreement = "" if found.agreement is None else f"{found.agreement:.2%}"
        table.add_row(label, f"{found.top1:.2%}", f"{found.top5:.2%}", f"{found.loss:.6f}", *([agreement] if agreed else []))
    return table
