"""nmfx search: a pattern for every site, as a picture and as scheme files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from nmfx.cli import convert, tables
from nmfx.cli.common import check_kernel, check_random, data_settings, hint_scheme, processes, warn_random
from nmfx.cli.console import advancing, heading, output, warn
from nmfx.errors import NmfxError
from nmfx.processes import first_alone, rank
from nmfx.scheme import Scheme
from nmfx.search.finder import SearchResult
from nmfx.settings.flags import read_flags, typed
from nmfx.settings.platforms import PLATFORMS
from nmfx.settings.search import DEFAULT_TARGET, SearchSettings
from nmfx.settings.stages import DataSettings, ModelSettings
from nmfx.stages import report
from nmfx.stages.search import SearchRecord, search
from nmfx.stages.stamp import search_values
from nmfx.stages.work import SEARCHING, WorkDirectory, check_free, directory_for, find_work, open_converted, save_scheme
from nmfx.stages.written import is_state, leave_stamp, remove_state

DEMO = "demo:digits"


def run(args: Namespace) -> None:
    """Find the model, search, show, write."""
    data, out = data_settings(args) if typed(args, DataSettings) else None, output()
    settings = read_flags(args, SearchSettings, data=data is not None)
    with processes(args.device) as device:
        with first_alone():
            work = _work(args)
            check_random(args, work.random)
        path = Path(args.out) if args.out else work.scheme_path
        if path.suffix not in (".yaml", ".yml"):
            raise NmfxError(f"--out {path}: expected a name that ends in .yaml (the published format goes to .txt beside it)")
        check_free([path, path.with_suffix(".txt")], force=args.force)
        report.check(args.figure, args.html, force=args.force)
        if work.start_path.is_file() and (start := work.start(sites := work.sites(work.build_meta()))):
            out.print(heading(f"starts from {work.start_path}: ", tables.start_line(start, sites)), soft_wrap=True)
        record = _searched(settings, data, work, path.with_suffix(SEARCHING), device, force=args.force)
        assert record.result is not None  # no scheme or pattern can be asked for here
        if record.target:
            out.print(heading("target:", f" {record.target}, --target says another"), soft_wrap=True)
        if settings.platform:
            there = PLATFORMS[settings.platform]
            out.print(heading(f"{there.label}: ", there.gain), soft_wrap=True)
        _show(record.result, record.scheme, events=args.events)
        if (reached := record.reached) is not None:
            out.print(heading("latency: ", str(reached)), soft_wrap=True)
            if reached.measured > reached.wanted:
                out.print("not reached; the machine may have been busy: run it again", soft_wrap=True)
        if rank() != 0:
            return
        written, notes = save_scheme(record.scheme, path, record.sites, force=args.force)
        for line in notes:
            warn(line)
        if not args.out:
            names = [file.name for file in written]
            leave_stamp(work.path, "search", search_values(settings, data), names, before=("build",))
        written += report.write(record.result, record.scheme, args.figure, args.html, force=args.force)
        if is_state(path.with_suffix(SEARCHING)):
            path.with_suffix(SEARCHING).unlink()
        out.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
        hint_scheme(work, data, str(path) if args.out else None, settings.platform)


def _work(args: Namespace) -> WorkDirectory:
    """The work directory to search; converted first for --model, and for the demo network when there is none."""
    if args.model and args.work:
        raise NmfxError("give a work directory or --model, not both")
    found = None if args.model else find_work(args.work, "search")
    if found is not None:
        warn_random(found)
        return found
    if args.model is None:
        output().print(
            f"no work directory here: searching the embedded demo network ({DEMO}, trained on scikit-learn's digits);\n"
            f"name another with `nmfx search --model resnet50`, or make one with `nmfx convert resnet50`\n"
        )
    name = args.model or DEMO
    path = directory_for(name)
    if path.exists():
        warn_random(found := open_converted(name, path))
        return found
    return convert.convert(args, ModelSettings(name=name), path)


def _searched(
    settings: SearchSettings, data: DataSettings | None, work: WorkDirectory, checkpoint: Path, device: str, *, force: bool
) -> SearchRecord:
    if settings.looping and force and rank() == 0:
        for line in remove_state(checkpoint):
            warn(line)
    if settings.looping and checkpoint.exists():
        output().print(f"going on with {checkpoint}; --force starts anew")
    limits = ", ".join(f"{kind}={share}" for kind, share in (settings.limits or {}).items())
    what = limits or f"{DEFAULT_TARGET if settings.target is None else settings.target} of {settings.budget}"
    text = f"searching {work.model}: {settings.method}, {what}"
    if settings.timed:
        check_kernel()
        text = "timing every pattern of every site"
    with advancing(text, resumable=settings.looping) as progress:
        return search(work, settings, data, device=device, checkpoint=checkpoint, progress=progress)


def _show(result: SearchResult, scheme: Scheme, *, events: bool) -> None:
    out = output()
    out.print(tables.scheme_bars(result.sites, scheme, out.width))
    if result.dense_reasons:
        out.print(tables.reasons_list(result.dense_reasons, "\ndense or with another M, whatever the budget"))
    if events:
        out.print(heading("\nsteps" if result.steps else "\nchoices, in network order"))
        for index, event in enumerate(result.events, 1):
            out.print(f"{index:>4}  {event.site}: {event.before} -> {event.after}  ({event.reason})", soft_wrap=True)
    out.print()
    out.print(tables.totals_table(result.totals))
    out.print(f"\n{result.summary}", soft_wrap=True)
    for budget, left in zip(result.budgets, result.lefts, strict=True):
        share = f"{left / budget.dense:.4%} of dense"
        out.print(f"budget: {budget.limit:,} {budget.unit}, {left:,} left ({share}), no step fits in them")
    out.print(f"squared weight error: {result.comparison}")
