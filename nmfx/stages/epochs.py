"""What a fine-tuning run leaves: its best epoch and its last one, as compressed checkpoints that say which they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import nn

from nmfx.errors import CheckpointError
from nmfx.export.checkpoint import save_checkpoint
from nmfx.processes import rank, world
from nmfx.training.record import Epoch, Finetuned
from nmfx.training.trainer import BEST, load_best

TUNED = {"best": "model.safetensors", "last": "model.last.safetensors"}  # by epoch: the names of their files


def save_epochs(model: nn.Module, result: Finetuned, folder: Path, info: Mapping[str, str]) -> None:
    """Write `model` as the last epoch left it, and then, left in it, the best one; every process has to call it.

    Args:
        info: of the checkpoints; to what it says of the weights, the epoch is added.

    Raises:
        CheckpointError: what the run kept is not its best epoch.
    """
    epochs, best = len(result.epochs), result.best
    if rank() == 0:
        save_checkpoint(model, folder / TUNED["last"], info=_with_epoch(info, epochs, epochs, "the last"))
    if best.epoch + 1 < epochs:
        if world() > 1:
            dist.barrier()
        found = load_best(folder, model)
        if (found.epoch, found.top1) != (best.epoch, best.top1):
            raise CheckpointError(f"{folder / BEST}: holds epoch {found.epoch + 1}, but the best was {best.epoch + 1}")
    if rank() == 0:
        save_checkpoint(model, folder / TUNED["best"], info=_with_epoch(info, best.epoch + 1, epochs, "the best"))


def describe_epoch(epoch: Epoch, epochs: int, *, distilled: bool = False) -> str:
    """A line of the log, for people; of a run that is `distilled` without labels."""
    scores = f"top-1 {epoch.top1:.2%}, top-5 {epoch.top5:.2%}"
    if distilled:
        scores = f"agreement with dense {epoch.top1:.2%}, loss to its answers {epoch.loss:.4f}"
    return f"epoch {epoch.epoch + 1}/{epochs}: loss {epoch.train_loss:.4f}, {scores}, {epoch.images_per_second:,.0f} images/s"


def _with_epoch(info: Mapping[str, str], epoch: int, epochs: int, which: str) -> dict[str, str]:
    return {**info, "weights": f"{info['weights']} (epoch {epoch} of {epochs}, {which})"}
