"""Laws of an image folder: every real picture once, under its class; whatever is in the way is named; nothing hangs."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import folders
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmfx.data.config import PictureConfig
from nmfx.data.listing import natural_order
from nmfx.data.loader import train_loader
from nmfx.data.source import Data, open_data
from nmfx.errors import DataError

HALF = {"held_back": 0.5}


def counted(data: Data) -> dict[str, int]:
    """How many pictures each class has, read one by one, none of them twice."""
    every = [name for part in (data.train, data.validation) for name in map(part.name, part.indices or range(len(part)))]
    assert len({os.path.realpath(name) for name in every}) == len(every)
    labels = [part.read(i, "L")[1] for part in (data.train, data.validation) for i in range(len(part))]
    return {data.class_names[label]: count for label, count in sorted(Counter(labels).items())}


def test_a_link_to_a_parent_adds_no_picture(tmp_path: Path) -> None:
    folders.make_classes(tmp_path / "data", 4)
    for number, target in enumerate(("..", ".", "../..", "../cat", "../cat/.", str(tmp_path), "/")):
        (tmp_path / "data" / "bird" / f"up{number}").symlink_to(target)
    data = open_data(str(tmp_path / "data"), **HALF)
    assert counted(data) == {"bird": 4, "cat": 4, "dog": 4}
    assert data.note.endswith("data/bird/up0 and 6 more: read already, left out")


def test_links_to_other_disks_are_followed(tmp_path: Path) -> None:
    folders.make_split(tmp_path / "disk", train=3, validation=2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to("../disk/train")
    (tmp_path / "data" / "val").mkdir()
    for name in folders.CLASSES:
        (tmp_path / "data" / "val" / name).symlink_to(tmp_path / "disk" / "val" / name)
    more = folders.make_classes(tmp_path / "more", 2, first=50, classes=("x",))
    (tmp_path / "disk" / "train" / "cat" / "more").symlink_to(more / "x")
    (tmp_path / "disk" / "train" / "dog" / "linked.png").symlink_to(folders.make_classes(tmp_path / "one", 1) / "cat" / "0.png")
    data = open_data(str(tmp_path / "data"))
    assert (data.train.labels.bincount().tolist(), len(data.validation), data.note) == ([3, 5, 4], 6, "")
    (tmp_path / "alias").symlink_to("data")
    assert len(open_data(str(tmp_path / "alias")).train) == 12


def test_a_part_is_not_read_through_a_link_from_the_other(tmp_path: Path) -> None:
    folders.make_split(tmp_path, train=3, validation=2)
    (tmp_path / "train" / "cat" / "more").symlink_to(tmp_path / "val" / "cat")
    data = open_data(str(tmp_path))
    assert (len(data.train), len(data.validation)) == (9, 6)
    assert data.note == f"{tmp_path}/train/cat/more: read already, left out"
    (tmp_path / "train" / "cat" / "more").unlink()
    assert len(open_data(str(tmp_path), val_split="train").validation) == 9  # asked for


def test_one_folder_under_two_names_has_no_class(tmp_path: Path) -> None:
    folders.make_classes(tmp_path, 2)
    (tmp_path / "a cat").symlink_to("cat")  # before the real one
    with pytest.raises(DataError, match="a cat: leads to a folder that is read already"):
        open_data(str(tmp_path))


def test_the_class_is_the_upper_folder_and_hidden_things_are_left_out(tmp_path: Path) -> None:
    folders.make_classes(tmp_path, 2, classes=("bird", "cat", "bird/indoor", "cat/indoor", "cat/.ipynb_checkpoints", ".git"))
    shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "cat" / "._0.png")
    shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "cat" / "0.PNG")
    (tmp_path / "cat" / "notes.txt").write_text("")
    os.mkfifo(tmp_path / "cat" / "pipe")
    (tmp_path / "cat" / "folder.jpg").mkdir()
    assert counted(open_data(str(tmp_path), **HALF)) == {"bird": 4, "cat": 5}


def test_classes_and_pictures_are_in_natural_order(tmp_path: Path) -> None:
    folders.make_classes(tmp_path, 11, classes=("10", "2", "B", "a", "b", "²"))
    data = open_data(str(tmp_path), **HALF)
    assert data.class_names == ("2", "10", "a", "B", "b", "²")
    first = [data.train.source.filename(i) for i in range(11)]
    assert first == [f"2/{number}.png" for number in range(11)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "a named pipe, not a picture"),
        (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere, not a picture"),
        (lambda path: path.symlink_to(path.name), "a link that leads nowhere, not a picture"),
        (lambda path: path.symlink_to("/dev/null"), "a device, not a picture"),
    ],
    ids=["pipe", "broken link", "loop", "device"],
)
def test_what_cannot_be_a_picture_is_named(tmp_path: Path, make, says: str) -> None:
    make(folders.make_classes(tmp_path, 2) / "cat" / "x.JPG")
    with pytest.raises(DataError, match=rf"cat/x\.JPG: {says}"):
        open_data(str(tmp_path))


def test_a_picture_that_became_a_pipe_is_named(tmp_path: Path) -> None:
    data = open_data(str(folders.make_split(tmp_path, train=2, validation=1)))
    for path in (tmp_path / "train").glob("*/*.png"):
        path.unlink()
        os.mkfifo(path)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"png: the picture cannot be read: a named pipe, not a file"):
            list(train_loader(data, PictureConfig((3, 16, 16), (0.5,) * 3, (0.5,) * 3), batch_size=2, workers=workers))


@pytest.mark.parametrize(
    "name", ["~nouser/x", "x/" + "a" * 300, "a" * 300, "/" + "a/" * 3000, "\0", "x/\0", "\udcff/", "\x1b[31m/x"]
)
@pytest.mark.parametrize("how", ["name", "root", "split"])
def test_names_of_all_kinds_end_in_one_line(name: str, how: str, tmp_path: Path) -> None:
    folders.make_classes(tmp_path, 2)
    arguments = {"name": (name, {}), "root": ("fashion-mnist", {"root": name}), "split": (str(tmp_path), {"train_split": name})}
    given_name, options = arguments[how]
    said = ""
    try:
        assert open_data(given_name, **options).classes in (3, 10)
    except DataError as error:
        said = str(error)
    assert said.isprintable()


names = st.binary(min_size=1, max_size=40).filter(lambda b: not {0, 47} & set(b) and not b.startswith(b"."))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(names, min_size=2, max_size=5, unique=True), names, st.sampled_from([".png", ".PNG", ".Jpeg"]))
def test_any_name_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, classes: list[bytes], own: bytes, ending: str
) -> None:
    root = tmp_path_factory.mktemp("names")
    for name in classes:
        folder = root / os.fsdecode(name)
        folder.mkdir()
        for number in range(2):
            shutil.copy(_one(tmp_path_factory), folder / (os.fsdecode(own) + str(number) + ending))
    data = open_data(str(root), **HALF)
    assert counted(data) == dict.fromkeys(sorted(map(os.fsdecode, classes), key=natural_order), 2)
    (folder / (os.fsdecode(own) + "0" + ending)).write_bytes(b"")
    with pytest.raises(DataError, match="an empty file") as raised:
        counted(data)
    assert str(raised.value).isprintable()


_copies: list[Path] = []


def _one(factory: pytest.TempPathFactory) -> Path:
    if not _copies:
        _copies.append(folders.make_classes(factory.mktemp("one"), 1) / "cat" / "0.png")
    return _copies[0]
