"""The stages of a recipe: build, search, finetune, export, evaluate. Only this file brings them together.

The folder of a run is a work directory: what ``nmfx evaluate``, ``inspect``, ``export`` and ``compare`` take. Every stage reads
what those before it wrote, and leaves a stamp in ``stages/``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from torch import nn

from nmfx.data.loader import train_loader, validation_loader
from nmfx.data.sample import calibration
from nmfx.errors import CheckpointError, ModelError, NmfxError, SchemeError
from nmfx.export.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from nmfx.export.plain import save_baked, save_onnx
from nmfx.export.start import build_start, is_compressed, take_start
from nmfx.files import all_or_nothing, check_writable, write_text
from nmfx.graph.census import find_sites
from nmfx.graph.site import Sites
from nmfx.parsing import read_json
from nmfx.passes.baking import bake, verify
from nmfx.passes.transform import conversion_difference, transform
from nmfx.processes import rank, world
from nmfx.recipe.job import SCHEME, START, WEIGHTS, WORK, Dense, Job, example_of
from nmfx.recipe.schema import INLINE, FinetuneSection, ModelSection, Recipe, SearchSection
from nmfx.recipe.stamp import Stamp, digest_of, digests, read_stamp, stamp, write_stamp
from nmfx.recipe.tuned import TUNED, describe_epoch, save_epochs
from nmfx.recipe.written import BOARD, Written, check_folders, is_state, remove_events, remove_state
from nmfx.scheme import Scheme, Totals, shapes_of
from nmfx.search.domino_loop import DominoSearch
from nmfx.search.finder import SearchResult, conclude, find_scheme
from nmfx.search.run import run_domino
from nmfx.search.tables import Tables
from nmfx.training.evaluation import Evaluation, evaluate
from nmfx.training.record import Epoch, Progress
from nmfx.training.settings import FREE
from nmfx.training.state import fingerprint
from nmfx.training.trainer import BEST, LAST, LOG, finetune
from nmfx.zoo.building import Built, build_random, load_weights, unavailable
from nmfx.zoo.source import SOURCE, find_source

Advance = Callable[..., None]  # the share done, a line of text; lasting=True: a line to keep
SCHEMES = (SCHEME, "scheme.txt")
FOLDERS = ("stages", "export", "finetune", BOARD)
SEARCHING, TUNING, SCORES = "scheme.search.safetensors", "finetune", "evaluation.json"


@dataclass(frozen=True)
class Done:
    """What a stage did: the files it wrote, by their path in the folder, and what there is to say."""

    outputs: tuple[str, ...]
    lines: tuple[str, ...] = ()


# --- build


def build(section: ModelSection) -> Built:
    """The model that a recipe names, with its weights: dense, or converted where they are a compressed checkpoint.

    Raises:
        ModelError: an unknown name, arguments its builder does not take, weights that cannot be had or do not fit.
    """
    source, note = replace(find_source(section.name), kwargs=dict(section.kwargs)), ""
    if section.weights in ("auto", "pretrained"):
        try:
            return Built(source.build(pretrained=True), source, "pretrained")
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            note = f"pretrained weights of {source} cannot be had: {unavailable(error)}"
            if section.weights == "pretrained":
                raise ModelError(f"{note}. Say weights: FILE, or weights: none for the structure only") from error
    if is_compressed(section.weights):
        return build_start(Path(section.weights), source)
    model = build_random(source)
    if section.weights in ("auto", "none"):
        return Built(model, source, "random", note)
    load_weights(model, Path(section.weights))
    return Built(model, source, "file", f"weights from {section.weights}")


def _build(job: Job, advance: Advance) -> Done:
    section, folder = job.recipe.model, job.folder
    built = build(section)
    model, source = built.model, getattr(built.model, SOURCE, built.source)
    example = example_of(model, section)
    sites = find_sites(model, example)
    start = take_start(model, sites)
    difference = conversion_difference(model, sites, example)
    head = {"nmfx": "work", "version": 1, "model": str(source), "kwargs": json.dumps(dict(source.kwargs))}
    head |= {"weights": built.weights, "note": built.note, "input_size": section.input_size}
    content = yaml.safe_dump(head, sort_keys=False)
    kept = Written(folder).clear(WORK, WEIGHTS, START)
    written = [WORK]
    if built.weights != "random":  # their seed gives those again
        save_baked(model, folder / WEIGHTS)
        written.append(WEIGHTS)
    if start is not None:
        start.save(folder / START, sites)
        written.append(START)
    write_text(folder / WORK, content)
    lines = [
        f"{source} ({type(model).__name__}, {built.weights} weights): {len(sites)} sites, {sites.weights:,} weights, "
        f"{sites.macs:,} MACs",
        f"{len(sites.skipped)} parameters are no sites: {', '.join(s.name for s in sites.skipped)}" if sites.skipped else "",
        f"read through all-ones masks, the largest difference is {difference:g}",
        built.note,
        *kept,
        f"compressed weights: {describe(start.totals(sites))}; no site gets denser" if start is not None else "",
    ]
    return Done(tuple(written), tuple(line for line in lines if line))


# --- search


def choose(
    section: SearchSection,
    model: nn.Module,
    sites: Sites,
    *,
    start: Scheme | None = None,
    job: Job | None = None,
    advance: Advance | None = None,
) -> tuple[Scheme, SearchResult | None]:
    """The scheme that a recipe asks for, and the result of the search if there is one.

    Args:
        start: the scheme that the weights are under already, which bounds a search.
        job: where the pictures are, for a search that looks at them.
    """
    choices = {item.name: getattr(section.choices, item.name) for item in fields(section.choices)} | {"within": start}
    if section.scheme:
        return Scheme.load(section.scheme, sites), None
    if section.pattern is not None:
        if section.pattern.is_dense:
            return Scheme({}, shapes=shapes_of(sites)), None
        policy = {name: choices[name] for name in ("keep_dense", "layout", "remainder")}
        scheme = Scheme.uniform(sites, section.pattern, **policy)
        return replace(scheme, info={"m": str(section.pattern.m)}), None
    question = {"target": section.target, "budget": section.budget, "limits": section.limits, **choices}
    if section.looping:
        assert job is not None
        result = _loop(section, model, sites, job, advance, question)
        return result.scheme, result
    data = None
    if section.data and job is not None:
        pictures, config = job.pictures(model)
        size = min(section.batch_size, max(1, section.pictures // 8))
        data = calibration(pictures, config, count=section.pictures, batch_size=size, seed=section.seed, workers=job.workers)
    options = {"seconds": section.seconds, "seed": section.seed} if section.method == "spdy" else {}
    result = find_scheme(
        model, sites=sites, method=section.method, sensitivity=section.sensitivity, data=data, options=options, **question
    )
    return result.scheme, result


def _loop(
    section: SearchSection, model: nn.Module, sites: Sites, job: Job, advance: Advance | None, question: Mapping[str, Any]
) -> SearchResult:
    data, config = job.pictures(model)
    share, start = section.batch_size // world(), time.perf_counter()
    loader = train_loader(data, config, batch_size=share, workers=job.workers, seed=section.seed)

    def progress(search: DominoSearch) -> None:
        if advance is not None:
            aim = float(search.problem.budget.target) or 1.0
            advance(min(1.0, search.sparsity / aim), f"t = {search.t}, sparsity {search.sparsity:.4f}")

    loop = {item.name: getattr(section.loop, item.name) for item in fields(section.loop)}
    run: dict[str, Any] = {"lr": section.lr, "seed": section.seed, "most": section.most, "device": job.device}
    search = run_domino(
        model, loader, sites=sites, checkpoint=job.folder / SEARCHING, progress=progress, **run, **loop, **question
    )
    took = time.perf_counter() - start
    return conclude(Tables(search.problem, model), search.outcome, method=search.method, seconds=took)


def _search(job: Job, advance: Advance) -> Done:
    model, dense = job.model().to(job.device), job.dense()
    sites = job.sites(model)
    scheme, result = choose(job.recipe.search, model, sites, start=job.start(sites), job=job, advance=advance)
    scheme = replace(scheme, info={**scheme.info, "model": str(dense.source), "weights": dense.weights})
    written: list[str] = []
    lines = [describe(scheme.totals(sites))]
    if rank() == 0:
        lines += Written(job.folder).clear(*SCHEMES)
        written = _save_scheme(scheme, job.folder, sites)
        if is_state(job.folder / SEARCHING):
            (job.folder / SEARCHING).unlink()
    if result is not None:
        lines.append(f"{result.method}: {len(result.events)} steps in {result.seconds:.2f} s, {result.left:,} left")
        lines += [f"{name}: dense, or with another M ({why})" for name, why in result.dense_reasons.items()]
    return Done(tuple(written), tuple(lines))


def describe(totals: Totals) -> str:
    """What a scheme keeps, in a line."""
    return (
        f"kept: {totals.kept:,} of {totals.weights:,} weights (sparsity {totals.sparsity:.4f}), {totals.kept_macs:,} of "
        f"{totals.macs:,} MACs ({totals.mac_sparsity:.4f})"
    )


def _save_scheme(scheme: Scheme, folder: Path, sites: Sites) -> list[str]:
    """As YAML, and beside it in the published format where that can say it."""
    path = folder / SCHEME
    scheme.save(path, sites)
    published = path.with_suffix(".txt")
    try:
        scheme.save(published, sites)
    except SchemeError:
        return [path.name]
    return [path.name, published.name]


# --- finetune


def _finetune(job: Job, advance: Advance) -> Done:
    section, dense = job.recipe.finetune, job.dense()
    assert section is not None  # or the stage is left out
    settings = replace(section.settings, workers=job.workers)
    model = job.model() if section.weights == "model" else build_random(dense.source, settings.seed)
    sites = job.sites(model)
    scheme = job.scheme(sites)
    transform(model, scheme, sites=sites, training=section.training, decay=section.decay, inplace=True)
    teacher = _teacher(job, dense) if settings.distill else None
    data, config = job.pictures(model)
    about = {"weights before": fingerprint(model)}

    def progress(now: Progress) -> None:
        top1 = "" if now.top1 is None else f", top-1 {now.top1:.2%}"
        advance(
            now.share, f"epoch {now.epoch + 1}/{now.epochs}: loss {now.loss:.4f}{top1}, {now.images_per_second:,.0f} images/s"
        )

    def after_epoch(done: Epoch) -> None:
        advance((done.epoch + 1) / settings.epochs, describe_epoch(done, settings.epochs), lasting=True)

    folder, start = job.folder / TUNING, dense.weights if section.weights == "model" else "random"
    if rank() == 0:
        check_writable(folder)
    result = finetune(
        model.to(job.device),
        data,
        settings=settings,
        folder=folder,
        config=config,
        teacher=teacher,
        about=about,
        progress=progress,
        after_epoch=after_epoch,
    )
    best, written = result.best, tuple(f"{TUNING}/{name}" for name in TUNED.values())
    kept = Written(job.folder).clear(*written) if rank() == 0 else []
    save_epochs(model, result, folder, {**scheme.info, "weights": f"fine-tuned from {start}"})
    return Done(written, (f"{len(result.epochs)} epochs; best top-1 {best.top1:.2%} after epoch {best.epoch + 1}", *kept))


def _teacher(job: Job, dense: Dense) -> nn.Module:
    if dense.weights == "random":
        raise NmfxError("distill learns from the dense weights, but the model has random ones: say model.weights")
    return job.model()


# --- export


def _export(job: Job, advance: Advance) -> Done:
    section, dense, model = job.recipe.export, job.dense(), job.model()
    sites, example = job.sites(model), example_of(model, job.recipe.model)
    scheme, tuned = job.scheme(sites), dense.weights
    if job.recipe.finetune is not None:
        tuned = read_checkpoint(job.folder / TUNING / TUNED[section.epoch])[0].info["weights"]
        load_checkpoint(job.folder / TUNING / TUNED[section.epoch], model)
    else:
        transform(model, scheme, sites=sites, inplace=True)
    checked = verify(model, example_input=example) if len(scheme) else None
    name, written = dense.source.name, []
    with all_or_nothing(job.folder / "export") as draft:
        written += _save_scheme(scheme, draft, sites)
        save_checkpoint(model, draft / f"{name}.safetensors", info={**scheme.info, "weights": tuned})
        written.append(f"{name}.safetensors")
        plain = bake(model, inplace=True)
        if section.baked:
            save_baked(plain, draft / f"{name}.baked.safetensors")
            written.append(f"{name}.baked.safetensors")
        if section.onnx:
            save_onnx(plain, draft / f"{name}.onnx", example)
            written.append(f"{name}.onnx")
        paths, left = tuple(f"export/{file}" for file in written), Written(job.folder)
        earlier = [f"export/{file.name}" for file in (job.folder / "export").iterdir()]
        stale = [path for path in earlier if path not in paths and left.ours(path)]  # of a run with other settings
        kept = left.clear(*paths, *stale)
    lines = [str(checked)] if checked else []
    lines += kept
    lines += [f"wrote {job.folder / path} ({(job.folder / path).stat().st_size:,} bytes)" for path in paths]
    return Done(paths, tuple(lines))


def exported(job: Job) -> Path:
    """The compressed checkpoint that the export stage writes."""
    return job.folder / "export" / f"{job.dense().source.name}.safetensors"


# --- evaluate


def _evaluate(job: Job, advance: Advance) -> Done:
    dense, size = job.model().to(job.device), max(1, job.recipe.evaluate.batch_size // world())
    model = load_checkpoint(exported(job), job.model()).to(job.device)
    data, config = job.pictures(model)
    batches = validation_loader(data, config, batch_size=size, workers=job.workers)
    first = "start" if (job.folder / START).is_file() else "dense"
    scores = {} if job.dense().weights == "random" else {first: evaluate(dense, batches)}
    scores["exported"] = evaluate(model, batches, reference=dense if scores else None)
    content = json.dumps({name: asdict(one) for name, one in scores.items()}, indent=1)
    kept: list[str] = []
    if rank() == 0:
        kept = Written(job.folder).clear(SCORES)
        write_text(job.folder / SCORES, content)
    return Done((SCORES,), tuple(kept))


def read_scores(folder: Path) -> dict[str, Evaluation]:
    """What the evaluate stage measured: of the model before (if its weights are any), dense or a sparse start, and of the
    exported checkpoint.

    Raises:
        CheckpointError: it has not run.
    """
    try:
        return read_json(folder / SCORES, dict[str, Evaluation], "scores")
    except NmfxError as error:
        raise CheckpointError(f"{folder / SCORES}: no scores there ({error}); run the recipe to its end") from error


# --- all of them


@dataclass(frozen=True)
class Stage:
    """What decides a stage's output, what runs it, and the files of a run that was stopped."""

    settings: Callable[[Recipe], dict[str, Any]]
    run: Callable[[Job, Advance], Done]
    drafts: tuple[str, ...] = ()
    together: bool = False  # every process takes part, not only the first


def _flat(section: Any, *without: str) -> dict[str, Any]:
    """The fields of a section by their keys in the recipe; those of inline classes beside its own."""
    inline = {item.name: item.metadata[INLINE] for item in fields(section) if INLINE in item.metadata}
    flat = {item.name: getattr(section, item.name) for item in fields(section) if item.name not in inline}
    for name, hidden in inline.items():
        inner = getattr(section, name)
        flat |= {item.name: getattr(inner, item.name) for item in fields(inner) if item.name not in hidden}
    return {name: value for name, value in flat.items() if name not in without}


def _pictures(recipe: Recipe) -> dict[str, Any]:
    return recipe.data.identity if recipe.data else {}


def _build_settings(recipe: Recipe) -> dict[str, Any]:
    weights = recipe.model.weights
    file = {} if weights in ("auto", "pretrained", "none") else {"content of weights": digest_of(Path(weights))}
    return _flat(recipe.model) | file


def _search_settings(recipe: Recipe) -> dict[str, Any]:
    section = recipe.search
    file = {"content of scheme": digest_of(Path(section.scheme))} if section.scheme else {}
    return {"look at data": section.data} | _flat(section, "data") | (_pictures(recipe) if section.data else {}) | file


def _finetune_settings(recipe: Recipe) -> dict[str, Any]:
    return _flat(recipe.finetune or FinetuneSection(), *FREE) | _pictures(recipe)


DRAFTS = tuple(f"finetune/{name}" for name in (LAST, BEST, LOG, *TUNED.values()))
STAGES = {
    "build": Stage(_build_settings, _build),
    "search": Stage(_search_settings, _search, (SEARCHING,), together=True),
    "finetune": Stage(_finetune_settings, _finetune, DRAFTS, together=True),
    "export": Stage(lambda recipe: _flat(recipe.export), _export),
    "evaluate": Stage(lambda recipe: _flat(recipe.evaluate) | _pictures(recipe), _evaluate, together=True),
}


class Pipeline:
    """The stages of a recipe in a folder; ask `reason` why one has to run, and `run` it, in the order of `stages`."""

    def __init__(self, recipe: Recipe, folder: Path, *, device: str = "cpu") -> None:
        """Raises NmfxError when the folder is not one of ours, or leads elsewhere by a link inside it."""
        self.job = Job(recipe, folder, device)
        check_folders(folder, FOLDERS)
        here = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if here and not (folder / "stages").is_dir():
            raise NmfxError(f"{folder} exists, and no recipe was run there; give -o another folder")

    @property
    def stages(self) -> list[str]:
        """The stages that the recipe has."""
        recipe = self.job.recipe
        absent = {"finetune": recipe.finetune is None, "evaluate": recipe.data is None}
        return [name for name in STAGES if not absent.get(name)]

    def _wanted(self, stage: str) -> Stamp:
        before = self.stages[: self.stages.index(stage)]
        last = read_stamp(self.job.folder, before[-1]) if before else None
        return stamp(STAGES[stage].settings(self.job.recipe), last.fingerprint if last else "")

    def reason(self, stage: str) -> str:
        """Why a stage has to run, once those before it have; empty when its output is there and still valid."""
        there, wanted = read_stamp(self.job.folder, stage), self._wanted(stage)
        said = "there is no output yet" if there is None else there.reason(wanted, self.job.folder)
        _together()  # nobody writes before all have looked
        return said

    def run(self, stage: str, advance: Advance | None = None, *, anew: bool = False) -> tuple[str, ...]:
        """Run a stage; what it has to say. One that was stopped goes on, unless it is another one now, or `anew`."""
        folder, one, wanted = self.job.folder, STAGES[stage], self._wanted(stage)
        there, kept = read_stamp(folder, stage), list[str]()
        _together()
        if rank() == 0:
            if anew or there is None or not there.starts_as(wanted):
                kept = [line for name in one.drafts for line in remove_state(folder / name)]
                remove_events(folder / BOARD) if stage == "finetune" else None
            write_stamp(folder, stage, wanted)
        _together()
        done = one.run(self.job, advance or (lambda *_, **__: None)) if one.together or rank() == 0 else Done(())
        if rank() == 0:
            outputs = digests(folder, done.outputs)
            Written(folder).record(outputs)
            write_stamp(folder, stage, replace(wanted, outputs=outputs))
        _together()
        return (*kept, *done.lines)


def _together() -> None:
    """Wait for the other processes."""
    if world() > 1:
        dist.barrier()
