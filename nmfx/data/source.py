"""open_data: a name, or a folder, to training and validation pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import IterableDataset

from nmfx.data.arrays import in_memory, open_digits, open_fashion_mnist
from nmfx.data.folder import has_classes, open_folder, open_unlabelled
from nmfx.data.pictures import ArrayPictures, FilePictures
from nmfx.errors import DataError
from nmfx.text import nearest

Pictures = ArrayPictures | FilePictures | IterableDataset[Any]
TIMM = ("torch", "hfds", "hfids", "tfds", "wds")  # prefixes of timm.data.create_dataset
TORCHVISION = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "inaturalist", "places365", "imagenet")


@dataclass(frozen=True)
class Data:
    """Labelled pictures.

    Attributes:
        classes: how many; 0 when the source does not say.
        class_names: in label order; empty when unknown.
        shape: (channels, height, width) of every picture; None when they differ or are unknown.
        mean, std: of the training pixels by channel, in 0..1; empty for pictures that are not in memory.
        note: what a reader of results should know, such as how a validation part was split off.
    """

    name: str
    classes: int
    class_names: tuple[str, ...]
    train: Pictures
    validation: Pictures
    shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        size = f", {'x'.join(map(str, self.shape))}" if self.shape else ""
        note = f" ({self.note})" if self.note else ""
        counts = f"{_count(self.train)} training and {_count(self.validation)} validation pictures"
        return f"{self.name}: {counts} of {self.classes or '?'} classes{size}{note}"


def open_data(
    name: str,
    *,
    root: str | Path | None = None,
    train_split: str = "train",
    val_split: str = "validation",
    held_back: float = 0.1,
    download: bool = False,
    labels: bool = True,
) -> Data:
    """Find labelled pictures.

    Args:
        name: ``digits``, ``fashion-mnist``, a timm data set with its prefix (``torch/cifar100``, ``hfds/...``, ``tfds/...``,
            ``wds/...``), or an image folder: ``DIR/train`` and ``DIR/val`` (or ``validation``) with a folder a class, or
            just class folders.
        root: where a named data set is kept.
        train_split, val_split: the names of the parts, or of a folder's subfolders.
        held_back: the share of every class that becomes validation pictures when a folder has no parts; always the same ones.
        download: let timm and torchvision fetch a named data set.
        labels: without, a folder need have no class folders: all pictures in it and below are training pictures.

    Returns:
        Both parts, with what is known of their classes and pixels.

    Raises:
        DataError: nothing of that name (with the nearest one), or what is there cannot be used.
    """
    try:
        folder = Path(name)
        if not labels and name not in BUILTIN and folder.is_dir():
            if has_classes(folder, train_split, val_split):
                with contextlib.suppress(DataError):  # one picture a class, no validation part
                    return _open(name, None, (train_split, val_split), held_back, download)
            pictures = open_unlabelled(folder)
            return Data(name, 1, (), pictures, pictures.part(torch.arange(0)), note="without labels")
        return _open(name, Path(root) if root else None, (train_split, val_split), held_back, download)
    except OSError as error:  # a name too long for the disk, a folder that may not be read
        raise DataError(f"{error.filename or name}: cannot be opened: {error.strerror or error}") from error


def _open(name: str, root: Path | None, splits: tuple[str, str], held_back: float, download: bool) -> Data:
    if name in BUILTIN:
        train, validation, names = BUILTIN[name](root)
        return _data(name, train, validation, names)
    prefix, slash, rest = name.partition("/")
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{name}: {error}") from error
    if slash and prefix.lower() in TIMM and not folder.exists():
        return _open_timm(prefix.lower(), rest, root, splits, download)
    if not folder.exists() and not slash and "\\" not in name and not name.startswith((".", "~")):
        known = [*BUILTIN, *(f"torch/{entry}" for entry in TORCHVISION)]
        near = nearest(f"torch/{name}" if name in TORCHVISION else name, known)
        raise DataError(f"no data set or folder is called {name!r}{near}; known: {', '.join(known)}, or an image folder")
    parts, names, note = open_folder(folder, *splits, held_back)
    return _data(name, *parts, names, note)


BUILTIN: dict[str, Callable[[Path | None], tuple[ArrayPictures, ArrayPictures, tuple[str, ...]]]] = {
    "digits": open_digits,
    "fashion-mnist": open_fashion_mnist,
}


def _data(name: str, train: Pictures, validation: Pictures, names: tuple[str, ...], note: str = "") -> Data:
    if isinstance(train, ArrayPictures):
        shape: Any = tuple(train.pictures.shape[1:])
        mean, std = train.statistics()
        return Data(name, len(names) or int(train.labels.max()) + 1, names, train, validation, shape, mean, std, note)
    labels = getattr(train, "labels", None)
    return Data(name, len(names) or (0 if labels is None else int(labels.max()) + 1), names, train, validation, note=note)


def _open_timm(prefix: str, rest: str, root: Path | None, splits: tuple[str, str], download: bool) -> Data:
    name = f"{prefix}/{rest}"
    if prefix == "torch" and rest.lower() not in TORCHVISION:
        raise DataError(
            f"torchvision has no data set {rest!r}{nearest(rest.lower(), TORCHVISION)}; known: {', '.join(TORCHVISION)}"
        )
    if prefix == "torch" and root is None:
        raise DataError(f"{name}: say where it is kept, as root (torchvision looks there, or downloads to it)")
    if rest.lower() in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist") and prefix == "torch":
        for split, allowed in zip(
            splits, (("train", "training"), ("val", "valid", "validation", "eval", "evaluation", "test"))
        ):
            if split not in allowed:  # timm would take every unknown name for the validation part
                raise DataError(f"{name}: no part {split!r}{nearest(split, allowed)}; known: {', '.join(allowed)}")
    try:
        train, validation = (
            create_dataset(name, root=None if root is None else str(root), split=split, is_training=training, download=download)
            for split, training in zip(splits, (True, False))
        )
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} cannot be opened (root {root}, parts {splits[0]} and {splits[1]}): {reason}") from error
    names = _class_names(train)
    if isinstance(train, IterableDataset):
        note = "a stream: order and augmentation are timm's, so a resumed epoch sees other pictures"
        return _data(name, train, validation, names, note)
    arrays = in_memory(train, validation, mirrored=rest.lower() in ("cifar10", "cifar100", "fashion_mnist"))
    if arrays:
        return _data(name, *arrays, names)
    return _data(name, FilePictures(train, labels=_labels(train)), FilePictures(validation, labels=_labels(validation)), names)


def _class_names(dataset: Any) -> tuple[str, ...]:
    indices = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if indices:
        return tuple(str(name) for name, _ in sorted(indices.items(), key=lambda item: item[1]))
    names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None) or ()
    return tuple(name if isinstance(name, str) else str(name[0]) for name in names)


def _labels(dataset: Any) -> Tensor | None:
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "iter_targets"):
        return torch.tensor(list(reader.iter_targets()), dtype=torch.int64)
    targets = getattr(dataset, "targets", None)
    return None if targets is None else torch.as_tensor(targets, dtype=torch.int64)


def _count(part: Pictures) -> str:
    return "a stream of" if isinstance(part, IterableDataset) else f"{len(part):,}"
