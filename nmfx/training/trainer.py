"""A training run: its updates, its epochs, and its files, in one process or several."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from nmfx.data.config import PictureConfig, check_classes, picture_config
from nmfx.data.loader import train_loader, validation_loader
from nmfx.data.seeding import seed_of
from nmfx.data.source import Data
from nmfx.errors import CheckpointError, DataError, NmfxError
from nmfx.files.atomic import check_writable
from nmfx.files.drafts import remove_dead_drafts
from nmfx.files.sealed import Tensors
from nmfx.files.states import prefixed, under
from nmfx.masking.copies import deep_copy
from nmfx.masking.parallel import find_units, gathered, shard, wrap
from nmfx.masking.sites import masked_sites, recheck_weights
from nmfx.passes.statistics import batch_norms
from nmfx.processes import rank, summed, world
from nmfx.settings.training import Settings
from nmfx.training.evaluation import evaluate
from nmfx.training.loss import distilled, logits_of, task_loss
from nmfx.training.masks import frozen_masks
from nmfx.training.optimizer import check_optimizer, make_optimizer, optimizer_state, restore_optimizer
from nmfx.training.record import Epoch, Finetuned, Position, Progress, write_log
from nmfx.training.state import SavedEpoch, SavedRun, check_fits, check_identity, load_into, load_state, save_state

REHEARSED, LONG = 3, 5.0  # updates that are timed, the first of which is slow; seconds after which no other is
LAST, BEST, LOG = "last.safetensors", "best.safetensors", "log.csv"


class Run:
    """One run: the model, what trains it, and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: Settings,
        folder: Path | None,
        config: PictureConfig | None,
        teacher: nn.Module | None,
        identity: Mapping[str, Any],
    ) -> None:
        if not settings.distill_only:
            check_classes(data, model)
        if folder is not None and rank() == 0:
            whole = sum(value.numel() * value.element_size() for value in model.state_dict().values())
            check_writable(folder, (LAST, BEST, LOG), size=whole * (3 if settings.ema else 2))  # and the optimiser's on top
        if not isinstance(data.validation, IterableDataset) and not len(data.validation):
            raise DataError(f"{data.name}: there are no validation pictures, so that no epoch could be evaluated")
        self.model, self.settings, self.folder, self.teacher, self.identity = model, settings, folder, teacher, identity
        self.original = model  # under FSDP `model` is a copy that is shared out
        self.device, self.at = next(model.parameters()).device, Position()
        self.saved = time.perf_counter()
        self.lr = self.speed = 0.0  # of the last update, and pictures a second of this epoch
        config, size = config or picture_config(model, data), settings.pictures_a_pass(world())
        same = {"workers": settings.workers, "batch_size": size}
        self.loader = train_loader(data, config, augment=settings.mixed_augment, seed=settings.seed, **same)  # type: ignore
        self.validation: Iterable[tuple[Tensor, Tensor]] = validation_loader(data, config, **same)  # type: ignore[arg-type]
        if settings.distill_only and teacher is not None:
            self.validation = AnsweredBy(teacher, self.validation, self.device)
        self.steps = len(self.loader) // settings.accumulate
        if not self.steps:
            raise NmfxError(f"{data.name}: too few pictures for one batch of {settings.batch_size}; take smaller batches")
        self.sharded = settings.parallel == "fsdp" and world() > 1
        if settings.channels_last and not self.sharded:  # FSDP wants contiguous weights
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.sharded:
            self.model = deep_copy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.ema = ModelEmaV3(self.model, settings.ema, use_warmup=True, foreach=not self.sharded) if settings.ema else None
        if self.sharded:
            picture = torch.zeros(1, *config.input_size, device=self.device)
            for each in self.trained:
                shard(each, find_units(each, picture))
        self.optimizer, self.scheduler = make_optimizer(self.model, settings, self.steps)
        if folder is not None:
            self._resume(folder)
            if int(summed(torch.tensor(self.t, device=self.device))) != self.t * world():
                raise CheckpointError(f"{folder}: not every process sees the same {LAST}; use a folder that all of them share")
        self.parallel = self.model if self.sharded else wrap(model)
        self.forward = torch.compile(self.parallel, backend=settings.compile) if settings.compile else self.parallel
        self._schedule()

    @property
    def t(self) -> int:
        """Updates done since the start of the first epoch."""
        return self.at.epoch * self.steps + self.at.step

    @property
    def trained(self) -> list[nn.Module]:
        """What changes in training: the model, and its moving average where there is one."""
        return [self.model] if self.ema is None else [self.model, self.ema.module]

    def evaluated(self) -> nn.Module:
        """The weights that count, whole in every process: the moving average where there is one."""
        own = self.trained[-1]
        if not self.sharded:
            return own
        self.original.load_state_dict(gathered(own.state_dict()))
        return self.original

    def train_epoch(self, progress: Callable[[Progress], None] | None) -> None:
        """The rest of an epoch's updates, with a save every few minutes."""
        self.model.train()
        if self.settings.freeze_bn:
            for norm in batch_norms(self.model).values():
                norm.eval()
        self.loader.set_epoch(self.at.epoch, skip=self.at.step * self.settings.accumulate)
        batches, first, start = iter(self.loader), self.at.step, time.perf_counter()
        for step in range(first, self.steps):
            self.at.loss += self.update(batches)
            self.at.step = step + 1
            now = time.perf_counter()
            self.speed = (step + 1 - first) * self.settings.batch_size / (now - start)
            more = step + 1 < self.steps  # the last one is saved with its evaluation
            if self._anyone(now - self.saved > self.settings.save_seconds) and more:
                self.save()
            stop = False
            if progress is not None:
                loss, lr, top1 = self.at.loss / self.at.step, self.lr, self.at.top1
                try:
                    progress(Progress(self.at.epoch, self.settings.epochs, step, self.steps, loss, lr, self.speed, top1))
                except KeyboardInterrupt:  # between two updates: nothing is half done
                    stop = True
            if self._anyone(stop):
                if more:
                    self.save()
                raise KeyboardInterrupt

    def _anyone(self, asks: bool) -> bool:
        """Whether any process asks for something that all have to do at the same update: clocks and signals differ."""
        return asks if world() == 1 else bool(summed(torch.tensor(int(asks), device=self.device)))

    def update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """One update of the weights; the mean loss over all passes and processes.

        Raises:
            NmfxError: the loss is not finite; the weights are those before.
        """
        passes = self.settings.accumulate
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for index, (x, label) in enumerate(itertools.islice(batches, passes)):
            key = ("finetune", self.settings.seed, rank(), self.t, index)
            torch.manual_seed(seed_of(*key))  # dropout: the same after a resume
            with self._alone() if index + 1 < passes else contextlib.nullcontext():
                loss = self._loss(x.to(self.device), label.to(self.device)) / passes
                loss.backward()
            total += loss.detach()
        mean = float(summed(total)) / world()
        if not abs(mean) < float("inf"):
            kept = f"; {self.folder} holds the last good state" if self.folder and (self.folder / LAST).exists() else ""
            raise NmfxError(
                f"the loss is {mean} in epoch {self.at.epoch}, at update {self.t}: lower lr ({self.settings.lr}), or limit the "
                f"gradient with clip_grad{kept}"
            )
        if self.settings.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.optimizer.step()
        self._schedule(1)
        if self.ema is not None:
            self.ema.update(self.model, step=self.t + 1)
        return mean

    def _loss(self, x: Tensor, label: Tensor) -> Tensor:
        if self.settings.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"):
            outputs, answers = self.forward(x), None
            if self.teacher is not None:
                with torch.no_grad():
                    answers = logits_of(self.teacher(x))
        if answers is not None and self.settings.distill_only:  # labels may be none of the model's classes
            return distilled(answers.new_zeros(()), outputs, answers, self.settings)
        loss = task_loss(outputs, label, self.settings.smoothing)
        return loss if answers is None else distilled(loss, outputs, answers, self.settings)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Gradients stay in this process until the last pass of an update."""
        ddp = isinstance(self.parallel, DistributedDataParallel)
        return self.parallel.no_sync() if ddp else contextlib.nullcontext()  # type: ignore

    def _schedule(self, after: int = 0) -> None:
        if self.scheduler is not None:
            self.scheduler.step_update(self.t + after)

    def end_epoch(self) -> Epoch:
        """Evaluate, add a line to the log, save, and move on to the next epoch."""
        if world() > 1:  # each process has seen its own pictures
            distribute_bn(self.model, world(), reduce=True)
            if self.ema is not None:
                distribute_bn(self.ema.module, world(), reduce=False)
        evaluated = self.evaluated()
        recheck_weights(evaluated)
        found = evaluate(evaluated, self.validation)
        loss = self.at.loss / self.steps
        row = Epoch(self.at.epoch, loss, found.top1, found.top5, found.loss, self.lr, self.speed)
        best = max((epoch.top1 for epoch in self.at.log), default=-1.0)
        self.at = Position(self.at.epoch + 1, log=[*self.at.log, row])
        last = self.at.epoch == self.settings.epochs
        if last if self.settings.distill_only else row.top1 > best:
            self._save_best(evaluated)  # before the other, which says that it is there
        due = not self.settings.distill_only or time.perf_counter() - self.saved > self.settings.save_seconds
        if last or self._anyone(due):  # epochs over few pictures end every few seconds
            self.save()
        if self.folder is not None and rank() == 0:
            write_log(self.folder / LOG, self.at.log)
        return row

    def save(self) -> None:
        """Write the whole run; every process has to call it."""
        self.saved = time.perf_counter()
        if self.folder is None:
            return
        optimizer, numbers = optimizer_state(self.optimizer)
        tensors = prefixed("model", self.model.state_dict()) | prefixed("optimizer", optimizer)
        tensors |= prefixed("ema", self.ema.module.state_dict()) if self.ema is not None else {}
        tensors = gathered(tensors, everywhere=False) | prefixed("mask", frozen_masks(self.original))
        if rank() == 0:
            save_state(self.folder / LAST, tensors, {"identity": self.identity, "at": asdict(self.at), "optimizer": numbers})

    def _save_best(self, evaluated: nn.Module) -> None:
        if self.folder is not None and rank() == 0:
            save_state(self.folder / BEST, evaluated.state_dict(), asdict(self.at.log[-1]))

    def _resume(self, folder: Path) -> None:
        path = folder / LAST
        if rank() == 0:
            remove_dead_drafts(folder)
        if not path.exists():
            return
        tensors, about = load_state(path, SavedRun)
        check_identity(path, _extended(about.identity, self.settings.epochs), self.identity)
        self._check(tensors, about, path)
        restore_optimizer(self.optimizer, under("optimizer", tensors), about.optimizer, path)
        load_into(self.model, under("model", tensors), path)
        if self.ema is not None:
            load_into(self.ema.module, under("ema", tensors), path)
        masks = under("mask", tensors)
        for model in (*self.trained, *([self.original] if self.sharded else [])):
            for site in masked_sites(model):
                if site.name in masks:
                    site.mask.copy_(masks[site.name])
            recheck_weights(model)
        at = about.at
        self.at = Position(at.epoch, at.step, at.loss, [row.value for row in at.log])
        if rank() == 0 and self.at.log:
            write_log(folder / LOG, self.at.log)

    def _check(self, tensors: Tensors, about: SavedRun, path: Path) -> None:
        """Raise CheckpointError, before anything is changed, if a state is not of this run."""
        if about.at.epoch > self.settings.epochs or about.at.step > self.steps or len(about.at.log) != about.at.epoch:
            raise CheckpointError(f"{path}: stands at epoch {about.at.epoch}, update {about.at.step}, where this run has none")
        check_fits(self.model, under("model", tensors), path)
        if self.ema is not None:
            check_fits(self.ema.module, under("ema", tensors), path)
        check_optimizer(self.optimizer, under("optimizer", tensors), about.optimizer, path)
        expected, masks = frozen_masks(self.original), under("mask", tensors)
        if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in masks.items() if v.dtype == torch.bool}:
            raise CheckpointError(f"{path}: its masks are not those of this run's sites")

    def conclude(self) -> Finetuned:
        """The trained weights in the model, in eval mode and plain memory format, evaluated as they will be loaded."""
        evaluated = self.evaluated()
        if evaluated is not self.original:
            self.original.load_state_dict(evaluated.state_dict())
        if self.settings.channels_last:
            self.original.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.optimizer.zero_grad()
        self.original.eval()
        recheck_weights(self.original)
        return Finetuned(evaluate(self.original, self.validation), tuple(self.at.log), self.settings.distill_only)


class AnsweredBy:
    """Batches whose labels are what a teacher makes of them: shares of classes, found on the first pass."""

    def __init__(self, teacher: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> None:
        self.teacher, self.batches, self.device = teacher, batches, device
        self.answers: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, (x, _) in enumerate(self.batches):
            if index == len(self.answers):
                with torch.no_grad():
                    self.answers.append(logits_of(self.teacher(x.to(self.device))).softmax(1))
            yield x, self.answers[index]


def epochs_within(
    seconds: float,
    model: nn.Module,
    data: Data,
    settings: Settings,
    config: PictureConfig | None = None,
    teacher: nn.Module | None = None,
) -> int:
    """How many epochs of `settings` fit in so many seconds, at least 1, by the time of some updates of a copy of `model`.

    Args:
        model, data, settings, config, teacher: as `finetune` takes them.

    Returns:
        The same in every process.

    Raises:
        NmfxError: as `finetune`.
    """
    one = replace(settings, epochs=1, warmup_epochs=0.0, compile="", ema=0.0)
    run = Run(deep_copy(model), data, one, None, config, teacher, {})
    run.model.train()
    batches, times = iter(run.loader), list[float]()
    for _ in range(min(run.steps, REHEARSED)):
        start = time.perf_counter()
        run.update(batches)
        times.append(time.perf_counter() - start)
        if sum(times) > LONG:
            break
    start = time.perf_counter()
    evaluate(run.evaluated(), run.validation)
    epoch = min(times) * run.steps + time.perf_counter() - start
    slowest = float(summed(torch.tensor(epoch, device=run.device))) / world()
    return max(1, int(seconds / slowest))


def planned_epochs(folder: Path) -> int | None:
    """Of the run in a folder that can go on; None where there is none."""
    if not (folder / LAST).exists():
        return None
    epochs = load_state(folder / LAST, SavedRun)[1].identity.get("epochs")
    return epochs if isinstance(epochs, int) and epochs > 0 else None


def _extended(identity: Mapping[str, Any], epochs: int) -> Mapping[str, Any]:
    """The identity of a run on disk if it had been asked for these epochs: more are no other run, fewer are."""
    before = identity.get("epochs")
    return {**identity, "epochs": epochs} if isinstance(before, int) and before < epochs else identity


def load_best(folder: Path, model: nn.Module) -> Epoch:
    """Load the weights of the best epoch into the model that was trained, or a copy; says which epoch it was."""
    tensors, about = load_state(folder / BEST, SavedEpoch)
    load_into(model, tensors, folder / BEST)
    recheck_weights(model)
    return about.value
