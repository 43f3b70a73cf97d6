"""Two kinds of labelled pictures: read one by one (a folder, a timm data set), or all in memory as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nmfx.data.decoding import decode, to_mode
from nmfx.errors import DataError


@dataclass(frozen=True)
class FilePictures:
    """Pictures read one by one from `source`, a map-style data set of timm or torchvision without a transform.

    Attributes:
        indices: which of the source's pictures these are; all when None.
        labels: of these pictures, ``(n,)``, known without reading them; None when the source cannot tell.
    """

    source: Any
    indices: Sequence[int] | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source) if self.indices is None else len(self.indices)

    def part(self, chosen: Tensor) -> FilePictures:
        """Those at the indices `chosen`."""
        indices = [int(index) if self.indices is None else self.indices[int(index)] for index in chosen]
        return FilePictures(self.source, indices, None if self.labels is None else self.labels[chosen])

    def read(self, index: int, mode: str) -> tuple[Image.Image, int]:
        """One picture in PIL's `mode` (``RGB`` or ``L``), as `decode` reads it, and its label.

        timm's ImageDataset answers a broken file with the next picture, so its reader is asked directly.

        Raises:
            DataError: the picture cannot be read; the message names its file.
        """
        index = index if self.indices is None else self.indices[index]
        try:
            picture, label = (getattr(self.source, "reader", None) or self.source)[index]
            if isinstance(picture, Image.Image):
                return to_mode(picture, mode), int(label)
            with picture:
                return decode(picture, mode), int(label)
        except Exception as error:  # damaged files raise nearly anything
            reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
            raise DataError(f"{self.name(index)}: the picture cannot be read: {reason}; repair or remove it") from error

    def name(self, index: int) -> str:
        """The file of the source's picture `index`, or its number."""
        if samples := getattr(self.source, "samples", None):  # ours and torchvision's folders
            return str(samples[index][0])
        try:
            return str(self.source.filename(index, absolute=True))
        except Exception:
            return f"picture {index}"


@dataclass(frozen=True)
class ArrayPictures:
    """Pictures in memory, as bytes; a pixel is ``byte / top``.

    Attributes:
        pictures: uint8 ``(n, channels, height, width)``.
        labels: int64 ``(n,)``.
        padding, hflip: what training usually does to them: random crops out of so many black pixels on every side, and the
            share that is mirrored.
    """

    pictures: Tensor
    labels: Tensor
    top: int = 255
    padding: int = 4
    hflip: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, chosen: Tensor) -> ArrayPictures:
        """Those at the indices `chosen`."""
        return replace(self, pictures=self.pictures[chosen], labels=self.labels[chosen])

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and (unbiased) deviation of each channel's pixels."""
        means, deviations = [], []
        levels = torch.arange(256, dtype=torch.float64) / self.top
        for channel in self.pictures.unbind(1):
            counts = torch.bincount(channel.flatten(), minlength=256).double()
            mean = (counts @ levels / counts.sum()).item()
            means.append(mean)
            deviations.append((counts @ (levels - mean) ** 2 / (counts.sum() - 1)).sqrt().item())
        return tuple(means), tuple(deviations)
