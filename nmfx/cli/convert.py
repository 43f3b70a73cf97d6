"""nmfx convert: build, find the sites, verify, write the work directory."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from torch import nn

from nmfx.cli import tables, work
from nmfx.cli.console import heading, hint, output, working
from nmfx.errors import NmfxError, SearchError, TraceError
from nmfx.export.start import build_start, is_compressed, take_start
from nmfx.graph.census import find_sites
from nmfx.graph.site import Sites
from nmfx.graph.tracer import to_graph, trace
from nmfx.passes.baking import verify
from nmfx.passes.calibration import batch_norms
from nmfx.passes.transform import conversion_difference, resolve_scheme, transform
from nmfx.scheme import Remainder, Scheme, fit
from nmfx.search.problem import pose
from nmfx.sparsity.pattern import Pattern
from nmfx.text import nearest, sentence
from nmfx.zoo.building import Built, build_model
from nmfx.zoo.source import find_source

DIGITS = "digits"  # the pictures that the demo network was trained on


def run(args: Namespace) -> None:
    """Convert, show, write."""
    path = Path(args.out) if args.out else work.directory_for(args.model)
    work.check_absent(path, force=args.force)
    _check_use(args)
    found = convert(args.model, path, args)
    hint(*_following(found))


def convert(name: str, path: Path, args: Namespace) -> work.Work:
    """Build `name` and write its work directory, showing what was found."""
    out, size = output(), work.parse_size(args.input_size)
    with working(f"building {name}"):
        built = _build(name, args)
    model = built.model
    if built.weights == "random":
        work.check_random(args, work.random_weights(str(built.source), built.note))
    if built.weights == "file":
        out.print(built.note, soft_wrap=True)
    example = work.example_of(model, size)
    with working("finding the sites"):
        sites = find_sites(model, example)
    start = take_start(model, sites)
    scheme, reasons = _scheme(args, sites)
    scheme = replace(scheme, info={**scheme.info, "model": str(built.source), "weights": built.weights})
    with working("verifying"):
        difference = conversion_difference(model, sites, example)
        graph_line = _graph_line(model)
    out.print(heading(str(built.source), f" ({type(model).__name__}, {built.weights} weights), {example}"))
    out.print(tables.site_table(sites, scheme, reasons))
    _show_notes(sites, reasons)
    out.print()
    out.print(tables.totals_table(scheme.totals(sites)))
    out.print(f"\nfx graph: {graph_line}")
    exact = "exact" if difference == 0 else "NOT EXACT"
    reads = f"all {len(sites)} sites read through all-ones masks"
    out.print(f"verified: {reads}, dense against original: largest difference {difference:g} ({exact})")
    if len(scheme):
        transform(model, scheme, sites=sites, inplace=True)
        checked = verify(model, example_input=example)
        counts = tables.pattern_counts(scheme, sites)
        out.print(f"verified: {checked} ({counts})", soft_wrap=True)
    if args.graph:
        out.print(str(to_graph(model).graph), soft_wrap=True)
    result = work.create(path, built, size, scheme if len(scheme) else None, sites, start=start, force=args.force)
    result.warn()
    if start is not None:
        out.print(f"compressed weights: {tables.start_line(start, sites)}")
    out.print(f"wrote {path}/", soft_wrap=True)
    return result


def _check_use(args: Namespace) -> None:
    """Refuse what cannot be meant, before anything is built."""
    if Path(args.weights).is_dir():
        raise NmfxError(f"--weights {args.weights}: a folder; expected auto, pretrained, none or a file")
    known = args.weights in ("auto", "pretrained", "none")
    if not known and not Path(args.weights).exists() and not Path(args.weights).suffix:
        near = nearest(args.weights, ("auto", "pretrained", "none"))
        raise NmfxError(f"--weights {args.weights}: no such file{near}; expected auto, pretrained, none or a file")
    if known and args.weights_entry:
        raise NmfxError(f"--weights-entry {args.weights_entry} is of a file: give --weights FILE")
    if args.scheme and (args.layout != "strict" or args.remainder != "dense"):
        raise NmfxError("--scheme says how groups are cut; leave --layout and --remainder out")


def _following(found: work.Work) -> list[tuple[str, str]]:
    """What can be done with a new work directory."""
    if found.scheme_path.is_file():
        return following(found, ())
    if not found.start_path.is_file():
        return [(found.command("search"), "a pattern for each site")]
    model = found.build_meta()
    sites = found.sites(model)
    start = Scheme.load(found.start_path, sites)
    kept = 1 - start.totals(sites).sparsity
    for share in (0.5, 0.75, 0.9):
        target, m = f"{1 - share * kept:.4f}", max(pattern.m for pattern in start.values())
        with contextlib.suppress(SearchError):
            pose(sites, target=target, m=m, mixed=True, within=start, layout=start.layout, remainder=_remainder(start))
            policy = [
                *(["--layout", "flat"] if start.layout == "flat" else []),
                *(["--remainder", "short"] if start.short else []),
            ]
            return [(found.command("search", "--target", target, *policy), "sparser than it is")]
    return [(found.command("search", "--m", "32", "--target", f"{1 - 0.9 * kept:.4f}"), "sparser than it is, if it can be")]


def _remainder(scheme: Scheme) -> Remainder:
    return "short" if scheme.short else "dense"


def following(found: work.Work, data: tuple[str, ...], scheme: str | None = None) -> list[tuple[str, str]]:
    """What can be done with a scheme: what brings accuracy back comes before the export."""
    data = data or ("--data", DIGITS if found.model == "demo:digits" else "DIR")
    commands = [(found.command("finetune", *data, scheme=scheme), "train it under this scheme")]
    if batch_norms(found.build_meta()):
        commands.append((found.command("recalibrate", *data, scheme=scheme), "batch norms only, no training"))
    return [*commands, (found.command("export", scheme=scheme), "as it is")]


def _build(name: str, args: Namespace) -> Built:
    kwargs = {"num_classes": args.classes} if args.classes else {}
    if is_compressed(args.weights):
        return build_start(Path(args.weights), replace(find_source(name), kwargs=kwargs))
    return build_model(name, weights=args.weights, kwargs=kwargs, entry=args.weights_entry)


def _scheme(args: Namespace, sites: Sites) -> tuple[Scheme, dict[str, str]]:
    if args.scheme:
        return resolve_scheme(Path(args.scheme), sites), {}
    if args.pattern:
        pattern = Pattern(args.pattern)
        reasons = {s.name: r for s in sites if (r := fit(s, pattern, args.layout, args.remainder)[1])}
        return Scheme.uniform(sites, pattern, layout=args.layout, remainder=args.remainder), reasons
    return Scheme({}), {}


def _show_notes(sites: Sites, reasons: dict[str, str]) -> None:
    out = output()
    if reasons:
        out.print(tables.reasons_list(reasons, "\n* another pattern than asked for"))
    if sites.skipped:
        out.print(tables.reasons_list({s.name: s.reason for s in sites.skipped}, "\nskipped, not read as weights"))
    for note in sites.notes:
        out.print(heading("note: ", note, "yellow"))


def _graph_line(model: nn.Module) -> str:
    try:
        nodes = trace(model).graph.nodes
    except TraceError as error:
        return f"does not trace at the root ({sentence(error.__cause__ or error, 80)}); converted all the same"
    return f"traces at the root, {len(nodes)} nodes"
