"""nmfx evaluate: top-1, top-5 and loss of a checkpoint, baked weights, a work directory or a model by name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table

from nmfx.cli.common import check_random, data_settings, processes, warn_random
from nmfx.cli.console import advancing, output, warn
from nmfx.cli.tables import table
from nmfx.settings.flags import read_flags
from nmfx.settings.stages import EvaluateSettings, ModelSettings
from nmfx.stages.evaluate import FIRST, Candidate, candidates_of, load_candidate, score
from nmfx.stages.work import asked, open_work
from nmfx.training.evaluation import Evaluation


def run(args: Namespace) -> None:
    """Load, evaluate, show."""
    settings, data = read_flags(args, EvaluateSettings), data_settings(args)
    with processes(args.device) as device:
        reference = _load(args.reference, args).model if args.reference else None
        with advancing(f"evaluating on {data.name}") as progress:
            done = score(_candidates(args), settings, data, reference=reference, device=device, progress=progress)
        output().print(score_table(done.scores))
        samples = next(iter(done.scores.values())).samples
        output().print(f"{samples:,} validation pictures of {done.data}", soft_wrap=True)


def _candidates(args: Namespace) -> Iterator[Candidate]:
    """What is asked for: one model, or those of a work directory."""
    what = asked(args.what, "evaluate")
    if not Path(what).is_dir():
        yield _load(what, args)
        return
    work = open_work(Path(what))
    check_random(args, work.random)
    warn_random(work)
    yield from candidates_of(work, read_flags(args, ModelSettings, name="").size)


def _load(what: str, args: Namespace) -> Candidate:
    one = load_candidate(asked(what, "evaluate"), read_flags(args, ModelSettings, name=""), args.model)
    if one.note:
        output().print(one.note, soft_wrap=True)
    if one.random:
        check_random(args, one.random)
        warn(f"{one.random}: its scores mean nothing", "WARNING")
    return one


def score_table(scores: Mapping[str, Evaluation]) -> Table:
    """Scores, one row a model."""
    agreed = any(found.agreement is not None for found in scores.values())
    first = next((label for label in scores if label in FIRST), "dense")
    result = table("~", "top-1>", "top-5>", "loss>", *([f"agreement with {first}>"] if agreed else []))
    for label, found in scores.items():
        agreement = "" if found.agreement is None else f"{found.agreement:.2%}"
        result.add_row(label, f"{found.top1:.2%}", f"{found.top5:.2%}", f"{found.loss:.6f}", *([agreement] if agreed else []))
    return result
