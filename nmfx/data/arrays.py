"""Small sets held in memory: scikit-learn's digits, Fashion-MNIST, and torchvision's of the same kind."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmfx.data.pictures import ArrayPictures
from nmfx.demo.digits import load_digits_data
from nmfx.errors import DataError

Opened = tuple[ArrayPictures, ArrayPictures, tuple[str, ...]]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MOST = 1 << 30  # bytes of a set: twenty times Fashion-MNIST's
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def open_digits(root: Path | None = None) -> Opened:
    """The 1,797 digits of scikit-learn, 1x8x8, with the demo's split; cropped out of 1 black pixel, never mirrored."""
    train_x, train_y, test_x, test_y = load_digits_data()
    low, high = train_x.min(), train_x.max()  # 0 and 16 before the demo's normalisation
    parts = [((x - low) / (high - low) * 16).round().to(torch.uint8) for x in (train_x, test_x)]
    train, test = (ArrayPictures(x, y, top=16, padding=1) for x, y in zip(parts, (train_y, test_y)))
    return train, test, tuple("0123456789")


def open_fashion_mnist(root: Path | None = None) -> Opened:
    """Fashion-MNIST, 60,000 and 10,000 pictures 1x28x28, from the idx files in `root`, $NMFX_DATA or Debian's package.

    Raises:
        DataError: no folder has all four files, with how to get them; or a file is damaged.
    """
    home = os.environ.get("NMFX_DATA")
    places = [root, root / "FashionMNIST" / "raw", root / "fashion-mnist"] if root else []
    places += [Path(home) / "fashion-mnist"] if home else []
    for place in [*places, DEBIAN]:
        files = [_idx_file(place, part, kind) for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        if all(files):
            break
    else:
        raise DataError(
            f"fashion-mnist is not in {', '.join(map(str, [*places, DEBIAN]))}: apt-get install dataset-fashion-mnist, or put "
            "the four idx files (plain or .gz) into $NMFX_DATA/fashion-mnist, or let torchvision.datasets.FashionMNIST(root, "
            "download=True) fetch them and give that root"
        )
    train_x, train_y, test_x, test_y = (_read_idx(file) for file in files if file)
    train, test = (ArrayPictures(x[:, None], y.long(), hflip=0.5) for x, y in ((train_x, train_y), (test_x, test_y)))
    return train, test, FASHION


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    names = (f"{part}-{kind}-ubyte", f"{part}-{kind}-ubyte.gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx(file: Path) -> Tensor:
    """The bytes of an idx file: two zeros, 8 for bytes, the number of dimensions, each as 4 bytes, then the values."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            start = opened.read(4)
            shape = np.frombuffer(opened.read(4 * start[3]), ">u4").tolist()
            if start[:3] != b"\0\0\x08" or len(shape) != start[3] or math.prod(shape) > MOST:
                raise ValueError("not a file of bytes in idx form, or larger than any data set of its kind")
            content = opened.read(math.prod(shape) + 1)
        return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())
    except (OSError, ValueError, EOFError, IndexError, zlib.error) as error:
        raise DataError(f"{file}: the idx file cannot be read: {error}") from error


def in_memory(train: Any, validation: Any, *, mirrored: bool) -> tuple[ArrayPictures, ArrayPictures] | None:
    """torchvision's data sets that hold all their bytes (``data`` and ``targets``: MNIST's kin and CIFAR); None for others."""
    parts = []
    for dataset in (train, validation):
        data, targets = getattr(dataset, "data", None), getattr(dataset, "targets", None)
        if data is None or targets is None:
            return None
        x = torch.as_tensor(data)
        if x.dtype != torch.uint8 or x.dim() not in (3, 4):
            return None
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()  # n channels height width
        y = torch.as_tensor(targets, dtype=torch.int64)
        parts.append(ArrayPictures(x, y[:, 0] if y.dim() == 2 else y, hflip=0.5 if mirrored else 0.0))  # QMNIST: class first
    return parts[0], parts[1]
