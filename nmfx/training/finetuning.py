"""finetune: train a converted (or dense) classifier on pictures, resumable bit for bit, in one process or several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from nmfx.data.config import PictureConfig
from nmfx.data.source import Data
from nmfx.errors import NmfxError
from nmfx.masking.modes import keep_modes
from nmfx.processes import rank, world
from nmfx.settings.training import Settings
from nmfx.training.masks import describe
from nmfx.training.record import Board, Epoch, Finetuned, Progress
from nmfx.training.trainer import Run


def finetune(
    model: nn.Module,
    data: Data,
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    folder: Path | None = None,
    config: PictureConfig | None = None,
    teacher: nn.Module | None = None,
    about: Mapping[str, str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
) -> Finetuned:
    """Train `model` in place, on its device, and leave it in eval mode; how its masks train was said to `transform`.

    The model is left as the last epoch made it; `load_best` takes the weights of the best one, which is the first of those with
    the highest top-1.

    Args:
        data: training and validation pictures (see `nmfx.open_data`).
        settings: everything that decides which weights come out.
        folder: where to keep ``last.safetensors``, ``best.safetensors`` and ``log.csv``; that they can be written is tried
            first. The same call with the same folder goes on where the last save was, and ends with the same weights as a run
            without a stop; the weights that `model` comes with then do not matter. With more epochs than before, the run is
            extended: it goes on from its last state at the learning rate that the longer schedule has at that place (a cosine
            that had come down starts again from the longer one's height).
        config: how pictures are brought to the model; found as `picture_config` does when None.
        teacher: the dense model to distil from, when the settings say so; it is moved to the model's device.
        about: what else has to agree for a run to be resumed, such as where the weights came from.
        progress: called after every update; a KeyboardInterrupt that it raises within an epoch leaves a save behind.
        after_epoch: called with the line of the log, once an epoch is evaluated and saved.

    Under torch.distributed, started by the caller, every process takes its share of each batch and only the first one writes.
    With ``parallel="fsdp"`` a copy is trained whose weights, gradients, optimiser state and moving average are shared out
    (`fully_shard`); `model` itself stays whole in every process, for evaluation and to take the trained weights.
    SR-STE's pull is part of the update, once, in any number of processes and passes. Batch
    statistics are those of each process's share, averaged after every epoch: networks that have them score within 2 points.

    Returns:
        Accuracy of the trained model, and the line of the log of every epoch.

    Raises:
        NmfxError: settings that do not go together, a loss that is not finite (the files are those of the last save).
        CheckpointError: the folder is of a run with other settings.
        DataError: pictures that cannot be read, or of other classes than the model's.
    """
    learns = settings.distill > 0 or settings.distill_only
    teacher = teacher if learns else None
    if learns and teacher is None:
        raise NmfxError("distillation needs the dense model: give finetune(..., teacher=...)")
    identity = settings.identity() | describe(model) | {"data": str(data), "processes": world()} | dict(about or {})
    with contextlib.ExitStack() as stack:
        if teacher is not None:
            stack.enter_context(keep_modes(teacher))
            teacher.to(next(model.parameters()).device).eval()
        run = Run(model, data, settings, folder, config, teacher, identity)
        board = folder / "tensorboard" if folder and settings.tensorboard and rank() == 0 else None
        with Board(board, start=run.at.epoch) as tensorboard:
            while run.at.epoch < settings.epochs:
                run.train_epoch(progress)
                done = run.end_epoch()
                tensorboard.add(done)
                if after_epoch is not None:
                    after_epoch(done)
    return run.conclude()
