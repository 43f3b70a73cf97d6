"""Small generated image folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("bird", "cat", "dog")


def picture(label: int, number: int) -> Image.Image:
    """A noisy 40x32 picture, never the same one twice."""
    values = np.random.default_rng((label, number)).integers(0, 120, (32, 40, 3)) + 40 * label
    return Image.fromarray(values.astype(np.uint8))


def make_classes(folder: Path, count: int, *, first: int = 0, classes: tuple[str, ...] = CLASSES) -> Path:
    """`count` pictures in a folder for each class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(first, first + count):
            picture(label, number).save(folder / name / f"{number}.png")
    return folder


def make_split(folder: Path, *, train: int, validation: int, named: str = "val") -> Path:
    """An ImageNet-like folder with so many pictures a class in its two parts."""
    make_classes(folder / "train", train)
    make_classes(folder / named, validation, first=1000)
    return folder
