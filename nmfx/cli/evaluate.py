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
from nmfx.export.checkpoint import load_checkpoint, read_checkpoint
from nmfx.export.start import is_compressed
from nmfx.models.building import build_model
from nmfx.passes.transform import transform
from nmfx.processes import world
from nmfx.scheme import Scheme
from nmfx.text import sentence
from nmfx.training.evaluation import Evaluation, evaluate


def run(args: Namespace) -> None:
    """Load, evaluate, show."""
    with processes(args.device) as device:
        _run(args, device)


def _run(args: Namespace, device: str) -> None:
    reference = _load(work.asked(args.reference, "evaluate"), args).to(device) if args.reference else None
    data: Data | None = None
    rows: list[tuple[str, Evaluation]] = []
    for label, model, size in _models(args):
        data, config = pictures(args, model, size, data)
        batch = max(1, args.batch_size // world())
        with working(f"evaluating {label} on {data.name}"):
            batches = validation_loader(data, config, batch_size=batch, workers=args.workers)
            try:
                rows.append((label, evaluate(model.to(device), batches, reference=reference)))
            except RuntimeError as error:
                shape = "x".join(map(str, config.input_size))
                hint = "give --input-size as the model expects it"
                raise NmfxError(f"{label}: the forward pass fails on pictures of {shape}: {sentence(error)}; {hint}") from error
        if reference is None and label in ("dense", "start"):
            reference = model
    output().print(score_table(rows))
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
    size, what = work.parse_size(args.input_size), work.asked(args.what, "evaluate")
    path = Path(what)
    if not path.is_dir():
        inside = work.around(path) if path.is_file() else None
        yield what, _load(what, args), size or (inside.input_size if inside else None)
        return
    found = work.open_work(path).check(args)
    found.warn()
    size = size or found.input_size
    dense = found.load()
    yield "start" if found.start_path.is_file() else "dense", dense, size
    scheme = None
    if found.scheme_path.is_file():
        sites = found.sites(dense)
        scheme = Scheme.load(found.scheme_path, sites)
        yield "masked, untrained", transform(dense, scheme, sites=sites), size
    for label, file in (("recalibrated", found.recalibrated_path), ("fine-tuned", found.tuned_path)):
        if file.is_file():
            other = scheme is not None and read_checkpoint(file)[0].scheme.patterns != scheme.patterns
            yield f"{label}{', another scheme' if other else ''}", load_checkpoint(file), size


def _load(what: str, args: Namespace) -> nn.Module:
    """A compressed checkpoint, weights of the model called --model, a work directory's dense model, or a model by name."""
    path, kwargs = Path(what), {"num_classes": args.classes} if args.classes else {}
    if path.is_dir():
        return work.open_work(path).load()
    if path.is_file():
        if is_compressed(path):
            return load_checkpoint(path)
        if args.model is None:
            raise NmfxError(f"{what}: plain weights; give --model NAME, the network they are for")
        built = build_model(args.model, weights=what, kwargs=kwargs, entry=args.weights_entry)
        if built.note != f"weights from {what}":
            output().print(built.note, soft_wrap=True)
        return built.model
    built = build_model(what, kwargs=kwargs)
    if built.weights == "random":
        said = work.random_weights(what, built.note)
        work.check_random(args, said)
        warn(f"{said}: its scores mean nothing", red=True)
    return built.model


def score_table(rows: list[tuple[str, Evaluation]]) -> Table:
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
