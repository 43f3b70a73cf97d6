"""Image folders: a folder a class, in train and validation parts or with a part held back."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions

from nmfx.data.pictures import FilePictures
from nmfx.errors import DataError

TRAIN = ("train", "training")
VALIDATION = ("validation", "val", "valid", "eval", "evaluation")
LAYOUT = "expected DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg"


def open_folder(
    folder: Path, train_split: str, val_split: str, held_back: float
) -> tuple[tuple[FilePictures, FilePictures], tuple[str, ...], str]:
    """The training and validation pictures of an image folder, its class names, and a note.

    Raises:
        DataError: no such folder, no pictures, no class folders, an empty class folder, one part of two, or a class that is
            in the validation part only.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; {LAYOUT}")
    train = _find(folder, (train_split, *(TRAIN if train_split in TRAIN else ())))
    validation = _find(folder, (val_split, *(VALIDATION if val_split in VALIDATION else ())))
    if train is None and validation is None:
        return _hold_back(folder, held_back)
    if train is None or validation is None:
        missing = train_split if train is None else val_split
        raise DataError(f"{folder}: has {(train or validation or folder).name}/ but no {missing}/; {LAYOUT}")
    source = _open_classes(train)
    names: dict[str, int] = source.reader.class_to_idx
    checked = _open_classes(validation, names)
    parts = (FilePictures(source, labels=_labels(source)), FilePictures(checked, labels=_labels(checked)))
    absent = len(names) - len(torch.unique(_labels(checked)))
    note = f"{absent} of {len(names)} classes have no validation picture" if absent else ""
    return parts, tuple(names), note


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the named subfolders that itself holds folders (a class may be called train, too)."""
    return next((folder / name for name in names if (folder / name).is_dir() and _subfolders(folder / name)), None)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _open_classes(folder: Path, known: dict[str, int] | None = None) -> Any:
    """timm's data set of a folder of class folders, with the labels of `known` if given."""
    classes = _subfolders(folder)
    if not classes:
        found = (
            "pictures, but no class folders" if any(map(_is_picture, folder.iterdir())) else "nothing to train on: it is empty"
        )
        raise DataError(f"{folder}: holds {found}; {LAYOUT}")
    if stray := next((entry for entry in sorted(folder.iterdir()) if entry.is_file() and _is_picture(entry)), None):
        raise DataError(f"{stray}: a picture outside the class folders has no label; move or remove it")
    for entry in classes:  # an empty class would shift the labels of all after it
        if not any(_is_picture(Path(file)) for _, _, files in os.walk(entry, followlinks=True) for file in files):
            raise DataError(f"{entry}: holds no pictures ({', '.join(sorted(get_img_extensions()))}); fill or remove it")
    dataset = create_dataset("", root=str(folder), search_split=False)
    names = dataset.reader.class_to_idx
    if hidden := next((name for name in names if name.startswith(".")), None):
        raise DataError(f"{folder}: timm would take the hidden folder {hidden} for a class; remove it")
    if known is not None:  # timm would leave unknown classes out, and number the rest anew
        if unknown := next((name for name in names if name not in known), None):
            raise DataError(f"{folder / unknown}: this class has no training pictures; known: {len(known)} other classes")
        return create_dataset("", root=str(folder), search_split=False, class_map=known)
    if len(names) < 2:
        split = f" (are {classes[0].name}'s subfolders the classes?)" if _subfolders(classes[0]) else ""
        raise DataError(f"{folder}: only one class, {classes[0].name}{split}; {LAYOUT}")
    return dataset


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in get_img_extensions(as_set=True)


def _labels(dataset: Any) -> torch.Tensor:
    return torch.tensor([label for _, label in dataset.reader.samples], dtype=torch.int64)


def _hold_back(folder: Path, share: float) -> tuple[tuple[FilePictures, FilePictures], tuple[str, ...], str]:
    """Split `share` of every class off for validation, at least one picture.

    The pictures are chosen by a hash of their path within the folder: the same ones on every machine and in every run, and
    nearly the same ones after pictures were added.
    """
    if not 0 < share < 1:
        raise DataError(f"held_back is {share}; expected a share between 0 and 1")
    names = {entry.name for entry in _subfolders(folder)}
    if names and names <= {*TRAIN, *VALIDATION}:
        raise DataError(f"{folder}: {', '.join(sorted(names))} hold no class folders; {LAYOUT}")
    dataset = _open_classes(folder)
    labels, members = _labels(dataset), defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        key = Path(dataset.filename(index)).as_posix()
        members[label].append((hashlib.sha256(key.encode()).hexdigest(), index))
    few = next((label for label, entries in members.items() if len(entries) < 2), None)
    classes = dataset.reader.class_to_idx
    if few is not None:
        raise DataError(f"{folder / list(classes)[few]}: one picture cannot be both for training and for validation; add some")
    held = sorted(i for entries in members.values() for _, i in sorted(entries)[: max(1, round(share * len(entries)))])
    kept = sorted(set(range(len(labels))) - set(held))
    note = (
        f"no train and validation folders: {len(held)} of {len(labels)} pictures held back for validation, always the same ones"
    )
    parts = (FilePictures(dataset, kept, labels[kept]), FilePictures(dataset, held, labels[held]))
    return parts, tuple(classes), note
