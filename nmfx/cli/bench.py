"""nmfx bench: the network on every engine of this machine, dense and sparse, in one run."""

from __future__ import annotations

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from nmfx.cli.common import check_kernel, check_random, checked, model_settings, pictures_of, warn_random
from nmfx.cli.console import advancing, output, warn, working
from nmfx.errors import NmfxError
from nmfx.export.checkpoint import load_checkpoint
from nmfx.export.plain import save_onnx
from nmfx.export.start import is_compressed
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.passes.baking import bake
from nmfx.passes.transform import transform
from nmfx.report.record import Speed
from nmfx.runtime.measuring.bench import NMFX, Bench, Timing, bench
from nmfx.scheme import Scheme
from nmfx.search.finder import find_scheme
from nmfx.stages import report
from nmfx.stages.build import build_weights
from nmfx.stages.work import around, asked, example_of, open_work, random_weights


def run(args: Namespace) -> None:
    """Load, time, show."""
    report.check(args.figure, None, force=args.force)
    batches, threads = _numbers(args.batch, "--batch"), _numbers(args.threads, "--threads") if args.threads else ()
    dense, converted, pictures, label = _models(args)
    check_kernel()
    with _onnx(dense, pictures) as path, advancing(f"timing {label}") as advance:
        found = bench(
            dense,
            converted,
            pictures,
            batches=batches,
            threads=threads,
            turns=args.turns,
            onnx=path,
            progress=advance,
        )
    _show(found, label, args)
    if args.figure:
        report.write_speed([_speed(one, found) for one in found.timings], label, args.figure, force=args.force)
        output().print(f"wrote {args.figure}", soft_wrap=True)


def _models(args: Namespace) -> tuple[nn.Module, nn.Module, Tensor, str]:
    """The dense model, the converted one, an input, and what to call them."""
    what, size = asked(args.what, "bench"), model_settings(args).size
    path = Path(what)
    if path.is_dir():
        work = checked(args, open_work(path))
        warn_random(work)
        dense = work.load()
        sites, pictures = work.sites(dense), pictures_of(example_of(dense, size or work.input_size))
        scheme = work.scheme(sites, args.scheme)
        finished, notes = work.finished(scheme)
        for line in notes:
            warn(line)
        if finished is not None:
            return dense, load_checkpoint(finished.path), pictures, str(finished.path)
        return dense, transform(dense, scheme, sites=sites), pictures, f"{path}"
    if path.is_file():
        if not is_compressed(path):
            raise NmfxError(f"{path}: plain weights; bench takes a compressed checkpoint, a work directory or a model's name")
        converted, inside = load_checkpoint(path), around(path)
        size = size or (inside.input_size if inside else None)
        return bake(converted), converted, pictures_of(example_of(converted, size)), str(path)
    built = build_weights(model_settings(args, what))
    said = random_weights(what, built.note) if built.weights == "random" else ""
    check_random(args, said)
    dense, example = built.model, example_of(built.model, size)
    sites = find_sites(dense, example)
    if args.scheme:
        scheme = Scheme.load(args.scheme, sites)
    else:
        with working(f"searching {what}"):
            scheme = find_scheme(dense, sites=sites, target=args.target, m=args.m).scheme
    if said:
        warn(f"{said}: times are right, outputs mean nothing")
    return dense, transform(dense, scheme, sites=sites), pictures_of(example), what


@contextlib.contextmanager
def _onnx(dense: nn.Module, pictures: Tensor) -> Iterator[Path | None]:
    """The dense model as ONNX in a temporary folder; None where it cannot be had, which the table then says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        try:
            with working("exporting the dense model to ONNX"):
                save_onnx(bake(dense), path, Example((pictures,)))
        except NmfxError as error:
            warn(f"no ONNX Runtime in the table: {error}")
            yield None
            return
        yield path


def _numbers(text: str, option: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 5 and int(part) for part in parts):
        raise NmfxError(f"{option} {text}: expected whole numbers below 10,000 with commas, as in 1,8")
    return tuple(dict.fromkeys(map(int, parts)))


def _show(found: Bench, label: str, args: Namespace) -> None:
    out = output()
    combinations = list(found.choices)
    table = Table(box=None, pad_edge=False, header_style="bold")
    narrow = out.width < 100
    out.print(f"milliseconds a batch, median{'' if narrow else ' (fastest-slowest)'} of {args.turns} turns", style="bold")
    table.add_column("", no_wrap=True)
    for batch, threads in combinations:
        table.add_column(f"batch {batch}, {threads} thread{'s' * (threads > 1)}", justify="right")
    for engine in dict.fromkeys(one.engine for one in found.timings):
        cells = []
        for batch, threads in combinations:
            one = found.of(engine, batch, threads)
            spread = "" if narrow or one is None else f" ({_ms(one.spread[0])}-{_ms(one.spread[1])})"
            cells.append("-" if one is None else f"{_ms(one.median)}{spread}")
        table.add_row(engine, *cells, style="bold green" if engine == NMFX else "")
    table.add_row("nmfx, times best dense", *(f"{found.speedup(*one):.2f}x" for one in combinations))
    out.print(table)
    for engine, reason in found.missing.items():
        out.print(f"no {engine}: {reason}", soft_wrap=True)
    out.print(f"\n{label}: outputs differ from the masked model's by {found.difference:.1e} of the largest at most")
    batch, threads = combinations[-1] if not args.sites else min(combinations, key=lambda one: (one[0], -one[1]))
    choices = found.choices[batch, threads]
    sparse = sum(one.is_sparse for one in choices)
    out.print(f"{sparse} of {len(choices)} sites are computed by the sparse kernel, the rest dense (--sites lists them)")
    if args.sites:
        out.print(f"\nsites, batch {batch}, {threads} threads:")
        out.print(_sites(found, batch, threads))


def _sites(found: Bench, batch: int, threads: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("site", overflow="fold", ratio=1)
    for column in ("shape", "kept", "dense ms", "sparse ms", "chosen"):
        table.add_column(column, justify="left" if column in ("shape", "chosen") else "right", no_wrap=True)
    for one in found.choices[batch, threads]:
        weights = torch.Size(one.shape).numel()
        sparse = "-" if one.sparse is None else f"{one.sparse * 1e3:.3f}"
        shape = "x".join(map(str, one.shape))
        table.add_row(one.name, shape, f"{one.kept / weights:.1%}", f"{one.dense * 1e3:.3f}", sparse, one.chosen)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _speed(one: Timing, found: Bench) -> Speed:
    best = found.best_dense(one.batch, one.threads)
    low, high = one.spread
    group = f"batch {one.batch}, {one.threads} thread{'s' * (one.threads > 1)}"
    return Speed(one.engine, group, best.median / one.median, best.median / high, best.median / low)
