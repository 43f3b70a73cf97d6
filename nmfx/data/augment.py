"""Augmentation: timm's options, and random crops and mirroring on bytes for sets in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from nmfx.data.config import PictureConfig
from nmfx.data.pictures import ArrayPictures
from nmfx.data.seeding import generator_of, seeded
from nmfx.errors import DataError
from nmfx.settings.training import Augment

BORDER = 4  # a side at most this much longer than the picture's is reached by black borders, others by resizing


def train_transform(config: PictureConfig, augment: Augment) -> Callable[[Any], Tensor]:
    """timm's training transform of a PIL picture.

    Raises:
        DataError: an option that timm does not know, or one for sets in memory only.
    """
    if augment.padding is not None:
        raise DataError("padding is for sets in memory; pictures read from files are cropped by scale and ratio")
    try:
        transform: Callable[[Any], Tensor] = create_transform(
            config.input_size,
            is_training=True,
            no_aug=not augment.on,
            hflip=0.5 if augment.hflip is None else augment.hflip,
            color_jitter=(0.4 if augment.color_jitter is None else augment.color_jitter) or None,
            auto_augment=augment.auto_augment,
            scale=augment.scale,
            ratio=augment.ratio,
            interpolation=augment.interpolation or "random",
            mean=config.mean,
            std=config.std,
            re_prob=augment.re_prob,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
        raise DataError(f"timm does not accept {augment}: {error or type(error).__name__}") from error
    return transform


def make_mixup(augment: Augment, classes: int, batch_size: int) -> Mixup | None:
    """timm's Mixup, or None when nothing is mixed.

    Raises:
        DataError: an odd batch, or an unknown number of classes.
    """
    if not (augment.mixup or augment.cutmix):
        return None
    if batch_size % 2 or not classes:
        raise DataError(f"mixup needs an even batch and a known number of classes; got batch {batch_size}, {classes} classes")
    prob, smoothing = augment.mixup_prob, augment.label_smoothing
    return Mixup(augment.mixup, augment.cutmix, prob=prob, label_smoothing=smoothing, num_classes=classes)


@dataclass(frozen=True)
class ArrayTransform:
    """Bytes of a set in memory to what a model expects, a batch at a time; augmented when `augment` is given."""

    pictures: ArrayPictures
    config: PictureConfig
    augment: Augment | None = None

    def __post_init__(self) -> None:
        options = ("color_jitter", "auto_augment", "scale", "ratio", "interpolation")
        if self.augment and (given := next((name for name in options if getattr(self.augment, name)), None)):
            raise DataError(f"{given} is for pictures read from files; sets in memory take padding, hflip, re_prob and mixup")

    def __call__(self, indices: Tensor, *key: int | str) -> Tensor:
        """Pictures ``(batch, channels, height, width)``; what is random depends on `key` and each index only."""
        channels, height, width = self.config.input_size
        x = _fit_channels(self.pictures.pictures[indices], channels)
        x = _add_border(x, height, width)
        if self.augment and self.augment.on:
            x = self._crop_and_mirror(x, indices, *key)
        x = x / self.pictures.top
        if x.shape[2:] != (height, width):
            mode = InterpolationMode(self.config.interpolation)
            x = F.resize(x, [height, width], mode, antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.config.mean, self.config.std))
        x = (x - mean) / std
        return self._erase(x, indices, *key) if self.augment and self.augment.on and self.augment.re_prob else x

    def _crop_and_mirror(self, x: Tensor, indices: Tensor, *key: int | str) -> Tensor:
        """v2.RandomCrop and RandomHorizontalFlip for every picture by itself, ten times as fast as one call a picture."""
        assert self.augment is not None
        padding = self.pictures.padding if self.augment.padding is None else self.augment.padding
        hflip = self.pictures.hflip if self.augment.hflip is None else self.augment.hflip
        generator, count = generator_of("crop", *key), len(self.pictures)
        offsets = torch.randint(0, 2 * padding + 1, (count, 2, 1), generator=generator)[indices]
        mirrored = (torch.rand(count, generator=generator) < hflip)[indices]
        rows, columns = offsets[:, 0] + torch.arange(x.shape[2]), offsets[:, 1] + torch.arange(x.shape[3])  # batch height
        padded, batch = F.pad(x, [padding]), torch.arange(len(x))[:, None, None]
        x = padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x)

    def _erase(self, x: Tensor, indices: Tensor, *key: int | str) -> Tensor:
        assert self.augment is not None
        erase = RandomErasing(self.augment.re_prob, mode="pixel", device="cpu")
        for picture, index in zip(x, indices.tolist()):
            with seeded("erase", *key, index):
                erase(picture)  # in place
        return x


def _fit_channels(x: Tensor, channels: int) -> Tensor:
    if x.shape[1] == channels:
        return x
    fitted: Tensor = F.rgb_to_grayscale(x) if channels == 1 else x.expand(-1, channels, -1, -1)
    return fitted


def _add_border(x: Tensor, height: int, width: int) -> Tensor:
    """Black borders when both sides lack at most BORDER pixels: 28 to 32."""
    down, right = height - x.shape[2], width - x.shape[3]
    if not (0 <= down <= BORDER and 0 <= right <= BORDER):
        return x
    bordered: Tensor = F.pad(x, [right // 2, down // 2, right - right // 2, down - down // 2])
    return bordered
