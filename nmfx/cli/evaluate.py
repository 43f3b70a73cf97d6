"""nmfx evaluate: top-1, top-5 and loss of a checkpoint, baked weights, a work directory or a model by name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from nmfx.cli.common import check_random, data_settings, processes
from nmfx.cli.console import advancing, output, show_json, warn
from nmfx.cli.tables import table
from nmfx.processes import rank
from nmfx.settings.flags import read_flags
from nmfx.settings.stages import EvaluateSettings, ModelSettings
from nmfx.stages.evaluate import FIRST, Candidate, candidates_of, load_candidate, score
from nmfx.stages.measured import record_scores
from nmfx.stages.work import asked
from nmfx.training.evaluation import Evaluation


def run(args: Namespace) -> None:
    """Load, evaluate, show."""
    settings, data, model = read_flags(args, EvaluateSettings), data_settings(args), read_flags(args, ModelSettings, name="")
    with processes(args.device) as device:
        reference = None
        if args.reference:
            known = load_candidate(asked(args.reference, "evaluate"), model, args.model)
            reference = next(_told(args, [known])).model
        found = candidates_of(asked(args.what, "evaluate"), model, args.model)
        with advancing(f"evaluating on {data.name}") as progress:
            done = score(_told(args, found), settings, data, reference=reference, device=device, progress=progress)
        if done.files and rank() == 0:
            record_scores(Path(asked(args.what, "evaluate")), done.scores, done.files, data.name)
        output().print(score_table(done.scores))
        samples = next(iter(done.scores.values())).samples
        output().print(f"{samples:,} validation pictures of {done.data}", soft_wrap=True)
        if args.json:
            show_json({"data": str(done.data), "scores": {label: asdict(one) for label, one in done.scores.items()}})


def _told(args: Namespace, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """The same, with a word on their weights."""
    for one in candidates:
        if one.note:
            output().print(one.note, soft_wrap=True)
        if one.random:
            check_random(args, one.random)
            warn(f"{one.random}: its scores mean nothing", "WARNING")
        yield one


def score_table(scores: Mapping[str, Evaluation]) -> Table:
    """Scores, one row a model."""
    agreed = any(found.agreement is not None for found in scores.values())
    first = next((label for label in scores if label in FIRST), "dense")
    result = table("~", "top-1>", "top-5>", "loss>", *([f"agreement with {first}>"] if agreed else []))
    for label, found in scores.items():
        agreement = "" if found.agreement is None else f"{found.agreement:.2%}"
        result.add_row(label, f"{found.top1:.2%}", f"{found.top5:.2%}", f"{found.loss:.6f}", *([agreement] if agreed else []))
    return result
