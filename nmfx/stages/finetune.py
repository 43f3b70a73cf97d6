"""The finetune stage: a work directory's model, or a compressed checkpoint, trained under its scheme."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nmfx.data.loader import Batch, validation_loader
from nmfx.data.sample import few_pictures
from nmfx.data.source import Data
from nmfx.errors import NmfxError
from nmfx.export.checkpoint import load_checkpoint, save_checkpoint
from nmfx.files.atomic import check_writable
from nmfx.masking.copies import deep_copy
from nmfx.models.building import build_random
from nmfx.models.census import find_sites
from nmfx.passes.transform import transform
from nmfx.processes import rank, world
from nmfx.progress import Progress, silent
from nmfx.scheme import INFO, Scheme
from nmfx.settings.stages import DataSettings, FinetuneSettings
from nmfx.settings.training import Settings
from nmfx.sparsity.score import SCORES
from nmfx.stages.data import PICTURES, fit_pictures, open_pictures, sample
from nmfx.stages.epochs import TUNED, describe_epoch, save_epochs
from nmfx.stages.work import WorkDirectory, check_free, example_of
from nmfx.stages.written import remove_state
from nmfx.training.evaluation import Evaluation, evaluate
from nmfx.training.finetuning import finetune as train
from nmfx.training.masks import set_training
from nmfx.training.record import Epoch, Finetuned
from nmfx.training.record import Progress as Now
from nmfx.training.state import fingerprint
from nmfx.training.trainer import BEST, LAST, LOG, AnsweredBy, epochs_within, planned_epochs

LINES = 20  # that last, of epochs of a distillation, which has hundreds
FILES = (*TUNED.values(), LAST, BEST, LOG)  # what the stage writes into its folder


@dataclass(frozen=True)
class Origin:
    """What training starts from: a work directory's dense weights under its scheme, unless told otherwise.

    Attributes:
        checkpoint: a compressed checkpoint instead.
        scheme: another scheme file; ``dense`` trains without one.
    """

    work: WorkDirectory | None
    checkpoint: Path | None = None
    scheme: str = ""

    @property
    def size(self) -> tuple[int, ...] | None:
        """The input size that the work directory was made with."""
        return self.work.input_size if self.work else None


def make_room(folder: Path, *, force: bool) -> list[str]:
    """Make sure that a run can be written to `folder`; with `force` one of before goes, and what is not ours gets another name.

    Returns:
        A line for each file that was renamed.

    Raises:
        NmfxError: the folder cannot be written to, or holds files that are no run to go on with.
    """
    check_writable(folder, FILES)
    if not (folder / LAST).exists():  # no run to go on with, so whatever is there is something else
        check_free([folder / name for name in (*TUNED.values(), BEST, LOG)], force=force)
    return [line for name in FILES for line in remove_state(folder / name)] if force else []


@dataclass(frozen=True)
class FinetuneRecord:
    """What the finetune stage did: the model holds the best epoch, as its checkpoint does, which scores `best`."""

    model: nn.Module = field(repr=False)
    result: Finetuned
    best: Evaluation
    folder: Path
    notes: list[str]
    kept: bool = False  # the weights before a distillation, which came no nearer


def finetune(
    origin: Origin,
    settings: FinetuneSettings,
    pictures: DataSettings,
    folder: Path,
    *,
    device: str = "cpu",
    make_way: Callable[[Iterable[str]], list[str]] = lambda names: [],
    progress: Progress = silent,
) -> FinetuneRecord:
    """Train, or go on with a run that was stopped in `folder`, and write the best and the last epoch; every process calls it.

    Args:
        origin: the work directory or checkpoint to start from, and the scheme.
        settings: of training and of the masks.
        pictures: to train on and to evaluate every epoch with.
        folder: where the checkpoints, the state to resume from and the log go.
        device: where the model trains.
        progress: told of every update, and with ``lasting`` of every epoch.
        make_way: told the names of the checkpoints in `folder` before they are written; its lines become notes.

    Returns:
        The model as its best epoch left it, with that checkpoint's score.

    Raises:
        NmfxError: nothing to start from, a folder that cannot be written, pictures that do not fit, a run of other settings.
    """
    training = replace(settings.settings, workers=pictures.workers)
    if training.distill_only:
        origin = _corrected(origin)
    if rank() == 0:
        check_writable(folder, FILES)  # before hours are spent
    labels = not training.distill_only
    data, training = _pictures(settings, pictures, training)
    model, info = _model(origin, settings, data)
    teacher = _teacher(origin) if training.distill or training.distill_only else None
    about = {"weights before": fingerprint(model)}
    config = fit_pictures(data, model, origin.size, labels=labels)

    if settings.minutes is not None:
        planned = planned_epochs(folder)
        if planned is None:
            progress(0.0, "timing some updates")
            seconds, teacher = 60 * settings.minutes, teacher and teacher.to(device)
            planned = epochs_within(seconds, model.to(device), data, training, config, teacher)
        training = replace(training, epochs=planned)
    if training.distill_only and isinstance(data.train, Sized):
        training = training.at_rate_of(len(data.train))

    size = training.pictures_a_pass(world())
    batches: Iterable[Batch] = validation_loader(data, config, batch_size=size, workers=training.workers)
    start = None
    if teacher is not None and training.distill_only:
        batches = AnsweredBy(teacher.to(device), batches, torch.device(device))
        start = deep_copy(model), evaluate(model.to(device), batches).loss

    def during(now: Now) -> None:
        top1 = "" if now.top1 is None else f", top-1 {now.top1:.2%}"
        line = f"epoch {now.epoch + 1}/{now.epochs}: loss {now.loss:.4f}{top1}, {now.images_per_second:,.0f} images/s"
        progress(now.share, line)

    def after(done: Epoch) -> None:
        lasting = labels or (done.epoch + 1) * LINES // training.epochs > done.epoch * LINES // training.epochs
        line = describe_epoch(done, training.epochs, distilled=training.distill_only)
        progress((done.epoch + 1) / training.epochs, line, lasting=lasting)

    result = train(
        model.to(device), data, settings=training, folder=folder, config=config, teacher=teacher, about=about,
        progress=during, after_epoch=after,
    )  # fmt: skip
    notes = make_way(TUNED.values()) if rank() == 0 else []
    save_epochs(model, result, folder, info)
    kept = start is not None and start[1] <= result.best.loss
    if start is not None and kept:
        model.load_state_dict(start[0].state_dict())
        losses = f"loss {start[1]:.4f} before, {result.best.loss:.4f} after"
        notes.append(f"distillation came no nearer to dense on held-back pictures ({losses}): the weights before it are kept")
        if rank() == 0:
            save_checkpoint(model, folder / TUNED["best"], info=info | {"weights": f"{info['weights']}, which is kept"})
    if world() > 1:
        dist.barrier()  # it has been written
    if training.distill_only and origin.checkpoint is None:
        notes.append("it started from masked weights as they are; `nmfx correct` before it brings more")
    return FinetuneRecord(model, result, _check(folder / TUNED["best"], model, batches, device), folder, notes, kept)


def _pictures(settings: FinetuneSettings, pictures: DataSettings, training: Settings) -> tuple[Data, Settings]:
    """What to train and to evaluate on; a distillation's batches are not larger than its few pictures."""
    only = training.distill_only
    data, count = open_pictures(pictures, labels=not only), settings.pictures
    if only and count is None and isinstance(data.train, Sized):
        count = min(PICTURES, len(data.train))
    data = few_pictures(data, count, seed=training.seed, hold_back=only)
    if only and isinstance(data.train, Sized):
        step = 2 * world() * training.accumulate  # pictures are mixed in pairs
        training = replace(training, batch_size=min(training.batch_size, max(step, len(data.train) // step * step)))
    return data, training


def _model(origin: Origin, settings: FinetuneSettings, data: Data) -> tuple[nn.Module, dict[str, str]]:
    """The converted model to train, and what its checkpoint says of its origin."""
    work, random = origin.work, settings.weights == "none"
    trained = "distilled" if settings.settings.distill_only else "fine-tuned"
    if origin.checkpoint is not None:
        model = load_checkpoint(origin.checkpoint)
        info = {"weights": f"{trained} from {origin.checkpoint.name}"}
        if not origin.scheme:  # its masks keep their score
            set_training(model, settings.training, settings.decay)
            return model, info | ({"model": work.model} if work else {})
    else:
        if work is None:
            raise NmfxError("nothing to train: give a work directory or a compressed checkpoint")
        model = build_random(work.source, settings.settings.seed) if random else work.load()
        info = {"model": work.model, "weights": f"{trained} from {'random' if random else work.weights}"}
    if origin.scheme == "dense":
        return model, info
    path = Path(origin.scheme) if origin.scheme else work.scheme_path if work else Path()
    if not path.is_file():
        where = f"; run `nmfx search {shlex.quote(str(work.path))}`" if work and not origin.scheme else ""
        raise NmfxError(f"{path}: no scheme there{where}, or give --scheme FILE (--scheme dense trains without one)")
    sites = work.sites(model) if work else find_sites(model, example_of(model, None))
    scheme = Scheme.load(path, sites)
    looks = SCORES[settings.score].needs != "nothing"
    seen = sample(data, model, origin.size, seed=settings.settings.seed) if looks else None
    how: dict[str, Any] = {"training": settings.training, "decay": settings.decay, "score": settings.score, "data": seen}
    transform(model, scheme, sites=sites, **how, inplace=True)
    said = {} if settings.score == "magnitude" else {"score": settings.score}
    return model, {key: value for key, value in scheme.info.items() if key in INFO} | said | info


def _corrected(origin: Origin) -> Origin:
    """The same, from the work directory's corrected weights if there are any under its scheme."""
    work = origin.work
    if work is None or origin.checkpoint is not None or origin.scheme or not work.scheme_path.is_file():
        return origin
    found = work.finished(work.scheme(work.sites(work.build_meta())), stages=("correct",))[0]
    return origin if found is None else replace(origin, checkpoint=found.path)


def _teacher(origin: Origin) -> nn.Module:
    if origin.work is None or origin.work.random:
        raise NmfxError("distill learns from the dense weights of a work directory, and here are none: give the model some")
    return origin.work.load()


def _check(path: Path, model: nn.Module, batches: Iterable[Batch], device: str) -> Evaluation:
    """What is on disk scores as what was trained, digit for digit: that score.

    Both are evaluated here, though training has evaluated every epoch: it is the only proof that the file alone, rebuilt in a
    new model by its name and arguments, answers as the trained model does.
    """
    trained, found = evaluate(model, batches), evaluate(load_checkpoint(path).to(device), batches)
    if found != trained:
        raise NmfxError(f"{path}: evaluates as {found}, the trained model as {trained}; do not use it")
    return found
