"""nmfx search: a pattern for every site, as a picture and as scheme files."""

from __future__ import annotations

import shlex
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from nmfx.cli import convert, tables, work
from nmfx.cli.console import heading, output, working
from nmfx.errors import NmfxError, SearchError
from nmfx.scheme import Scheme
from nmfx.search.finder import SearchResult, find_scheme
from nmfx.zoo.source import find_source

DEMO = "demo:digits"


def run(args: Namespace) -> None:
    """Find the model, search, show, write."""
    found, out = _work(args), output()
    path = Path(args.out) if args.out else found.scheme_path
    if path.suffix not in (".yaml", ".yml"):
        raise NmfxError(f"--out {path}: expected a name that ends in .yaml (the published format goes to .txt beside it)")
    work.check_free([path, path.with_suffix(".txt")], force=args.force)
    with working(f"searching {found.model}: {args.method}, {args.target:g} of {args.budget}"):
        model = found.load()
        result = find_scheme(
            model,
            target=args.target,
            method=args.method,
            budget=args.budget,
            m=args.m,
            candidates=_numbers(args.candidates),
            sites=found.sites(model),
            keep_dense=args.keep_dense,
            layout=args.layout,
            remainder=args.remainder,
        )
    scheme = replace(result.scheme, info={**result.scheme.info, "model": found.model, "weights": found.weights})
    _show(result, scheme, events=args.events)
    found.warn()
    written = work.save_scheme(scheme, path, result.sites, force=args.force)
    chosen = f" --scheme {shlex.quote(str(path))}" if args.out else ""
    following = f"nmfx export {shlex.quote(str(found.path))}{chosen}"
    out.print(f"wrote {', '.join(map(str, written))}; next: {following}", soft_wrap=True)


def _work(args: Namespace) -> work.Work:
    """The work directory to search; converted first for --model, and for the demo network when there is none."""
    if args.model and args.work:
        raise NmfxError("give a work directory or --model, not both")
    found = None if args.model else work.find_work(args.work)
    if found is not None:
        return found
    if args.model is None:
        output().print(
            f"no work directory here: searching the embedded demo network ({DEMO}, trained on scikit-learn's digits);\n"
            f"name another with `nmfx search --model resnet50`, or make one with `nmfx convert resnet50`\n"
        )
    name = args.model or DEMO
    path = work.directory_for(name)
    if path.exists():
        there, wanted = work.open_work(path), str(find_source(name))
        if there.model != wanted:
            raise NmfxError(f"{path} holds {there.model}, not {wanted}; use `nmfx convert {wanted} --out OTHER.nmfx`")
        return there
    defaults = Namespace(weights="auto", pattern=None, scheme=None, input_size=None, graph=False, force=False)
    return convert.convert(name, path, defaults)


def _numbers(candidates: str | None) -> list[int] | None:
    if candidates is None:
        return None
    try:
        return [int(part) for part in candidates.split(",")]
    except ValueError:
        raise SearchError(f"--candidates {candidates}: expected whole numbers with commas, as in 1,2,4,8") from None


def _show(result: SearchResult, scheme: Scheme, *, events: bool) -> None:
    out = output()
    out.print(tables.scheme_bars(result.sites, scheme, out.width))
    if result.dense_reasons:
        out.print(tables.reasons_list(result.dense_reasons, "\ndense or with another M, whatever the budget"))
    if events:
        out.print(heading("\nsteps"))
        for index, event in enumerate(result.events, 1):
            out.print(f"{index:>4}  {event.site}: {event.before} -> {event.after}  ({event.reason})", soft_wrap=True)
    out.print()
    out.print(tables.totals_table(result.totals))
    unit = "weights" if result.budget.kind == "params" else "MACs"
    counts = tables.pattern_counts(scheme, result.sites)
    out.print(f"\n{result.method}: {counts}; {len(result.events)} steps in {result.seconds:.2f} s")
    share = result.left / result.budget.dense
    out.print(f"budget: {result.budget.limit:,} {unit}, {result.left:,} left ({share:.4%} of dense), no step fits in them")
    gap = f"{result.loss / result.optimum - 1:.1%} above" if result.optimum else "equal to"
    gap = "equal to" if result.loss <= result.optimum * (1 + 1e-12) else gap
    out.print(f"squared weight error: {result.loss:.4%} of all, {gap} the exact optimum at this budget ({result.optimum:.4%})")
