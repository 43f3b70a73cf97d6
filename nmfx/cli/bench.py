"""nmfx bench: the network on every engine of this machine, dense and sparse, in one run."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import Any

import torch

from nmfx.cli.common import check_kernel, check_random, data_settings
from nmfx.cli.console import advancing, output, show_json, warn
from nmfx.cli.tables import table
from nmfx.runtime.measuring.bench import NMFX, Bench
from nmfx.runtime.quantized.compiling import INT8
from nmfx.settings.flags import read_flags, typed
from nmfx.settings.stages import BenchSettings, DataSettings, ModelSettings, PrecisionSettings
from nmfx.stages import report
from nmfx.stages.bench import load_pair, time_pair
from nmfx.stages.work import asked


def run(args: Namespace) -> None:
    """Load, time, show."""
    report.check(args.figure, None, force=args.force)
    settings, what = read_flags(args, BenchSettings), asked(args.what, "bench")
    with advancing(f"loading {what}"):
        pair = load_pair(what, read_flags(args, ModelSettings, name=""), settings, args.scheme)
    for line in pair.notes:
        warn(line)
    if pair.random:
        check_random(args, pair.random)
        warn(f"{pair.random}: times are right, outputs mean nothing")
    check_kernel()
    with advancing(f"timing {pair.label}") as progress:
        precision = read_flags(args, PrecisionSettings)
        pictures = data_settings(args) if typed(args, DataSettings) else None
        found, notes = time_pair(pair, settings, precision, pictures, progress)
    for line in notes:
        warn(line)
    _show(found, pair.label, args)
    if args.figure:
        report.write_speed(report.speeds_of(found), pair.label, args.figure, force=args.force)
        output().print(f"wrote {args.figure}", soft_wrap=True)
    if args.json:
        show_json(_values(found, pair.label))


def _show(found: Bench, label: str, args: Namespace) -> None:
    out, combinations = output(), list(found.choices)
    narrow, turns = out.width < 100, len(found.timings[0].seconds)
    out.print(f"milliseconds a batch, median{'' if narrow else ' (fastest-slowest)'} of {turns} turns", style="bold")
    times = table("", *(f"batch {batch}, {threads} thread{'s' * (threads > 1)}>" for batch, threads in combinations))
    for engine in dict.fromkeys(one.engine for one in found.timings):
        cells = []
        for batch, threads in combinations:
            one = found.of(engine, batch, threads)
            spread = "" if narrow or one is None else f" ({_ms(one.spread[0])}-{_ms(one.spread[1])})"
            cells.append("-" if one is None else f"{_ms(one.median)}{spread}")
        times.add_row(engine, *cells, style="bold green" if engine == NMFX else "")
    for kind, int8 in (("fp32", False), ("int8", True)):
        speedups = [found.speedup(*one, int8=int8) for one in combinations]
        if any(speedups):
            times.add_row(f"nmfx, times best {kind}", *("-" if one is None else f"{one:.2f}x" for one in speedups))
    out.print(times)
    for engine, reason in found.missing.items():
        out.print(f"no {engine}: {reason}", soft_wrap=True)
    apart = f"outputs differ from the masked model's by {found.difference:.1e} of the largest at most"
    out.print(f"\n{label}: {apart if found.agreement is None else found.agreement}", soft_wrap=True)
    batch, threads = combinations[-1] if not args.sites else min(combinations, key=lambda one: (one[0], -one[1]))
    choices = found.choices[batch, threads]
    sparse, int8 = (sum(test(one) for one in choices) for test in (lambda one: one.is_sparse, lambda one: one.chosen == INT8))
    kernel = f"{sparse} of {len(choices)} sites are computed by the sparse kernel"
    both = f"{int8} of {len(choices)} sites are computed in int8, {sparse} by the sparse kernel"
    out.print(f"{both if int8 else kernel}, the rest dense (--sites lists them)")
    if not args.sites:
        return
    out.print(f"\nsites, batch {batch}, {threads} threads:")
    rows = table("site~", "shape", "kept>", "dense ms>", "sparse ms>", "chosen")
    for choice in choices:
        kept, shape = choice.kept / torch.Size(choice.shape).numel(), "x".join(map(str, choice.shape))
        dense, sparse = ("-" if one is None else f"{one * 1e3:.3f}" for one in (choice.dense, choice.sparse))
        why = f" ({choice.reason})" if choice.reason else ""
        rows.add_row(choice.name, shape, f"{kept:.1%}", dense, sparse, choice.chosen + why)
    out.print(rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _values(found: Bench, label: str) -> dict[str, Any]:
    """Seconds of every turn, and how nmfx computes each site."""
    return {
        "label": label,
        "difference": found.difference,
        "missing": dict(found.missing),
        "timings": [{**asdict(one), "median": one.median} for one in found.timings],
        "speedups": [
            {"batch": batch, "threads": threads, "fp32": found.speedup(batch, threads, int8=False),
             "int8": found.speedup(batch, threads, int8=True)}
            for batch, threads in found.choices
        ],
        "sites": [
            {"batch": batch, "threads": threads, **asdict(choice)}
            for (batch, threads), choices in found.choices.items()
            for choice in choices
        ],
    }  # fmt: skip
