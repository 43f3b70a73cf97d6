"""nmfx run: one recipe from the model to the scores; stages whose output is there and still valid are skipped."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from nmfx.cli import work
from nmfx.cli.console import advancing, heading, output, warn, working
from nmfx.cli.evaluate import score_table
from nmfx.cli.processes import processes
from nmfx.recipe.check import check_recipe
from nmfx.recipe.loader import find_recipe, load_recipe
from nmfx.recipe.pipeline import Pipeline, exported, read_scores
from nmfx.recipe.schema import Recipe


def run(args: Namespace) -> None:
    """Read the recipe, run its stages, show."""
    path = find_recipe(args.recipe)
    recipe = load_recipe(path, data_root=args.data_root)
    with processes() as device:
        if args.check:
            _check(args, recipe, path, device)
        else:
            _run(args, recipe, Path(args.out) if args.out else Path(f"{path.name.removesuffix('.yaml')}.nmfx"), device)


def _check(args: Namespace, recipe: Recipe, path: Path, device: str) -> None:
    with working(f"checking {path.name}"):
        lines = check_recipe(recipe, device=device)
    for line in lines:
        output().print(line, soft_wrap=True)
    if said := next((line for line in lines if line.startswith("build: random weights stand in")), None):
        work.check_random(args, f"{path.name}: {said}")


def _run(args: Namespace, recipe: Recipe, folder: Path, device: str) -> None:
    pipeline, out = Pipeline(recipe, folder, device=device), output()
    stages = pipeline.stages
    if args.until and args.until not in stages:
        warn(f"the recipe has no {args.until} stage")
    for stage in stages:
        if not (why := "--force" if args.force else pipeline.reason(stage)):
            out.print(heading(stage, ": skipped, its output is there and still valid"))
        else:
            out.print(heading(stage, f": {why}"), soft_wrap=True)
            with advancing(f"{stage} of {folder}") as advance:
                lines = pipeline.run(stage, advance, anew=args.force)
            for line in lines:
                out.print(f"  {line}", soft_wrap=True)
        if (dense := pipeline.job.dense()).weights == "random":
            work.check_random(args, work.random_weights(str(dense.source), dense.note))
        if stage == "evaluate":
            out.print(score_table(list(read_scores(folder).items())))
        if stage == args.until:
            break
    if (dense := pipeline.job.dense()).weights == "random":
        warn(work.random_weights(str(dense.source), dense.note), red=recipe.finetune is None)
    if exported(pipeline.job).is_file():
        out.print(f"the result is {exported(pipeline.job)}", soft_wrap=True)
