"""calibration: training pictures only, always the same ones, of all classes alike."""

from __future__ import annotations

from pathlib import Path

import folders
import pytest
import torch

from nmfx.data.config import PictureConfig
from nmfx.data.loader import train_loader, validation_loader
from nmfx.data.pictures import FilePictures
from nmfx.data.sample import calibration
from nmfx.data.source import Data, open_data
from nmfx.errors import DataError
from nmfx.settings.training import Augment

SMALL = PictureConfig((3, 24, 24), (0.5,) * 3, (0.25,) * 3)
TINY = PictureConfig((1, 8, 8), (0.3,), (0.4,))


@pytest.fixture(params=["files", "held back", "digits"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Data, PictureConfig]:
    if request.param == "digits":
        return open_data("digits"), TINY
    split = request.param == "files"
    folder = folders.make_split(tmp_path, train=8, validation=2) if split else folders.make_classes(tmp_path, 10)
    return open_data(str(folder)), SMALL


def rows(batches) -> list[bytes]:
    return [picture.numpy().tobytes() for x, _ in batches for picture in x]


def test_never_a_validation_picture(case: tuple[Data, PictureConfig]) -> None:
    data, config = case
    chosen = rows(calibration(data, config, count=len(data.train), batch_size=50))
    validation = rows(validation_loader(data, config))
    assert not set(chosen) & set(validation)
    assert len(set(chosen)) == len(data.train)


def test_seeded_and_spread(case: tuple[Data, PictureConfig]) -> None:
    data, config = case
    batches = calibration(data, config, count=20, batch_size=6)
    assert [len(y) for _, y in batches] == [6, 6, 6, 2]
    counts = torch.cat([y for _, y in batches]).bincount(minlength=data.classes)
    assert counts.max() - counts.min() <= 1
    torch.manual_seed(7)
    again = calibration(data, config, count=20, batch_size=6)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, again))
    assert rows(calibration(data, config, count=12, batch_size=6)) == rows(batches)[:12]
    assert set(rows(calibration(data, config, count=20, batch_size=6, seed=1))) != set(rows(batches))


def test_a_training_loader_does_not_change_it() -> None:
    data = open_data("digits")
    before = rows(calibration(data, TINY, count=10))
    list(train_loader(data, TINY, batch_size=400, augment=Augment(re_prob=1.0)))
    assert rows(calibration(data, TINY, count=10)) == before


def test_a_small_class_is_used_up_first(tmp_path: Path) -> None:
    folders.make_classes(tmp_path / "train", 9)
    for number in range(1, 9):
        (tmp_path / "train" / "dog" / f"{number}.png").unlink()
    folders.make_classes(tmp_path / "val", 1, first=50)
    batches = calibration(open_data(str(tmp_path)), SMALL, count=11)
    assert batches[0][1].bincount().tolist() == [5, 5, 1]


def test_unknown_labels_are_not_spread(tmp_path: Path) -> None:
    data = open_data(str(folders.make_split(tmp_path, train=4, validation=1)))
    unlabelled = Data("some", 3, (), FilePictures(data.train.source), data.validation)
    assert len(calibration(unlabelled, SMALL, count=5)[0][1]) == 5


@pytest.mark.parametrize(("count", "says"), [(1199, "only 1198 for training"), (0, "out of range")])
def test_bad_counts(count: int, says: str) -> None:
    with pytest.raises(DataError, match=says):
        calibration(open_data("digits"), TINY, count=count)
