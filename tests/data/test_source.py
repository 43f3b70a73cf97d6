"""open_data: what is found under a name, and what is said about what cannot be used."""

from __future__ import annotations

import gzip
from pathlib import Path

import folders
import numpy as np
import pytest
import torch
from PIL import Image

from nmfx.data.arrays import DEBIAN
from nmfx.data.config import PictureConfig
from nmfx.data.loader import train_loader, validation_loader
from nmfx.data.pictures import FilePictures
from nmfx.data.source import open_data
from nmfx.demo.digits import load_demo, load_digits_data
from nmfx.errors import DataError
from nmfx.settings.training import Augment
from nmfx.training.evaluation import evaluate

fashion = pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
OWN = Augment(on=False)


def test_digits_are_the_demos() -> None:
    data = open_data("digits")
    _, _, test_x, test_y = load_digits_data()
    config = PictureConfig((1, 8, 8), data.mean, data.std)
    (x, y), *_ = validation_loader(data, config, batch_size=599)
    torch.testing.assert_close(x, test_x, rtol=1e-5, atol=1e-6)
    assert torch.equal(y, test_y)
    assert (len(data.train), len(data.validation), data.classes, data.shape) == (1198, 599, 10, (1, 8, 8))
    assert evaluate(load_demo(trained=True), validation_loader(data, config)).top1 > 0.98
    assert str(data) == "digits: 1,198 training and 599 validation pictures of 10 classes, 1x8x8"


@fashion
def test_fashion_mnist() -> None:
    data = open_data("fashion-mnist")
    assert (len(data.train), len(data.validation), data.shape) == (60_000, 10_000, (1, 28, 28))
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.mean == pytest.approx((0.2860,), abs=1e-4)  # as published
    assert data.std == pytest.approx((0.3530,), abs=1e-4)
    assert data.class_names[9] == "ankle boot"
    (x, _), *_ = validation_loader(data, PictureConfig((1, 32, 32), (0.0,), (1.0,)), batch_size=8)
    (native, _), *_ = validation_loader(data, PictureConfig((1, 28, 28), (0.0,), (1.0,)), batch_size=8)
    assert torch.equal(x[:, :, 2:30, 2:30], native), "28 to 32 by black borders"
    assert x.count_nonzero() == native.count_nonzero()
    (x, _), *_ = validation_loader(data, PictureConfig((3, 64, 64), (0.0,) * 3, (1.0,) * 3, "bicubic"), batch_size=8)
    assert x.shape == (8, 3, 64, 64)
    assert torch.equal(x[:, 0], x[:, 2])
    assert 0 <= x.min() <= x.max() <= 1


def write_idx(folder: Path, *, packed: bool = False, count: int = 60) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pictures = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, values in (("images-idx3", pictures), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            content = header + values.tobytes()
            name = f"{part}-{kind}-ubyte" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(content) if packed else content)


def test_fashion_mnist_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "home" / "fashion-mnist", packed=True)
    monkeypatch.setenv("NMFX_DATA", str(tmp_path / "home"))
    assert len(open_data("fashion-mnist").train) == 60
    write_idx(tmp_path / "root" / "FashionMNIST" / "raw", count=50)
    assert len(open_data("fashion-mnist", root=tmp_path / "root").train) == 50, "root goes first"
    own, timms = open_data("fashion-mnist", root=tmp_path / "root"), open_data("torch/fashion_mnist", root=tmp_path / "root")
    assert torch.equal(own.train.pictures, timms.train.pictures)
    assert torch.equal(own.validation.labels, timms.validation.labels)
    assert timms.classes == 10
    damaged = tmp_path / "home" / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: the idx file cannot be read"):
        open_data("fashion-mnist")
    monkeypatch.setattr("nmfx.data.arrays.DEBIAN", tmp_path / "none")
    monkeypatch.delenv("NMFX_DATA")
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        open_data("fashion-mnist")


@pytest.mark.parametrize("named", ["val", "validation"])
def test_a_folder_in_two_parts(tmp_path: Path, named: str) -> None:
    data = open_data(str(folders.make_split(tmp_path, train=4, validation=2, named=named)))
    assert (len(data.train), len(data.validation), data.classes, data.note) == (12, 6, 3, "")
    assert data.class_names == folders.CLASSES
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.shape is None


def test_other_names_for_the_parts(tmp_path: Path) -> None:
    folders.make_split(tmp_path, train=2, validation=1, named="test")
    assert len(open_data(str(tmp_path), val_split="test").validation) == 3
    with pytest.raises(DataError, match="has train/ but no validation/"):
        open_data(str(tmp_path))


def test_a_class_without_validation_pictures_keeps_the_labels(tmp_path: Path) -> None:
    folders.make_classes(tmp_path / "train", 2)
    folders.make_classes(tmp_path / "val", 2, classes=("bird", "dog"))
    data = open_data(str(tmp_path))
    assert data.validation.labels.tolist() == [0, 0, 2, 2]
    assert data.note == "1 of 3 classes have no validation picture"


def names_of(pictures: FilePictures) -> set[str]:
    return {pictures.source.filename(i) for i in pictures.indices}


def test_class_folders_have_a_part_held_back(tmp_path: Path) -> None:
    data = open_data(str(folders.make_classes(tmp_path / "a", 20)))
    assert data.validation.labels.bincount().tolist() == [2, 2, 2]
    assert data.train.labels.bincount().tolist() == [18, 18, 18]
    assert "6 of 60 pictures held back" in data.note
    assert not names_of(data.train) & names_of(data.validation)
    for pictures in (data.train, data.validation):
        assert [pictures.read(i, "RGB")[1] for i in range(len(pictures))] == pictures.labels.tolist()
    again = open_data(str(folders.make_classes(tmp_path / "b", 20)))
    assert names_of(again.validation) == names_of(data.validation)
    assert len(open_data(str(tmp_path / "a"), held_back=0.5).validation) == 30


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    folders.make_classes(tmp_path, 3, classes=("car", "train"))
    assert open_data(str(tmp_path)).class_names == ("car", "train")


def test_grey_pictures_for_a_grey_model(tmp_path: Path) -> None:
    data = open_data(str(folders.make_split(tmp_path, train=2, validation=1)))
    config = PictureConfig((1, 16, 16), (0.5,), (0.5,))
    for loader in (train_loader(data, config, batch_size=6), validation_loader(data, config)):
        assert next(iter(loader))[0].shape[1:] == (1, 16, 16)


def only_one_part(folder: Path) -> None:
    folders.make_classes(folder / "train", 2)


def no_class_folders(folder: Path) -> None:
    for part in ("train", "val"):
        (folder / part).mkdir()
        folders.picture(0, 0).save(folder / part / "a.png")


def only_pictures(folder: Path) -> None:
    folders.picture(0, 0).save(folder / "a.png")


def empty_class(folder: Path) -> None:
    folders.make_classes(folder, 2)
    (folder / "cow").mkdir()


def unknown_class(folder: Path) -> None:
    folders.make_classes(folder / "train", 2, classes=("a", "b"))
    folders.make_classes(folder / "val", 2, classes=("a", "c"))


def stray(folder: Path) -> None:
    folders.picture(0, 0).save(folders.make_classes(folder, 2) / "a.png")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "it is empty"),
        (only_one_part, "has train/ but no validation/"),
        (no_class_folders, "train, val hold no class folders"),
        (only_pictures, "pictures, but no class folders"),
        (empty_class, "cow: holds no pictures"),
        (unknown_class, "c: this class has no training pictures"),
        (stray, r"a\.png: a picture outside the class folders"),
        (lambda folder: folders.make_classes(folder, 3, classes=("one",)), "only one class"),
        (lambda folder: folders.make_classes(folder, 1), "one picture cannot be both"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, make, says: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=says):
        open_data(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/nowhere/at/all", "no such folder"),
        (__file__, "not a folder"),
        ("digit", "did you mean 'digits'"),
        ("fashion_mnist", "did you mean"),
        ("cifar100", "did you mean 'torch/cifar100'"),
        ("x", "is called 'x'; known"),
        ("torch/cifar1000", "did you mean 'cifar100'"),
        ("torch/cifar10", "say where it is kept"),
        ("hfds/some/thing", "hfds/some/thing cannot be opened"),
        ("wds/some", "wds/some cannot be opened"),
    ],
)
def test_names_that_are_not_known(name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_data(name)


def test_torchvision_sets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"torch/cifar10 cannot be opened .*not found"):
        open_data("torch/cifar10", root=tmp_path)
    write_idx(tmp_path / "MNIST" / "raw")
    with pytest.raises(DataError, match=r"no part 'tset'.*did you mean 'test'"):
        open_data("torch/mnist", root=tmp_path, val_split="tset")
    data = open_data("torch/mnist", root=tmp_path)
    assert (data.train.hflip, data.train.padding, data.shape) == (0.0, 4, (1, 28, 28))


class Listed:
    """Stands for a set that timm opens, read picture by picture, whose labels are not known beforehand."""

    classes = ("a", "b")

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 7:
            raise OSError("no more")
        return folders.picture(index % 2, index), index % 2


def test_what_timm_opens_is_read_picture_by_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmfx.data.source.create_dataset", lambda *_, **__: Listed())
    data = open_data("hfds/some/thing")
    assert (data.classes, data.train.labels) == (2, None)
    with pytest.raises(DataError, match="picture 7: the picture cannot be read: no more"):
        list(train_loader(data, PictureConfig((3, 16, 16), (0.5,) * 3, (0.5,) * 3), batch_size=2))
