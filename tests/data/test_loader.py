"""The laws of the loaders: order, resume, processes, augmentation."""

from __future__ import annotations

import random
from pathlib import Path

import folders
import numpy as np
import pytest
import torch
from timm.data import IterableImageDataset
from torch import Tensor

from nmfx.data.config import PictureConfig
from nmfx.data.loader import TrainLoader, train_loader, validation_loader
from nmfx.data.source import Data, open_data
from nmfx.errors import DataError
from nmfx.settings.training import Augment

SMALL = PictureConfig((3, 24, 24), (0.5,) * 3, (0.25,) * 3)
TINY = PictureConfig((1, 8, 8), (0.3,), (0.4,))
STRONG = Augment(auto_augment="rand-m5-mstd0.5", re_prob=0.5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return open_data(str(folders.make_split(tmp_path_factory.mktemp("pictures"), train=9, validation=3)))


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits")


@pytest.fixture(params=["files", "digits"])
def case(request: pytest.FixtureRequest) -> tuple[Data, PictureConfig, Augment, int]:
    """A data set, what the model expects, strong augmentation, a batch size."""
    data = request.getfixturevalue(request.param)
    return (data, SMALL, STRONG, 4) if request.param == "files" else (data, TINY, Augment(re_prob=0.5), 100)


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for p, q in zip(left, right) for a, b in zip(p, q))


def epoch_of(loader: TrainLoader, epoch: int, skip: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader.set_epoch(epoch, skip=skip)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def as_rows(batches: list[tuple[Tensor, Tensor]]) -> set[bytes]:
    return {picture.numpy().tobytes() for x, _ in batches for picture in x}


def test_a_batch_depends_on_seed_epoch_and_step_only(case: tuple[Data, PictureConfig, Augment, int]) -> None:
    data, config, augment, batch = case
    loader = train_loader(data, config, batch_size=batch, augment=augment, seed=3)
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    fresh = train_loader(data, config, batch_size=batch, augment=augment, seed=3, epoch=1)
    assert same(list(fresh), second)
    assert same(epoch_of(fresh, 0), first)
    assert len(as_rows(first) & as_rows(second)) < 0.4 * len(as_rows(first)), "augmented otherwise in another epoch"
    assert not same(first, epoch_of(train_loader(data, config, batch_size=batch, augment=augment, seed=4), 0))
    plain = Augment(on=False)
    still, later = (train_loader(data, config, batch_size=batch, augment=plain, epoch=epoch) for epoch in (0, 1))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(still, later)), "another order in another epoch"


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_after_k_batches_equals_uninterrupted(case: tuple[Data, PictureConfig, Augment, int], workers: int) -> None:
    data, config, augment, batch = case
    augment = Augment(**{**vars(augment), "mixup": 0.4, "cutmix": 1.0})
    whole = train_loader(data, config, batch_size=batch, augment=augment, seed=1)
    expected = [epoch_of(whole, epoch) for epoch in (0, 1, 2)]
    resumed = train_loader(data, config, batch_size=batch, augment=augment, seed=1, workers=workers, epoch=1, skip=2)
    assert len(resumed) == len(expected[1]) - 2
    assert same(list(resumed), expected[1][2:])
    for _ in resumed:  # left in the middle, with pictures on their way from the workers
        break
    assert same(epoch_of(resumed, 2), expected[2])
    assert same(epoch_of(resumed, 0, skip=len(expected[0])), [])


def test_skipped_batches_are_not_read(files: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = type(files.train).read
    monkeypatch.setattr(type(files.train), "read", lambda self, i, mode: read.append(i) or original(self, i, mode))
    list(train_loader(files, SMALL, batch_size=4, skip=5))
    assert len(read) == len(files.train) - 20 - len(files.train) % 4


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_steps_of_one(case: tuple[Data, PictureConfig, Augment, int], world: int) -> None:
    data, config, augment, batch = case
    alone = list(train_loader(data, config, batch_size=batch * world, augment=augment, seed=5, epoch=2))
    shares = [
        list(train_loader(data, config, batch_size=batch, augment=augment, seed=5, epoch=2, share=(rank, world)))
        for rank in range(world)
    ]
    for step, whole in enumerate(alone):
        x, y = (torch.stack([share[step][part] for share in shares], dim=1).flatten(0, 1) for part in (0, 1))
        assert torch.equal(x, whole[0])
        assert torch.equal(y, whole[1])
    assert [len(share) for share in shares] == [len(alone)] * world


def test_an_epoch_holds_every_picture_once(digits: Data) -> None:
    plain = Augment(on=False)
    shares = [train_loader(digits, TINY, batch_size=599, augment=plain, share=(rank, 2)) for rank in (0, 1)]
    left, right = (as_rows(list(share)) for share in shares)
    assert not left & right
    everything = train_loader(digits, TINY, batch_size=1198, augment=plain)
    assert left | right == as_rows(list(everything))
    assert len(left | right) == 1198


def test_torch_distributed_is_asked(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    loaders = train_loader(digits, TINY, batch_size=599), validation_loader(digits, TINY)
    monkeypatch.undo()
    assert same(list(loaders[0]), list(train_loader(digits, TINY, batch_size=599, share=(1, 2))))
    assert same(list(loaders[1]), list(validation_loader(digits, TINY, share=(1, 2))))


def test_validation_is_whole_ordered_and_shared(files: Data, digits: Data) -> None:
    for data, config in ((files, SMALL), (digits, TINY)):
        whole = list(validation_loader(data, config, batch_size=5))
        labels = torch.cat([y for _, y in whole])
        assert labels.tolist() == data.validation.labels.tolist()
        pair = [
            torch.cat([y for _, y in validation_loader(data, config, batch_size=4, share=(r, 2), workers=r)]) for r in (0, 1)
        ]
        assert pair[0].tolist() == labels[0::2].tolist()
        assert pair[1].tolist() == labels[1::2].tolist()


def test_loaders_leave_the_callers_generators_alone(case: tuple[Data, PictureConfig, Augment, int]) -> None:
    data, config, augment, batch = case
    augment = Augment(**{**vars(augment), "mixup": 0.4})
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    list(train_loader(data, config, batch_size=batch, augment=augment))
    list(validation_loader(data, config))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_mixup_gives_shares_of_classes(digits: Data) -> None:
    x, y = next(iter(train_loader(digits, TINY, batch_size=8, augment=Augment(mixup=1.0, label_smoothing=0.1))))
    assert x.shape == (8, 1, 8, 8)
    assert y.shape == (8, 10)
    torch.testing.assert_close(y.sum(1), torch.ones(8))


def test_digits_are_cropped_and_not_mirrored(digits: Data) -> None:
    """Every augmented digit is one of the nine crops of itself, and all nine occur."""
    loader = train_loader(digits, TINY, batch_size=1198)
    x, y = next(iter(loader))
    still, labels = next(iter(train_loader(digits, TINY, batch_size=1198, augment=Augment(on=False))))
    assert torch.equal(y, labels)
    black = (0 - TINY.mean[0]) / TINY.std[0]
    padded = torch.nn.functional.pad(still, [1] * 4, value=black)
    crops = torch.stack([padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    hits = (crops - x).abs().amax(dim=(2, 3, 4)) < 1e-5
    assert hits.any(0).all()
    assert (hits.sum(1) > 50).all()


def test_mirroring(digits: Data) -> None:
    mirror, still = Augment(padding=0, hflip=1.0), Augment(padding=0)
    left, right = (next(iter(train_loader(digits, TINY, batch_size=64, augment=a)))[0] for a in (mirror, still))
    assert torch.equal(left, right.flip(-1))


class Reader:
    """Stands for timm's tfds and wds readers."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        yield from ((folders.picture(label, self.epoch * 100 + i), label) for i, label in enumerate([0, 1] * (self.count // 2)))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_a_stream_is_timms() -> None:
    parts = [IterableImageDataset("", reader=Reader(count)) for count in (16, 6)]
    data = Data("wds/some", 2, (), *parts)
    loader = train_loader(data, SMALL, batch_size=4, augment=Augment(on=False))
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert not same(first, second)
    assert len(first) == 4
    assert same(epoch_of(loader, 1, skip=3), second[3:])
    assert [len(y) for _, y in validation_loader(data, SMALL, batch_size=4)] == [4, 2]
    assert "a stream" in str(data)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 5000}, "do not fill one step"),
        ({"batch_size": 600, "share": (0, 2)}, "batch 600 x 2 processes"),
        ({"batch_size": 0}, "out of range"),
        ({"share": (2, 2)}, "process 2 of 2"),
        ({"skip": 99}, "an epoch has 18 steps"),
        ({"batch_size": 9, "augment": Augment(mixup=0.2)}, "even batch"),
        ({"augment": Augment(auto_augment="rand-m9")}, "auto_augment is for pictures read from files"),
    ],
)
def test_bad_options_of_a_set_in_memory(digits: Data, options: dict, says: str) -> None:
    with pytest.raises(DataError, match=says):
        train_loader(digits, TINY, **options)


@pytest.mark.parametrize(
    ("augment", "says"),
    [(Augment(padding=4), "for sets in memory"), (Augment(auto_augment="nonsense"), "timm does not accept")],
)
def test_bad_options_of_files(files: Data, augment: Augment, says: str) -> None:
    with pytest.raises(DataError, match=says):
        train_loader(files, SMALL, batch_size=4, augment=augment)


def complaint(loader: TrainLoader) -> str:
    """Not pytest.raises: it keeps the workers in a cycle, and torch then waits for them for 5 s."""
    try:
        list(loader)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
def test_a_broken_picture_is_named(tmp_path: Path, workers: int, damage: str) -> None:
    folder = folders.make_split(tmp_path, train=3, validation=2)
    broken = folder / "train" / "cat" / "1.png"
    content = {"text": b"not a picture", "cut": broken.read_bytes()[:-120], "empty": b""}
    broken.write_bytes(content[damage])
    data = open_data(str(folder))
    message = complaint(train_loader(data, SMALL, batch_size=1, workers=workers))
    assert message.startswith(f"{broken}: the picture cannot be read: ")
    assert "\n" not in message
    list(validation_loader(data, SMALL, workers=workers))
