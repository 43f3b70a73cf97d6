"""Image folders: a folder a class, in train and validation parts or with a part held back."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from pathlib import Path

import torch

from nmfx.data.listing import FolderSource, find_pictures, is_picture, natural_order, subfolders
from nmfx.data.pictures import FilePictures
from nmfx.errors import DataError

TRAIN = ("train", "training")
VALIDATION = ("validation", "val", "valid", "eval", "evaluation")
LAYOUT = "expected DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg"

Opened = tuple[tuple[FilePictures, FilePictures], tuple[str, ...], str]


def open_folder(folder: Path, train_split: str, val_split: str, held_back: float) -> Opened:
    """The training and validation pictures of an image folder, its class names, and a note.

    A picture's class is the folder below the part's, however deep it lies in it. Hidden files and folders are left out, links
    are followed, and each real folder is read once: a second way to it is left out, and the note says so.

    Raises:
        DataError: no such folder, no pictures, no class folders, an empty class folder, one part of two, or a class that is
            in the validation part only; something that is called like a picture and cannot be one.
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
    (source, *checked), notes = _open_parts([train] if os.path.samefile(train, validation) else [train, validation])
    parts = (_pictures(source), _pictures(checked[0] if checked else source))
    absent = len(source.classes) - len(torch.unique(parts[1].labels))
    notes += [f"{absent} of {len(source.classes)} classes have no validation picture"] if absent else []
    return parts, source.classes, "; ".join(notes)


def has_classes(folder: Path, *splits: str) -> bool:
    """Whether there are parts with class folders, or at least two class folders and no pictures beside them."""
    if not folder.is_dir() or any(_find(folder, (*splits, *names)) for names in (TRAIN, VALIDATION)):
        return True
    stray = any(is_picture(entry.name) and not entry.is_dir() for entry in folder.iterdir())
    return len(subfolders(folder)) > 1 and not stray


def open_unlabelled(folder: Path) -> FilePictures:
    """All pictures in a folder and below.

    Raises:
        DataError: there are none.
    """
    found, _ = find_pictures([], [folder])
    files = tuple((file, 0) for file in sorted(found[folder], key=natural_order))
    return FilePictures(FolderSource(folder, ("pictures",), files))


def _pictures(source: FolderSource) -> FilePictures:
    return FilePictures(source, labels=source.labels())


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the named subfolders that itself holds folders (a class may be called train, too)."""
    return next((folder / name for name in names if (folder / name).is_dir() and subfolders(folder / name)), None)


def _open_parts(roots: list[Path]) -> tuple[list[FolderSource], list[str]]:
    """The pictures of each part, labelled by the class folders of the first, and what there is to note."""
    folders = [_class_folders(root) for root in roots]
    names = [path.name for path in folders[0]]
    if len(names) < 2:
        split = f" (are {names[0]}'s subfolders the classes?)" if subfolders(folders[0][0]) else ""
        raise DataError(f"{roots[0]}: only one class, {names[0]}{split}; {LAYOUT}")
    for path in (path for part in folders[1:] for path in part):
        if path.name not in names:
            raise DataError(f"{path}: this class has no training pictures; known: {len(names)} other classes")
    found, again = find_pictures(roots, [path for part in folders for path in part])
    more = f" and {len(again) - 1} more" if len(again) > 1 else ""
    notes = [f"{again[0]}{more}: read already, left out"] if again else []
    sources = []
    for root, part in zip(roots, folders):
        files = [(file, names.index(path.name)) for path in part for file in found[path]]
        sources.append(FolderSource(root, tuple(names), tuple(sorted(files, key=lambda one: natural_order(one[0])))))
    return sources, notes


def _class_folders(root: Path) -> list[Path]:
    classes = subfolders(root)
    if not classes:
        pictures = any(is_picture(entry.name) for entry in root.iterdir())
        found = "pictures, but no class folders" if pictures else "nothing to train on: it is empty"
        raise DataError(f"{root}: holds {found}; {LAYOUT}")
    if stray := next((entry for entry in sorted(root.iterdir()) if is_picture(entry.name) and not entry.is_dir()), None):
        raise DataError(f"{stray}: a picture outside the class folders has no label; move or remove it")
    return sorted(classes, key=lambda path: natural_order(path.name))


def _hold_back(folder: Path, share: float) -> Opened:
    """Split `share` of every class off for validation, at least one picture.

    The pictures are chosen by a hash of their path within the folder: the same ones on every machine and in every run, and
    nearly the same ones after pictures were added.
    """
    if not 0 < share < 1:
        raise DataError(f"held_back is {share}; expected a share between 0 and 1")
    names = {entry.name for entry in subfolders(folder)}
    if names and names <= {*TRAIN, *VALIDATION}:
        raise DataError(f"{folder}: {', '.join(sorted(names))} hold no class folders; {LAYOUT}")
    (source,), notes = _open_parts([folder])
    labels, members = source.labels(), defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        key = Path(source.filename(index)).as_posix().encode("utf-8", "surrogateescape")
        members[label].append((hashlib.sha256(key).hexdigest(), index))
    few = next((label for label, entries in members.items() if len(entries) < 2), None)
    if few is not None:
        raise DataError(f"{folder / source.classes[few]}: one picture cannot be both for training and for validation; add some")
    held = sorted(i for entries in members.values() for _, i in sorted(entries)[: max(1, round(share * len(entries)))])
    kept = sorted(set(range(len(labels))) - set(held))
    split = f"no train and validation folders: {len(held)} of {len(labels)} pictures held back for validation, always the same"
    parts = (FilePictures(source, kept, labels[kept]), FilePictures(source, held, labels[held]))
    return parts, source.classes, "; ".join([split, *notes])
