"""nmfx search: a pattern for every site, as a picture and as scheme files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from nmfx.cli import convert, tables
from nmfx.cli.common import (
    after_search,
    check_kernel,
    checked,
    data_options,
    data_settings,
    pictures_of,
    resumable,
    warn_random,
)
from nmfx.cli.console import advancing, heading, hint, output, warn
from nmfx.cli.processes import first_alone, processes
from nmfx.errors import NmfxError, SearchError
from nmfx.models.source import find_source
from nmfx.processes import rank
from nmfx.scheme import Scheme
from nmfx.search.budget import UNITS
from nmfx.search.finder import SearchResult
from nmfx.settings.flags import name_of, read_flags, typed
from nmfx.settings.methods import METHODS, SENSITIVITIES
from nmfx.settings.option import options_of
from nmfx.settings.search import DEFAULT_TARGET, DominoSettings, SearchSettings
from nmfx.settings.stages import DataSettings, ModelSettings
from nmfx.sparsity.score import SCORES
from nmfx.stages import report
from nmfx.stages.latency import Reached, search_latency
from nmfx.stages.search import SearchRecord, ask, finder, search, with_origin
from nmfx.stages.work import SEARCHING, WorkDirectory, check_free, directory_for, find_work, open_work, save_scheme
from nmfx.stages.written import is_state, remove_state

DEMO = "demo:digits"


def run(args: Namespace) -> None:
    """Find the model, search, show, write."""
    settings, data = _settings(args)
    with processes(args.device) as device:
        with first_alone():
            work, out = checked(args, _work(args)), output()
        path = Path(args.out) if args.out else work.scheme_path
        if path.suffix not in (".yaml", ".yml"):
            raise NmfxError(f"--out {path}: expected a name that ends in .yaml (the published format goes to .txt beside it)")
        check_free([path, path.with_suffix(".txt")], force=args.force)
        report.check(args.figure, args.html, force=args.force)
        _show_start(work)
        reached = None
        if args.target_latency or settings.budget == "latency":
            reached = _timed(args, settings, data, work, device)
            record = SearchRecord(
                with_origin(reached.result.scheme, work.model, work.weights), reached.result.sites, reached.result
            )
        else:
            record = _searched(settings, data, work, path, device, force=args.force)
        assert record.result is not None  # no scheme or pattern can be asked for here
        _show(record.result, record.scheme, events=args.events)
        if reached is not None:
            _show_latency(reached)
        warn_random(work)
        if rank() != 0:
            return
        written, notes = save_scheme(record.scheme, path, record.sites, force=args.force)
        for line in notes:
            warn(line)
        written += report.write(record.result, record.scheme, args.figure, args.html, force=args.force)
        if is_state(_checkpoint(path)):
            _checkpoint(path).unlink()
        out.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
        hint(*after_search(work, data_options(data), str(path) if args.out else None))


def _settings(args: Namespace) -> tuple[SearchSettings, DataSettings | None]:
    """What is asked; options that would be ignored are refused."""
    data = data_settings(args) if typed(args, DataSettings) else None
    said = typed(args, SearchSettings)
    timed = args.target_latency or said.get("budget") == "latency"
    method, sensitivity = said.get("method", SearchSettings.method), said.get("sensitivity", "")
    if method not in METHODS:
        return read_flags(args, SearchSettings, data=data is not None), data  # which says so
    needs, measures = METHODS[method], sensitivity in SENSITIVITIES and SENSITIVITIES[sensitivity].pictures
    scored = said.get("score", SearchSettings.score)
    ranks = scored in SCORES and SCORES[scored].needs != "nothing"
    if "limits" in said and {"target", "budget"} & said.keys():
        raise SearchError("--limit says the budget; leave --target and --budget out")
    if "patterns" in said and {"m", "candidates"} & said.keys():
        raise SearchError("--patterns says all patterns; leave --m and --candidates out")
    if sensitivity and not needs.sums:
        raise SearchError(f"--sensitivity is the knapsack's; method {method} has none: add --method knapsack")
    if data and needs.pictures == "never" and not ranks:
        raise SearchError(f"method {method} looks at no pictures; leave --data out")
    if data and needs.sums and sensitivity and not measures and not ranks:
        raise SearchError("the knapsack looks at pictures with --sensitivity activation, gradient or measured only")
    if not data and (needs.pictures == "always" or measures or ranks):
        which = (
            f"method {method}"
            if needs.pictures == "always"
            else f"sensitivity {sensitivity}"
            if measures
            else f"score {scored}"
        )
        raise SearchError(f"{which} looks at pictures: give --data")
    if not (needs.looped and data):
        for key in (*DominoSettings.__dataclass_fields__, "lr", "most"):
            if key in said:
                flag = name_of(options_of(SearchSettings)[key][0])
                raise SearchError(f"{flag} is of the published loop: it needs --method domino with --data")
    if args.target_latency and {"target", "budget", "limits"} & said.keys():
        raise SearchError("--target-latency says the budget; leave --target, --budget and --limit out")
    if timed and not needs.timed:
        raise SearchError(f"times are the knapsack's and spdy's to budget; method {method} counts parameters, MACs or bytes")
    return read_flags(args, SearchSettings, data=data is not None), data


def _work(args: Namespace) -> WorkDirectory:
    """The work directory to search; converted first for --model, and for the demo network when there is none."""
    if args.model and args.work:
        raise NmfxError("give a work directory or --model, not both")
    found = None if args.model else find_work(args.work, "search")
    if found is not None:
        return found
    if args.model is None:
        output().print(
            f"no work directory here: searching the embedded demo network ({DEMO}, trained on scikit-learn's digits);\n"
            f"name another with `nmfx search --model resnet50`, or make one with `nmfx convert resnet50`\n"
        )
    name = args.model or DEMO
    path = directory_for(name)
    if path.exists():
        there, wanted = open_work(path), str(find_source(name))
        if there.model != wanted:
            raise NmfxError(f"{path} holds {there.model}, not {wanted}; use `nmfx convert {wanted} --out OTHER.nmfx`")
        return there
    return convert.convert(args, ModelSettings(name=name), path)


def _show_start(work: WorkDirectory) -> None:
    if work.start_path.is_file() and (start := work.start(sites := work.sites(work.build_meta()))):
        output().print(heading(f"starts from {work.start_path}: ", tables.start_line(start, sites)), soft_wrap=True)


def _searched(
    settings: SearchSettings, data: DataSettings | None, work: WorkDirectory, path: Path, device: str, *, force: bool
) -> SearchRecord:
    """Under a budget of parameters, MACs or bytes."""
    checkpoint = _checkpoint(path)
    if settings.looping and force and rank() == 0:
        for line in remove_state(checkpoint):
            warn(line)
    if settings.looping and checkpoint.exists():
        output().print(f"going on with {checkpoint}; --force starts anew")
    limits = ", ".join(f"{kind}={share}" for kind, share in (settings.limits or {}).items())
    what = limits or f"{DEFAULT_TARGET if settings.target is None else settings.target} of {settings.budget}"
    text = f"searching {work.model}: {settings.method}, {what}"
    with resumable(text) if settings.looping else advancing(text) as progress:
        record = search(work, settings, data, device=device, checkpoint=checkpoint, progress=progress)
    if record.target:
        output().print(heading("target:", f" {record.target}, --target says another"), soft_wrap=True)
    return record


def _timed(args: Namespace, settings: SearchSettings, data: DataSettings | None, work: WorkDirectory, device: str) -> Reached:
    """Under a budget of measured time."""
    if device != "cpu":
        raise NmfxError(f"--device {device}: times are measured on the CPU; say --device cpu")
    model = work.load()
    sites, one = work.sites(model), pictures_of(work.example(model))
    pictures = one.expand(args.latency_batch, *one.shape[1:]).contiguous()
    question = ask(settings, work.start(sites))
    for name in ("target", "budget", "limits"):
        question.pop(name)
    check_kernel()
    target = args.target_latency or ("2x" if settings.target is None else settings.target)
    with advancing("timing every pattern of every site") as progress:
        find = finder(settings, model, sites, data, work.input_size, device)
        return search_latency(model, sites, pictures, target, question, find, progress)


def _checkpoint(path: Path) -> Path:
    return path.with_suffix(SEARCHING)


def _show_latency(found: Reached) -> None:
    """The times beside each other."""
    dense, predicted, measured = (f"{seconds * 1e3:.2f} ms" for seconds in (found.dense, found.predicted, found.measured))
    text = (
        f"{dense} the best dense run, {found.wanted * 1e3:.2f} ms wanted, {predicted} predicted, {measured} measured "
        f"({found.measured / found.predicted - 1:+.1%}): {found.dense / found.measured:.2f}x"
    )
    output().print(heading("latency: ", text), soft_wrap=True)
    if found.measured > found.wanted:
        output().print("not reached; the machine may have been busy: run it again", soft_wrap=True)


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
    counts = tables.pattern_counts(scheme, result.sites)
    minimised = f" ({result.sensitivity})" if result.method in METHODS and METHODS[result.method].sums else ""
    took = f"{len(result.steps)} steps in" if result.steps else "decided in"
    out.print(f"\n{result.method}{minimised}: {counts}; {took} {result.seconds:.2f} s", soft_wrap=True)
    for budget, left in zip(result.budgets, result.lefts, strict=True):
        share = f"{left / budget.dense:.4%} of dense"
        out.print(f"budget: {budget.limit:,} {UNITS[budget.kind]}, {left:,} left ({share}), no step fits in them")
    out.print(f"squared weight error: {result.comparison}")
