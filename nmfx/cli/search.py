"""nmfx search: a pattern for every site, as a picture and as scheme files."""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nmfx.cli import convert, latency, report, tables, work
from nmfx.cli.console import advancing, heading, hint, output, warn, working
from nmfx.cli.processes import asked_to_stop, first_alone, processes
from nmfx.errors import NmfxError, SearchError
from nmfx.models.site import Sites
from nmfx.models.source import find_source
from nmfx.processes import rank, world
from nmfx.recipe.written import is_state, remove_state
from nmfx.scheme import Scheme
from nmfx.search.budget import UNITS
from nmfx.search.finder import MIXED, SearchResult, conclude, find_scheme
from nmfx.search.problem import pose
from nmfx.search.tables import Tables

if TYPE_CHECKING:
    from nmfx.search.domino_loop import DominoSearch

DEMO = "demo:digits"
DEFAULT = "0.875"  # the sparsity that is searched for, where it can be reached
LOOP = {  # options of the published loop: the argument and its default
    "--no-eta": ("no_eta", False),
    "--lr": ("lr", 0.01),
    "--decay": ("decay", 0.1),
    "--vote-every": ("vote_every", 100),
    "--most": ("most", 100_000),
}


def run(args: Namespace) -> None:
    """Find the model, search, show, write."""
    with processes(args.device) as device:
        _run(args, device)


def _run(args: Namespace, device: str) -> None:
    with first_alone():
        found, out = _work(args).check(args), output()
    path = Path(args.out) if args.out else found.scheme_path
    if path.suffix not in (".yaml", ".yml"):
        raise NmfxError(f"--out {path}: expected a name that ends in .yaml (the published format goes to .txt beside it)")
    work.check_free([path, path.with_suffix(".txt")], force=args.force)
    report.check(args.figure, args.html, force=args.force)
    method, timed = args.method or "knapsack", args.target_latency or args.budget == "latency"
    _check_use(args, method)
    model = found.load()
    sites = found.sites(model)
    if start := found.start(sites):
        out.print(heading(f"starts from {found.start_path}: ", tables.start_line(start, sites)), soft_wrap=True)
    if not (args.target or args.limit or timed or start):
        args.target = _default_target(sites, method, _question(args, None))
    reached = None
    if timed:
        reached = _timed(args, found, model, sites, method, device)
        result = reached.result
    elif method == "domino" and args.data:
        result = _loop(args, found, model, sites, path, device)
    else:
        result = _find(args, found, model, sites, method, device)
    scheme = replace(result.scheme, info={**result.scheme.info, "model": found.model, "weights": found.weights})
    _show(result, scheme, events=args.events)
    if reached is not None:
        latency.show(reached)
    found.warn()
    if rank() != 0:
        return
    written = work.save_scheme(scheme, path, result.sites, force=args.force)
    written += report.write(result, scheme, args.figure, args.html, force=args.force)
    if is_state(_checkpoint(path)):
        _checkpoint(path).unlink()
    out.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
    hint(*convert.following(found, work.data_options(args) if args.data else (), str(path) if args.out else None))


def _check_use(args: Namespace, method: str) -> None:
    """Refuse options that would be ignored."""
    if args.sensitivity and method != "knapsack":
        raise SearchError(f"--sensitivity is the knapsack's; method {method} has none: add --method knapsack")
    if args.data and method in ("erk", "uniform"):
        raise SearchError(f"method {method} looks at no pictures; leave --data out")
    if args.data and method == "knapsack" and args.sensitivity == "weight":
        raise SearchError("the knapsack looks at pictures with --sensitivity activation, gradient or measured only")
    if not (method == "domino" and args.data):
        for option, (name, default) in LOOP.items():
            if getattr(args, name) != default:
                raise SearchError(f"{option} is of the published loop: it needs --method domino with --data")
    if args.target_latency and (args.target or args.budget or args.limit):
        raise SearchError("--target-latency says the budget; leave --target, --budget and --limit out")
    if (args.target_latency or args.budget == "latency") and method not in ("knapsack", "spdy"):
        raise SearchError(f"times are the knapsack's and spdy's to budget; method {method} counts parameters, MACs or bytes")


def _find(args: Namespace, found: work.Work, model: nn.Module, sites: Sites, method: str, device: str) -> SearchResult:
    """The methods of find_scheme."""
    find = _finder(args, model, sites, method, device)
    with working(f"searching {found.model}: {method}, {_wanted(args)}"):
        return find(**_question(args, found.start(sites)))


def _finder(args: Namespace, model: nn.Module, sites: Sites, method: str, device: str) -> Callable[..., SearchResult]:
    """find_scheme with its method and the pictures it looks at."""
    sensitivity, data = args.sensitivity or ("gradient" if args.data and method == "knapsack" else "weight"), None
    if args.data and (method == "spdy" or sensitivity != "weight"):
        data = _calibration(args, model)
    options = {"seconds": args.seconds, "seed": args.seed} if method == "spdy" else {}
    model = model.to(device)
    return partial(find_scheme, model, sites=sites, method=method, sensitivity=sensitivity, data=data, options=options)


def _timed(args: Namespace, found: work.Work, model: nn.Module, sites: Sites, method: str, device: str) -> latency.Reached:
    """Under a budget of measured time."""
    if device != "cpu":
        raise NmfxError(f"--device {device}: times are measured on the CPU; say --device cpu")
    one = work.pictures_of(found.example(model))
    pictures = one.expand(args.latency_batch, *one.shape[1:]).contiguous()
    question = _question(args, found.start(sites))
    for name in ("target", "budget", "limits"):
        question.pop(name)
    target = args.target_latency or args.target or "2x"
    return latency.search(model, sites, pictures, target, question, _finder(args, model, sites, method, device))


def _loop(args: Namespace, found: work.Work, model: nn.Module, sites: Sites, path: Path, device: str) -> SearchResult:
    """The published loop over training batches, with a checkpoint beside the scheme."""
    from nmfx.data.config import check_classes, picture_config
    from nmfx.data.loader import train_loader
    from nmfx.data.source import open_data
    from nmfx.search.run import run_domino

    data = open_data(args.data, root=args.data_root)
    check_classes(data, model)
    share = args.batch_size // world()
    loader = train_loader(data, picture_config(model, data), batch_size=share, workers=args.workers, seed=args.seed)
    checkpoint, start = _checkpoint(path), time.perf_counter()
    if args.force and rank() == 0:
        for line in remove_state(checkpoint):
            warn(line)
    if checkpoint.exists():
        output().print(f"going on with {checkpoint}; --force starts anew")
    with advancing(f"searching {found.model} on {data.name}") as advance, asked_to_stop() as stop:

        def progress(search: DominoSearch) -> None:
            aim = float(search.problem.budget.target)
            stop()
            last = ", ".join(f"{e.site} {e.after}" for e in search.events[-2:]) or "no site has tipped yet"
            advance(min(1.0, search.sparsity / aim) if aim else 1.0, f"t = {search.t}, sparsity {search.sparsity:.4f}: {last}")

        loop = {"lr": args.lr, "seed": args.seed, "device": device, "most": args.most, "checkpoint": checkpoint}
        loop |= {"decay": args.decay, "eta": not args.no_eta, "vote_every": args.vote_every}
        search = run_domino(model, loader, sites=sites, progress=progress, **loop, **_question(args, found.start(sites)))
    tables_of = Tables(search.problem, model)
    return conclude(tables_of, search.outcome, method=search.method, seconds=time.perf_counter() - start)


def _checkpoint(path: Path) -> Path:
    return path.with_suffix(".search.safetensors")


def _calibration(args: Namespace, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    from nmfx.data.config import check_classes, picture_config
    from nmfx.data.sample import calibration
    from nmfx.data.source import open_data

    data = open_data(args.data, root=args.data_root)
    check_classes(data, model)
    size, config = min(args.batch_size, max(1, args.pictures // 8)), picture_config(model, data)
    with working(f"reading {args.pictures} pictures of {data.name}"):
        return calibration(data, config, count=args.pictures, batch_size=size, seed=args.seed, workers=args.workers)


def _question(args: Namespace, start: Scheme | None) -> dict[str, Any]:
    """What is asked of a search, whatever the method; one that starts from a sparse network keeps its M unless told."""
    pairs = [_pair(text, "--limit") for text in args.limit]
    if len(dict(pairs)) < len(pairs):
        raise SearchError(f"--limit {' --limit '.join(args.limit)}: one limit of a kind")
    if pairs and (args.target or args.budget):
        raise SearchError("--limit says the budget; leave --target and --budget out")
    if args.patterns and (args.m or args.candidates):
        raise SearchError("--patterns says all patterns; leave --m and --candidates out")
    least: float | dict[str, float] = 0.0
    if args.min_density:
        rules = [_pair(text if "=" in text else f"*={text}", "--min-density") for text in args.min_density]
        rules.sort(key=lambda rule: rule[0] == "*")  # the first match counts: what is said of all sites comes last
        least = {glob: _number(share, "--min-density") for glob, share in rules}
    sizes = _numbers(
        args.m if args.m is not None else str(max((pattern.m for pattern in (start or {}).values()), default=16)), "--m"
    )
    return {
        "target": args.target or DEFAULT,
        "budget": args.budget or "params",
        "limits": dict(pairs) or None,
        "m": sizes[0] if len(sizes) == 1 else sizes,
        "candidates": _numbers(args.candidates, "--candidates") if args.candidates is not None else None,
        "patterns": args.patterns.split(",") if args.patterns is not None else None,
        "keep_dense": args.keep_dense,
        "min_density": least,
        "layout": args.layout,
        "remainder": args.remainder,
        "within": start,
    }


def _default_target(sites: Sites, method: str, question: dict[str, Any]) -> str:
    """0.875; where that is out of reach, what the densest pattern of each site comes to, which is said."""
    free = {key: value for key, value in question.items() if key not in ("target", "limits")}
    try:
        problem = pose(sites, target=0.0, mixed=method in MIXED, **free)
    except SearchError:
        return DEFAULT  # and the search says what is wrong
    dense, costs = problem.budget.dense, problem.costs
    kept = sum(row[-2] if len(row) > 1 else row[-1] for row in costs)
    if sum(map(min, costs)) <= dense * (1 - Fraction(DEFAULT)) or kept == dense:
        return DEFAULT
    target = f"{math.floor(10**6 * (1 - Fraction(kept, dense))) / 10**6:.6f}"
    patterns = ", ".join(dict.fromkeys(str(options[-2]) for options in problem.options if len(options) > 1))
    said = f" {target} of {problem.budget.kind}, {patterns} wherever it fits; {DEFAULT} is out of reach, --target says another"
    output().print(heading("target:", said), soft_wrap=True)
    return target


def _wanted(args: Namespace) -> str:
    return ", ".join(args.limit) or f"{args.target or DEFAULT} of {args.budget or 'params'}"


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not (name and equals and value):
        raise SearchError(f"{option} {text}: expected a name and a value, as in {option} params=0.125")
    return name, value


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SearchError(f"{option} {text}: expected a number, as in 0.25") from None


def _work(args: Namespace) -> work.Work:
    """The work directory to search; converted first for --model, and for the demo network when there is none."""
    if args.model and args.work:
        raise NmfxError("give a work directory or --model, not both")
    found = None if args.model else work.find_work(args.work, "search")
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
    defaults: dict[str, Any] = {"weights": "auto", "weights_entry": None, "pattern": None, "scheme": None, "input_size": None}
    defaults |= {"classes": None, "graph": False, "force": False, "strict_weights": args.strict_weights}
    return convert.convert(name, path, Namespace(**defaults))


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SearchError(f"{option} {text}: expected whole numbers with commas, as in 1,2,4,8") from None


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
    minimised = f" ({result.sensitivity})" if result.method == "knapsack" else ""
    took = f"{len(result.steps)} steps in" if result.steps else "decided in"
    out.print(f"\n{result.method}{minimised}: {counts}; {took} {result.seconds:.2f} s", soft_wrap=True)
    for budget, left in zip(result.budgets, result.lefts, strict=True):
        share = f"{left / budget.dense:.4%} of dense"
        out.print(f"budget: {budget.limit:,} {UNITS[budget.kind]}, {left:,} left ({share}), no step fits in them")
    out.print(f"squared weight error: {result.comparison}")
