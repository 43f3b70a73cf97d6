"""nmfx finetune: train a work directory's model under its scheme; the same command goes on with a run that was stopped."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from nmfx.cli import evaluate as evaluating
from nmfx.cli import work
from nmfx.cli.console import advancing, hint, output, warn, working
from nmfx.cli.processes import asked_to_stop, processes
from nmfx.data.augment import Augment
from nmfx.data.config import PictureConfig
from nmfx.data.loader import validation_loader
from nmfx.data.source import Data
from nmfx.errors import NmfxError
from nmfx.export.checkpoint import load_checkpoint
from nmfx.files import check_writable
from nmfx.graph.census import find_sites
from nmfx.passes.baking import verify
from nmfx.passes.transform import scheme_of, transform
from nmfx.processes import rank, world
from nmfx.recipe.tuned import TUNED, describe_epoch, save_epochs
from nmfx.recipe.written import remove_state
from nmfx.scheme import INFO, Scheme
from nmfx.training.evaluation import Evaluation, evaluate
from nmfx.training.masks import set_training
from nmfx.training.record import Epoch, Finetuned, Progress
from nmfx.training.settings import Settings
from nmfx.training.state import fingerprint
from nmfx.training.trainer import BEST, LAST, LOG, finetune
from nmfx.zoo.building import build_random

MODEL = TUNED["best"]


def run(args: Namespace) -> None:
    """Build, train, write, check."""
    with processes(args.device) as device:
        _run(args, device)


def _run(args: Namespace, device: str) -> None:
    found = work.find_work(args.work, "finetune")
    if found is not None and not args.start:
        work.check_random(args, found.random) if args.weights or found.weights == "random" else None
    if found is None and not args.start:
        raise NmfxError("no work directory here; make one with `nmfx convert MODEL`, then `nmfx search`, or give --from FILE")
    if found is None and not args.out:
        raise NmfxError("--from without a work directory: say where to write, with -o FOLDER")
    folder = Path(args.out) if args.out or found is None else found.path / "finetune"
    if args.start and (folder / MODEL).resolve() == Path(args.start).resolve():
        raise NmfxError(f"{args.start} would be overwritten; give -o another folder")
    settings = _settings(args)
    if rank() == 0:
        check_writable(folder, (*TUNED.values(), LAST, BEST, LOG))  # before hours are spent
        if not (folder / LAST).exists():  # no run to go on with, so whatever is there is something else
            work.check_free([folder / name for name in (*TUNED.values(), BEST, LOG)], force=args.force)
    model, info = _model(args, found)
    about = {"weights before": fingerprint(model)}
    teacher = _teacher(args, found)
    data, config = evaluating.pictures(args, model, found.input_size if found else None)
    if args.force and rank() == 0:
        for line in [line for stale in (LAST, BEST, LOG, *TUNED.values()) for line in remove_state(folder / stale)]:
            warn(line)
    if world() > 1:
        dist.barrier()  # nobody looks for a run to resume before it is gone
    if (folder / LAST).exists():
        output().print(f"going on with {folder / LAST}; --force starts anew")
    name = info.get("model", type(model).__name__)
    model.to(device)
    with advancing(f"fine-tuning {name} on {data.name}") as advance, asked_to_stop() as stop:

        def progress(now: Progress) -> None:
            stop()
            top1 = "" if now.top1 is None else f", top-1 {now.top1:.2%}"
            line = f"epoch {now.epoch + 1}/{now.epochs}: loss {now.loss:.4f}{top1}, {now.images_per_second:,.0f} images/s"
            advance(now.share, line)

        def after_epoch(done: Epoch) -> None:
            advance((done.epoch + 1) / settings.epochs, describe_epoch(done, settings.epochs), lasting=True)

        run: dict[str, Any] = {"config": config, "teacher": teacher, "about": about}
        result = finetune(model, data, settings=settings, folder=folder, progress=progress, after_epoch=after_epoch, **run)
    save_epochs(model, result, folder, info)
    best = _check(folder / MODEL, model, data, config, settings, device)
    _show(model, result, best, folder)
    if found is not None and not args.start and args.weights is None:
        found.warn()
    if found is not None and not args.out:
        hint(
            (found.command("evaluate", *work.data_options(args)), "what it scores"),
            (found.command("export", scheme=args.scheme if args.scheme != "dense" else None), "write it out"),
        )


def _settings(args: Namespace) -> Settings:
    return Settings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        warmup_epochs=args.warmup_epochs,
        opt=args.opt,
        sched=args.sched,
        smoothing=args.smoothing,
        amp=args.amp,
        channels_last=args.channels_last,
        accumulate=args.accumulate,
        compile=args.compile or "",
        parallel="fsdp" if args.fsdp else "ddp",
        ema=args.ema,
        clip_grad=args.clip_grad,
        distill=args.distill,
        temperature=args.temperature,
        seed=args.seed,
        augment=Augment(on=not args.no_augment, mixup=args.mixup, cutmix=args.cutmix),
        workers=args.workers,
        save_seconds=args.save_seconds,
        tensorboard=args.tensorboard,
    )


def _model(args: Namespace, found: work.Work | None) -> tuple[nn.Module, dict[str, str]]:
    """The converted model to train, and what its checkpoint says of its origin."""
    if args.start and args.weights:
        raise NmfxError("give --from or --weights, not both")
    if args.start:
        with working(f"loading {args.start}"):
            model = load_checkpoint(args.start)
        info = {"weights": f"fine-tuned from {Path(args.start).name}"}
        if args.scheme is None:
            set_training(model, args.training, args.decay)
            return model, info | ({"model": found.model} if found else {})
    else:
        assert found is not None
        model = found.load() if args.weights is None else build_random(found.source, args.seed)
        info = {"model": found.model, "weights": f"fine-tuned from {found.weights if args.weights is None else 'random'}"}
    if args.scheme == "dense":
        return model, info
    path = Path(args.scheme) if args.scheme else found.scheme_path if found else Path()
    if not path.is_file():
        where = f"; run `nmfx search {shlex.quote(str(found.path))}`" if found and not args.scheme else ""
        raise NmfxError(f"{path}: no scheme there{where}, or give --scheme FILE (--scheme dense trains without one)")
    with working("finding the sites"):
        sites = found.sites(model) if found else find_sites(model, work.example_of(model, None))
    scheme = Scheme.load(path, sites)
    transform(model, scheme, sites=sites, training=args.training, decay=args.decay, inplace=True)
    return model, {key: value for key, value in scheme.info.items() if key in INFO} | info


def _teacher(args: Namespace, found: work.Work | None) -> nn.Module | None:
    if not args.distill:
        return None
    if found is None or found.weights == "random":
        raise NmfxError("--distill learns from the dense weights of a work directory: name one that has them")
    return found.load()


def _check(path: Path, model: nn.Module, data: Data, config: PictureConfig, settings: Settings, device: str) -> Evaluation:
    """What is on disk scores as what was trained, digit for digit: that score."""
    if world() > 1:
        dist.barrier()  # it has been written
    size = settings.pictures_a_pass(world())
    with working(f"evaluating {path}"):
        batches = validation_loader(data, config, batch_size=size, workers=settings.workers)
        trained, found = evaluate(model, batches), evaluate(load_checkpoint(path).to(device), batches)
    if found != trained:
        raise NmfxError(f"{path}: evaluates as {found}, the trained model as {trained}; do not use it")
    return found


def _show(model: nn.Module, result: Finetuned, best: Evaluation, folder: Path) -> None:
    out, end, epochs = output(), result.evaluation, len(result.epochs)
    for which, one, name in ((f"best, epoch {result.best.epoch + 1} of {epochs}", best, MODEL), ("last", end, TUNED["last"])):
        scores = f"top-1 {one.top1:.2%}, top-5 {one.top5:.2%}, loss {one.loss:.4f} on {one.samples:,} validation pictures"
        out.print(f"{which}: {scores} ({name})", soft_wrap=True)
    if len(scheme_of(model)):
        checked = verify(model)
        out.print(f"verified: {checked}", soft_wrap=True)
    out.print(f"verified: {folder / MODEL}, loaded again, evaluates the same to the last digit", soft_wrap=True)
    out.print(f"wrote {', '.join(str(folder / name) for name in (*TUNED.values(), BEST, LAST, LOG))}", soft_wrap=True)
