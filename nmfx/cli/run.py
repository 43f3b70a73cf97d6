"""nmfx run: a recipe's stages, each run or skipped, with the reason."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from nmfx.cli.common import check_random, processes
from nmfx.cli.console import advancing, heading, output, warn
from nmfx.cli.evaluate import score_table
from nmfx.recipe.check import check_recipe
from nmfx.recipe.loader import find_recipe, load_recipe
from nmfx.recipe.schema import Recipe
from nmfx.settings.job import Job
from nmfx.stages.evaluate import read_scores
from nmfx.stages.pipeline import Pipeline
from nmfx.stages.work import open_work


def run(args: Namespace) -> None:
    """Read the recipe, run its stages, show."""
    path = find_recipe(args.recipe)
    recipe = load_recipe(path, data_root=args.data_root)
    with processes() as device:
        if args.check:
            _check(args, recipe, path, device)
        else:
            run_job(args, recipe, Path(args.out) if args.out else Path(f"{path.name.removesuffix('.yaml')}.nmfx"), device)


def _check(args: Namespace, recipe: Recipe, path: Path, device: str) -> None:
    with advancing(f"checking {path.name}"):
        lines = check_recipe(recipe, device=device)
    for line in lines:
        output().print(line, soft_wrap=True)
    if said := next((line for line in lines if line.startswith("build: random weights stand in")), None):
        check_random(args, f"{path.name}: {said}")


def run_job(args: Namespace, job: Job, folder: Path, device: str) -> None:
    """Run the stages of a job in a folder, until ``args.until``, all anew with ``args.force``, and show what they say."""
    pipeline, out = Pipeline(job, folder, device=device), output()
    if args.until and args.until not in pipeline.stages:
        warn(f"the recipe has no {args.until} stage")
    for stage in pipeline.stages:
        if not (why := "--force" if args.force else pipeline.reason(stage)):
            out.print(heading(stage, ": skipped, its output is there and still valid"))
        else:
            out.print(heading(stage, f": {why}"), soft_wrap=True)
            with advancing(f"{stage} of {folder}", resumable=True) as progress:
                lines = pipeline.run(stage, progress, anew=args.force)
            for line in lines:
                out.print(f"  {line}", soft_wrap=True)
        check_random(args, open_work(folder).random)
        if stage == "evaluate":
            out.print(score_table(read_scores(folder)))
        if stage == args.until:
            break
    work = open_work(folder)
    if work.random:
        warn(work.random, "WARNING" if job.finetune is None else "warning")
    if work.exported_path.is_file():
        out.print(f"the result is {work.exported_path}", soft_wrap=True)
