"""calibration: a few training pictures, always the same ones, of all classes alike."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from nmfx.data.config import PictureConfig
from nmfx.data.loader import Batch, eval_loader
from nmfx.data.pictures import ArrayPictures, FilePictures
from nmfx.data.seeding import generator_of
from nmfx.data.source import Data
from nmfx.errors import DataError

MOST_HELD_BACK = 1000


def calibration(
    data: Data, config: PictureConfig, *, count: int = 256, batch_size: int = 64, seed: int = 0, workers: int = 0
) -> list[Batch]:
    """Training pictures under the validation transform, always the same ones.

    They depend on `seed` only, and a smaller count with the same batch size is the beginning of a larger one. Classes differ
    by at most one picture as long as each has enough (labels that are known only by reading the pictures, as in some of
    torchvision's sets, are not spread; a stream gives its first pictures).

    Args:
        data, config: the pictures, and how they are brought to the model.
        count: how many pictures.
        batch_size, workers: pictures of a batch, and processes that read them.

    Returns:
        Batches ``(x, y)``: x ``(batch, channels, height, width)``, y ``(batch,)``.

    Raises:
        DataError: there are fewer training pictures.
    """
    if count < 1 or batch_size < 1:
        raise DataError(f"calibration: {count} pictures in batches of {batch_size}: out of range")
    if isinstance(data.train, IterableDataset):
        loader = eval_loader(data.train, config, batch_size=batch_size, workers=workers)
        return list(itertools.islice(loader, -(-count // batch_size)))
    if count > len(data.train):
        raise DataError(f"{data.name}: {count} pictures for calibration, but only {len(data.train)} for training")
    chosen = order_by_turns(data.train, seed)[:count].tolist()
    return list(eval_loader(data.train, config, batch_size=batch_size, workers=workers, indices=chosen))


def few_pictures(data: Data, count: int | None, *, seed: int = 0, hold_back: bool = False) -> Data:
    """`data` with some of its training pictures: those that `calibration` takes with the same seed.

    Args:
        count: how many; all if None.
        hold_back: take every eighth of them (at most 1,000) for validation, instead of the validation pictures.

    Raises:
        DataError: a stream, or too few pictures.
    """
    if count is None and not hold_back:
        return data
    if isinstance(data.train, IterableDataset):
        raise DataError(f"{data.name}: a stream cannot be cut; choose some of its pictures beforehand")
    count = len(data.train) if count is None else count
    least = 16 if hold_back else 8
    if count > len(data.train) or count < least:
        raise DataError(f"{data.name}: {count} pictures to train on: expected {least} or more, and there are {len(data.train)}")
    chosen = order_by_turns(data.train, seed)[:count]
    if not hold_back:
        return replace(data, train=data.train.part(chosen))
    held = torch.arange(count) % 8 == 7
    held &= held.cumsum(0) <= MOST_HELD_BACK
    return replace(data, train=data.train.part(chosen[~held]), validation=data.train.part(chosen[held]))


def order_by_turns(pictures: ArrayPictures | FilePictures, seed: int) -> Tensor:
    """All pictures in a shuffled order that takes one of every class, then a second one of every class, and so on."""
    order = torch.randperm(len(pictures), generator=generator_of("calibration", seed))
    if pictures.labels is None:
        return order
    labels, by_class = pictures.labels[order].sort(stable=True)
    starts = torch.searchsorted(labels, labels)  # where each one's class begins
    turn = torch.empty_like(order)
    turn[by_class] = torch.arange(len(order)) - starts
    return order[turn.argsort(stable=True)]
