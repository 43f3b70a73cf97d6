"""nmfx evaluate: top-1, top-5 and loss of a checkpoint, baked weights, a work directory or a model by name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table
from torch import nn

from nmfx.cli.common import check_random, checked, data_settings, model_settings, warn_random
from nmfx.cli.console import advancing, output, warn
from nmfx.cli.processes import processes
from nmfx.errors import NmfxError
from nmfx.export.checkpoint import load_checkpoint
from nmfx.export.start import is_compressed
from nmfx.settings.flags import read_flags
from nmfx.settings.stages import EvaluateSettings
from nmfx.stages.build import build_weights
from nmfx.stages.evaluate import FIRST, Candidate, candidates_of, score
from nmfx.stages.work import around, asked, open_work, random_weights
from nmfx.training.evaluation import Evaluation


def run(args: Namespace) -> None:
    """Load, evaluate, show."""
    settings, data = read_flags(args, EvaluateSettings), data_settings(args)
    with processes(args.device) as device:
        reference = _load(asked(args.reference, "evaluate"), args) if args.reference else None
        with advancing(f"evaluating on {data.name}") as progress:
            done = score(_candidates(args), settings, data, reference=reference, device=device, progress=progress)
        output().print(score_table(done.scores))
        samples = next(iter(done.scores.values())).samples
        output().print(f"{samples:,} validation pictures of {done.data}", soft_wrap=True)


def _candidates(args: Namespace) -> Iterator[Candidate]:
    """What is asked for: one model, or those of a work directory."""
    what, size = asked(args.what, "evaluate"), model_settings(args).size
    path = Path(what)
    if path.is_dir():
        work = checked(args, open_work(path))
        warn_random(work)
        yield from candidates_of(work, size)
        return
    inside = around(path) if path.is_file() else None
    yield Candidate(what, _load(what, args), size or (inside.input_size if inside else None))


def _load(what: str, args: Namespace) -> nn.Module:
    """A compressed checkpoint, weights of the model called --model, a work directory's dense model, or a model by name."""
    path = Path(what)
    if path.is_dir():
        return open_work(path).load()
    if path.is_file():
        if is_compressed(path):
            return load_checkpoint(path)
        if args.model is None:
            raise NmfxError(f"{what}: plain weights; give --model NAME, the network they are for")
        built = build_weights(model_settings(args, args.model, weights=what))
        if built.note != f"weights from {what}":
            output().print(built.note, soft_wrap=True)
        return built.model
    built = build_weights(model_settings(args, what))
    if built.weights == "random":
        said = random_weights(what, built.note)
        check_random(args, said)
        warn(f"{said}: its scores mean nothing", red=True)
    return built.model


def score_table(scores: Mapping[str, Evaluation]) -> Table:
    """Scores, one row a model."""
    agreed = any(found.agreement is not None for found in scores.values())
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    first = next((label for label in scores if label in FIRST), "dense")
    for name in ("top-1", "top-5", "loss", *([f"agreement with {first}"] if agreed else [])):
        table.add_column(name, justify="right")
    for label, found in scores.items():
        agreement = "" if found.agreement is None else f"{found.agreement:.2%}"
        table.add_row(label, f"{found.top1:.2%}", f"{found.top5:.2%}", f"{found.loss:.6f}", *([agreement] if agreed else []))
    return table
