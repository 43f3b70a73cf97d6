"""The files of an image folder: each real folder once, each file what its name says."""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor

from nmfx.data.decoding import kind_of, open_file
from nmfx.errors import DataError

Identity = tuple[int, int]  # device and inode


@dataclass(frozen=True)
class FolderSource:
    """The pictures of an image folder, or of a part of it, as a data set of files and labels.

    Attributes:
        classes: their names, in label order: numbers in them count as such, as in timm.
        samples: path and label, in the same order.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        path, label = self.samples[index]
        return open_file(path), label

    def filename(self, index: int) -> str:
        """The path of a picture within the folder."""
        return os.path.relpath(self.samples[index][0], self.root)

    def labels(self) -> Tensor:
        """All labels, ``(n,)``."""
        return torch.tensor([label for _, label in self.samples], dtype=torch.int64)


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sorts as timm does, ``2`` before ``10`` and without regard to case; names that differ by case only, in one order too."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name.lower()))], name


def is_picture(name: str) -> bool:
    """Whether a file of this name is meant to be a picture: it is not hidden, and has an ending that timm knows."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in get_img_extensions(as_set=True)


def endings() -> str:
    """The endings of pictures, for a message."""
    return ", ".join(sorted(get_img_extensions()))


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder`, or links to some, that are not hidden."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".") and os.path.isdir(entry))


def find_pictures(roots: Iterable[Path], classes: Sequence[Path]) -> tuple[dict[Path, list[str]], list[str]]:
    """The pictures in each class folder and below, and the links that were left out.

    Every real folder is read once, and those on the way to it never: links that lead up, or from one class into another, would
    show pictures twice, and under wrong labels. Real folders go first, so that it is a link that is left out.

    Args:
        roots: the folders that the classes are in.

    Raises:
        DataError: a class without pictures, or a picture that is no regular file.
        OSError: a folder that cannot be read.
    """
    seen = {_identity(place) for root in roots for way in (root.absolute(), root.resolve()) for place in (way, *way.parents)}
    found: dict[Path, list[str]] = {path: [] for path in classes}
    left_out: list[str] = []
    real: deque[tuple[Path, str]] = deque()
    linked: deque[tuple[Path, str]] = deque()
    for path in classes:
        (linked if path.is_symlink() else real).append((path, str(path)))
    while real or linked:
        path, folder = (real or linked).popleft()
        if (identity := _identity(folder)) in seen:
            left_out.append(folder)
            continue
        seen.add(identity)
        pictures, real_ones, linked_ones = _read_folder(folder)
        found[path] += pictures
        real.extend((path, inner) for inner in real_ones)
        linked.extend((path, inner) for inner in linked_ones)
    for path, files in found.items():  # an empty class would shift the labels of all after it
        if not files and str(path) in left_out:
            raise DataError(f"{path}: leads to a folder that is read already; a picture has one class in one part: remove it")
        if not files:
            raise DataError(f"{path}: holds no pictures ({endings()}); fill or remove it")
    return found, left_out


def _identity(folder: str | Path) -> Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _read_folder(folder: str) -> tuple[list[str], list[str], list[str]]:
    """The pictures, folders and links to folders in one folder, by name; hidden ones left out."""
    pictures: list[str] = []
    real: list[str] = []
    linked: list[str] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            kind = stat.S_IFMT(_mode(entry))
            if kind == stat.S_IFDIR:
                (linked if entry.is_symlink() else real).append(entry.path)
            elif is_picture(entry.name):
                if kind != stat.S_IFREG:
                    what = kind_of(kind) if kind else "a link that leads nowhere"
                    raise DataError(f"{entry.path}: {what}, not a picture; remove it")
                pictures.append(entry.path)
    return pictures, real, linked


def _mode(entry: os.DirEntry[str]) -> int:
    """What an entry is, or what its link leads to; 0 for a link that leads nowhere. Most need no look at the disk."""
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    try:
        return os.stat(entry.path).st_mode
    except OSError:
        if entry.is_symlink():
            return 0
        raise
