"""nmfx convert: build, find the sites, verify, write the work directory."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from nmfx.cli import tables
from nmfx.cli.common import check_random, hint_scheme
from nmfx.cli.console import advancing, heading, hint, output, warn
from nmfx.errors import NmfxError
from nmfx.models.site import Sites
from nmfx.models.tracer import describe_trace, to_graph
from nmfx.passes.transform import transform
from nmfx.passes.verification import verify
from nmfx.scheme import Scheme
from nmfx.settings.choices import Choices
from nmfx.settings.flags import read_flags, typed
from nmfx.settings.search import SearchSettings
from nmfx.settings.stages import ModelSettings
from nmfx.sparsity.pattern import Pattern
from nmfx.stages.build import build_weights, check_absent, check_weights, create, examine, sparser_search
from nmfx.stages.search import SearchRecord, choose, with_origin
from nmfx.stages.work import WorkDirectory, directory_for, random_weights


def run(args: Namespace) -> None:
    """Convert, show, write."""
    path = Path(args.out) if args.out else directory_for(args.model)
    check_absent(path, force=args.force)
    settings, wanted = read_flags(args, ModelSettings, name=args.model), None
    check_weights(settings)
    if args.scheme and typed(args, Choices):
        raise NmfxError("--scheme says how groups are cut; leave --layout and --remainder out")
    if args.scheme or args.pattern:
        pattern = Pattern(args.pattern) if args.pattern else None
        wanted = SearchSettings(scheme=args.scheme or "", pattern=pattern, choices=read_flags(args, Choices))
    work = convert(args, settings, path, wanted)
    if work.scheme_path.is_file():
        hint_scheme(work)
    else:
        hint(sparser_search(work) if work.start_path.is_file() else (work.command("search"), "a pattern for each site"))


def convert(args: Namespace, settings: ModelSettings, path: Path, wanted: SearchSettings | None = None) -> WorkDirectory:
    """Build a model, show what was found, and write its work directory, under the scheme or pattern that is `wanted`."""
    out = output()
    with advancing(f"building {settings.name}"):
        built = build_weights(settings)
    said = random_weights(str(built.source), built.weights, built.note)
    check_random(args, said)
    if said:
        warn(f"{said}: anything found reflects shapes only", "WARNING")
    if built.weights == "file":
        out.print(built.note, soft_wrap=True)
    with advancing("finding the sites, verifying"):
        record = examine(built, settings.size)
        chosen = choose(wanted, record.model, record.sites) if wanted else SearchRecord(Scheme({}), record.sites)
    model, sites, scheme = record.model, record.sites, with_origin(chosen.scheme, str(built.source), built.weights)
    out.print(heading(str(record.built.source), f" ({type(model).__name__}, {built.weights} weights), {record.example}"))
    show_sites(sites, scheme, chosen.reasons)
    out.print(f"\nfx graph: {describe_trace(model)}")
    exact = "exact" if record.difference == 0 else "NOT EXACT"
    reads = f"all {len(sites)} sites read through all-ones masks"
    out.print(f"verified: {reads}, dense against original: largest difference {record.difference:g} ({exact})")
    if scheme:
        transform(model, scheme, sites=sites, inplace=True)
        verified = verify(model, example_input=record.example)
        out.print(f"verified: {verified} ({scheme.counts(sites)})", soft_wrap=True)
    if vars(args).get("graph"):
        out.print(str(to_graph(model).graph), soft_wrap=True)
    work = create(record, path, scheme or None, force=args.force, made_by=(settings, wanted))
    if record.start is not None:
        out.print(f"compressed weights: {tables.start_line(record.start, sites)}")
    out.print(f"wrote {path}/", soft_wrap=True)
    return work


def show_sites(sites: Sites, scheme: Scheme, reasons: Mapping[str, str]) -> None:
    """The sites with their totals, what is not read as a weight, and why sites have another pattern than asked for."""
    out = output()
    out.print(tables.site_table(sites, scheme, reasons))
    if reasons:
        out.print(tables.reasons_list(reasons, "\n* another pattern than asked for"))
    if sites.skipped:
        out.print(tables.reasons_list({s.name: s.reason for s in sites.skipped}, "\nskipped, not read as weights"))
    for note in sites.notes:
        out.print(heading("note: ", note, "yellow"))
    out.print()
    out.print(tables.totals_table(scheme.totals(sites)))
