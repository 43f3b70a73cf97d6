"""nmfx convert: build, find the sites, verify, write the work directory."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from nmfx.cli import tables
from nmfx.cli.common import after_search, check_random, model_settings, warn_random
from nmfx.cli.console import heading, hint, output, working
from nmfx.errors import NmfxError, SearchError, TraceError
from nmfx.models.site import Sites
from nmfx.models.tracer import to_graph, trace
from nmfx.passes.transform import transform
from nmfx.passes.verification import verify
from nmfx.scheme import Scheme
from nmfx.search.problem import make_problem
from nmfx.settings.flags import read_flags, typed
from nmfx.settings.search import Choices, SearchSettings
from nmfx.settings.stages import ModelSettings
from nmfx.sparsity.pattern import Pattern
from nmfx.stages.build import BuildRecord, build_weights, check_absent, create, examine
from nmfx.stages.search import choose, with_origin
from nmfx.stages.work import WorkDirectory, directory_for, random_weights
from nmfx.text import nearest, sentence

KNOWN = ("auto", "pretrained", "none")


def run(args: Namespace) -> None:
    """Convert, show, write."""
    path = Path(args.out) if args.out else directory_for(args.model)
    check_absent(path, force=args.force)
    settings = model_settings(args, args.model)
    _check_use(args, settings)
    wanted = None
    if args.scheme or args.pattern:
        pattern = Pattern(args.pattern) if args.pattern else None
        wanted = SearchSettings(scheme=args.scheme or "", pattern=pattern, choices=read_flags(args, Choices))
    hint(*_following(convert(args, settings, path, wanted, graph=args.graph, force=args.force)))


def convert(
    args: Namespace,
    settings: ModelSettings,
    path: Path,
    wanted: SearchSettings | None = None,
    *,
    graph: bool = False,
    force: bool = False,
) -> WorkDirectory:
    """Build a model and write its work directory, showing what was found.

    Args:
        wanted: a pattern for all sites, or the file of a scheme.
    """
    out = output()
    with working(f"building {settings.name}"):
        built = build_weights(settings)
    check_random(args, random_weights(str(built.source), built.note) if built.weights == "random" else "")
    if built.weights == "file":
        out.print(built.note, soft_wrap=True)
    with working("finding the sites, verifying"):
        record = examine(built, settings.size)
        chosen = choose(wanted, record.model, record.sites) if wanted else None
    scheme = with_origin(chosen.scheme, str(built.source), built.weights) if chosen else None
    _show(record, scheme or Scheme({}), chosen.reasons if chosen else {})
    if scheme:
        transform(record.model, scheme, sites=record.sites, inplace=True)
        checked = verify(record.model, example_input=record.example)
        counts = tables.pattern_counts(scheme, record.sites)
        out.print(f"verified: {checked} ({counts})", soft_wrap=True)
    if graph:
        out.print(str(to_graph(record.model).graph), soft_wrap=True)
    work = create(record, path, scheme or None, force=force)
    warn_random(work)
    if record.start is not None:
        out.print(f"compressed weights: {tables.start_line(record.start, record.sites)}")
    out.print(f"wrote {path}/", soft_wrap=True)
    return work


def _check_use(args: Namespace, settings: ModelSettings) -> None:
    """Refuse what cannot be meant, before anything is built."""
    weights, path, known = settings.weights, Path(settings.weights), settings.weights in KNOWN
    if path.is_dir():
        raise NmfxError(f"--weights {weights}: a folder; expected auto, pretrained, none or a file")
    if not known and not path.exists() and not path.suffix:
        raise NmfxError(
            f"--weights {weights}: no such file{nearest(weights, KNOWN)}; expected auto, pretrained, none or a file"
        )
    if known and settings.weights_entry:
        raise NmfxError(f"--weights-entry {settings.weights_entry} is of a file: give --weights FILE")
    if args.scheme and typed(args, Choices):
        raise NmfxError("--scheme says how groups are cut; leave --layout and --remainder out")


def _show(record: BuildRecord, scheme: Scheme, reasons: Mapping[str, str]) -> None:
    out, sites = output(), record.sites
    kind = f"{type(record.model).__name__}, {record.built.weights} weights"
    out.print(heading(str(record.built.source), f" ({kind}), {record.example}"))
    out.print(tables.site_table(sites, scheme, reasons))
    show_notes(sites, reasons)
    out.print()
    out.print(tables.totals_table(scheme.totals(sites)))
    out.print(f"\nfx graph: {_graph_line(record.model)}")
    exact = "exact" if record.difference == 0 else "NOT EXACT"
    reads = f"all {len(sites)} sites read through all-ones masks"
    out.print(f"verified: {reads}, dense against original: largest difference {record.difference:g} ({exact})")


def show_notes(sites: Sites, reasons: Mapping[str, str]) -> None:
    """What is not read as a weight, and why sites have another pattern than asked for."""
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


def _following(work: WorkDirectory) -> list[tuple[str, str]]:
    """What can be done with a new work directory."""
    if work.scheme_path.is_file():
        return after_search(work, ())
    if not work.start_path.is_file():
        return [(work.command("search"), "a pattern for each site")]
    sites = work.sites(work.build_meta())
    start = work.start(sites)
    assert start is not None  # it has been written
    kept, m = 1 - start.totals(sites).sparsity, max(pattern.m for pattern in start.values())
    remainder = "short" if start.short else "dense"
    policy = ["--layout", "flat"] if start.layout == "flat" else []
    policy += ["--remainder", "short"] if start.short else []
    for share in (0.5, 0.75, 0.9):
        target = f"{1 - share * kept:.4f}"
        with contextlib.suppress(SearchError):
            make_problem(sites, target=target, m=m, mixed=True, within=start, layout=start.layout, remainder=remainder)
            return [(work.command("search", "--target", target, *policy), "sparser than it is")]
    return [(work.command("search", "--m", "32", "--target", f"{1 - 0.9 * kept:.4f}"), "sparser than it is, if it can be")]
