"""The pictures of a job, fit for its model."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn

from nmfx.data.config import PictureConfig, check_classes, picture_config
from nmfx.data.sample import calibration
from nmfx.data.source import Data, open_data
from nmfx.errors import NmfxError
from nmfx.settings.stages import FOLDER, CorrectSettings, DataSettings, PrecisionSettings, RecalibrateSettings


def open_pictures(settings: DataSettings | None, *, labels: bool = True) -> Data:
    """The pictures that settings name; for what needs no `labels`, also a folder without class folders.

    Raises:
        NmfxError: there are none, or they are an image folder and nobody has said which.
    """
    if settings is None:
        raise NmfxError("this needs pictures: say which with --data, or in the recipe's data section")
    if settings.name == FOLDER and not settings.root:
        raise NmfxError("the recipe wants an image folder: say which, with --data-root DIR (DIR/train and DIR/val)")
    name, root = (settings.root, None) if settings.name == FOLDER else (settings.name, settings.root or None)
    splits = {"train_split": settings.train_split, "val_split": settings.val_split}
    return open_data(name, root=root, held_back=settings.held_back, download=settings.download, labels=labels, **splits)  # type: ignore


def fit_pictures(data: Data, model: nn.Module, input_size: tuple[int, ...] | None, *, labels: bool = True) -> PictureConfig:
    """How pictures are brought to a model, of `input_size` or as it says.

    Raises:
        NmfxError: the model answers for another number of classes, and `labels` count.
    """
    if labels:
        check_classes(data, model)
    size = input_size if input_size is not None and len(input_size) == 3 else None
    return picture_config(model, data, input_size=size)


PICTURES = 512  # looked at without training, unless told otherwise: more change little


def sample_for(
    settings: CorrectSettings | RecalibrateSettings,
    pictures: DataSettings,
    model: nn.Module,
    input_size: tuple[int, ...] | None,
    *,
    least: int,
) -> tuple[str, int, list[tuple[Tensor, Tensor]]]:
    """The training pictures that a stage without training looks at.

    Args:
        settings: how many, in batches of which size, and which.
        pictures: where they are.
        model, input_size: what they are brought to.
        least: how many batches there have to be, however few the pictures.

    Returns:
        What the data are called, how many pictures were taken, and the batches.

    Raises:
        NmfxError: no such pictures, fewer than are asked for, or of other classes than the model's.
    """
    data = open_pictures(pictures, labels=False)
    count = settings.pictures or _at_most(PICTURES, data)
    size = min(settings.batch_size, max(1, count // least))
    how = {"count": count, "batch_size": size, "seed": settings.seed, "workers": pictures.workers}
    return data.name, count, sample(data, model, input_size, labels=False, **how)


def _at_most(count: int, data: Data) -> int:
    """So many training pictures, or all where there are fewer."""
    return min(count, len(data.train)) if isinstance(data.train, Sized) else count


def calibration_for(
    settings: PrecisionSettings, pictures: DataSettings | None, model: nn.Module, input_size: tuple[int, ...] | None
) -> Tensor | None:
    """The pictures that int8 chooses its ranges by, ``(pictures, channels, height, width)``; None in float32.

    Raises:
        NmfxError: no such pictures.
    """
    if settings.precision == "float32":
        return None
    if pictures is None:
        raise NmfxError("int8 looks at pictures: say which with --data")
    data = open_pictures(pictures, labels=False)
    count = _at_most(settings.calibrate, data)
    how = {"count": count, "batch_size": count, "seed": 0, "workers": pictures.workers}
    return torch.cat([batch for batch, _ in sample(data, model, input_size, labels=False, **how)])


def sample(
    data: Data, model: nn.Module, input_size: tuple[int, ...] | None, *, labels: bool = True, **how: Any
) -> list[tuple[Tensor, Tensor]]:
    """Training pictures for a model in batches, with their labels (which count, or need not fit the model).

    `how` are the options of `nmfx.data.sample.calibration`.
    """
    return calibration(data, fit_pictures(data, model, input_size, labels=labels), **how)
