"""Loaders whose every batch depends on (seed, epoch, step, process) only, so that a run can be resumed anywhere.

A few lines over 300, as training and evaluation read pictures by the same steps.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.data import Mixup, create_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, default_collate

from nmfx import processes
from nmfx.data.augment import ArrayTransform, make_mixup, train_transform
from nmfx.data.config import PictureConfig
from nmfx.data.pictures import ArrayPictures, FilePictures
from nmfx.data.seeding import seed_of, seeded
from nmfx.data.source import Data, Pictures
from nmfx.errors import DataError
from nmfx.settings.training import Augment

Key = tuple[int, int]  # epoch and picture: what a worker is told to prepare
Batch = tuple[Tensor, Tensor]


class PictureLoader:
    """Batches ``(x, y)`` of a torch or timm loader; a broken picture found by a worker is raised here."""

    def __init__(self, inner: DataLoader[Any]) -> None:
        inner.generator = torch.Generator()  # or every pass would draw from the caller's
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.inner:
            if isinstance(batch, DataError):
                raise DataError(str(batch))  # not itself: with this frame it would be a cycle (see FileView)
            x, y = batch
            yield x, y


class TrainLoader(PictureLoader):
    """An epoch of training batches from step `skip` on; ``set_epoch`` chooses which.

    The pictures of step s are a function of (seed, epoch, s, process), their augmentation of (seed, epoch, picture): neither
    depends on what was read before, on the number of workers, or on the caller's generators. Step s of one process with
    batch W*B holds the pictures of step s of W processes with batch B, equally augmented (mixing pairs up within a process).
    The pictures that do not fill a last step sit the epoch out, others in every epoch.
    """

    def __init__(self, inner: DataLoader[Any], *, mixup: Mixup | None, key: tuple[int, int], epoch: int, skip: int) -> None:
        """Made by `train_loader`.

        Args:
            inner: gives the batches of an epoch.
            mixup: mixes them, if they are to be mixed.
            key: the seed and the process, which with the epoch and the step decide how.
            epoch, skip: see `set_epoch`.

        Raises:
            DataError: fewer batches than are to be left out.
        """
        super().__init__(inner)
        self.mixup, self.key = mixup, key
        self.set_epoch(epoch, skip=skip)

    def set_epoch(self, epoch: int, *, skip: int = 0) -> None:
        """Choose the epoch of the next pass, and how many of its first batches to leave out without reading them.

        Raises:
            DataError: fewer batches than are to be left out.
        """
        steps = super().__len__()
        if epoch < 0 or not 0 <= skip <= steps:
            raise DataError(f"cannot start epoch {epoch} at step {skip}: an epoch has {steps} steps")
        self.epoch, self.skip = epoch, skip
        target = self.inner.dataset if self._is_stream else self.inner.batch_sampler
        target.set_epoch(epoch) if self._is_stream else target.start(epoch, skip)  # type: ignore[union-attr]

    def __len__(self) -> int:
        return super().__len__() - self.skip

    def __iter__(self) -> Iterator[Batch]:
        epoch, skip = self.epoch, self.skip
        batches = itertools.islice(super().__iter__(), skip if self._is_stream else 0, None)  # a stream has to be read
        for step, (x, y) in enumerate(batches, start=skip):
            if self.mixup is not None:
                with seeded("mixup", *self.key, epoch, step):
                    x, y = self.mixup(x, y)
            yield x, y

    @property
    def _is_stream(self) -> bool:
        return isinstance(self.inner.dataset, IterableDataset)


class EpochBatches(Sampler[list[Key]]):
    """The batches of one process in one epoch, by torch's DistributedSampler: every W-th picture of a shuffle."""

    def __init__(self, count: int, *, batch_size: int, share: tuple[int, int], seed: int) -> None:
        self.count, self.batch_size, self.share, self.seed = count, batch_size, share, seed
        self.start(0, 0)

    def start(self, epoch: int, skip: int) -> None:
        """Choose the epoch and the first batch of the next pass."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return self.count // self.share[1] // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        rank, world = self.share
        seed = seed_of("order", self.seed, self.epoch)
        pictures: Any = range(self.count)
        order: list[int] = list(DistributedSampler(pictures, num_replicas=world, rank=rank, seed=seed, drop_last=world > 1))
        return self._batches(order, self.epoch, self.skip)  # bound now: set_epoch is for the next pass

    def _batches(self, order: list[int], epoch: int, skip: int) -> Iterator[list[Key]]:
        for start in range(skip * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield [(epoch, index) for index in order[start : start + self.batch_size]]


class FileView(Dataset[Any]):
    """Pictures from files under a transform, as timm's create_loader wants them: it sets ``transform``."""

    def __init__(
        self, pictures: FilePictures, config: PictureConfig, *, indices: Sequence[int] | None = None, seed: int = 0
    ) -> None:
        self.pictures, self.indices, self.seed = pictures, indices, seed
        self.mode = "RGB" if config.input_size[0] == 3 else "L"
        self.transform: Callable[[Any], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.pictures if self.indices is None else self.indices)

    def __getitems__(self, keys: Sequence[Any]) -> list[tuple[Any, int]] | DataError:
        try:
            return [self[key] for key in keys]
        except DataError as error:
            return error  # raised in a worker, it comes as a traceback, in a cycle that delays the worker's end by 5 s

    def __getitem__(self, key: Key | int) -> tuple[Any, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = index if self.indices is None else self.indices[index]
        picture, label = self.pictures.read(index, self.mode)
        if self.transform is None:
            return picture, label
        with seeded("picture", self.seed, epoch, index):
            return self.transform(picture), label


class ArrayView(Dataset[Any]):
    """Pictures in memory under a transform, a whole batch at a time."""

    def __init__(self, transform: ArrayTransform, *, indices: Sequence[int] | None = None, seed: int = 0) -> None:
        self.transform, self.indices, self.seed = transform, indices, seed

    def __len__(self) -> int:
        return len(self.transform.pictures if self.indices is None else self.indices)

    def __getitems__(self, keys: Sequence[Any]) -> Batch:
        epoch = keys[0][0] if isinstance(keys[0], tuple) else 0
        chosen = [key[1] if isinstance(key, tuple) else key for key in keys]
        indices = torch.tensor(chosen if self.indices is None else [self.indices[index] for index in chosen])
        return self.transform(indices, self.seed, epoch), self.transform.pictures.labels[indices]


def train_loader(
    data: Data,
    config: PictureConfig,
    *,
    batch_size: int = 64,
    workers: int = 0,
    augment: Augment | None = None,
    seed: int = 0,
    epoch: int = 0,
    skip: int = 0,
    share: tuple[int, int] | None = None,
) -> TrainLoader:
    """Training batches of `data`, shuffled and augmented; see TrainLoader for what they depend on.

    Args:
        data, config: the pictures, and how they are brought to the model.
        batch_size, workers: pictures of a batch in this process, and processes that read them.
        augment, seed: how pictures are altered (`Augment()` if None), and what the order and the alterations follow from.
        epoch, skip: where to start; ``set_epoch`` of the loader goes on from there.
        share: (this process, number of processes); torch.distributed is asked when it is None.

    Returns:
        A loader of batches ``(x, y)``; y holds shares of classes where mixup is on.

    Raises:
        DataError: too few pictures for one step, options that do not go together.
    """
    augment, (rank, world) = augment or Augment(), share or (processes.rank(), processes.world())
    _check_counts(data, batch_size, workers, rank, world)
    mixup = make_mixup(augment, data.classes, batch_size)
    if isinstance(data.train, IterableDataset):
        inner = _stream(data.train, config, batch_size, workers, augment)
    else:
        batches = EpochBatches(len(data.train), batch_size=batch_size, share=(rank, world), seed=seed)
        if not len(batches):
            need = f"batch {batch_size} x {world} processes"
            raise DataError(
                f"{data.name}: {len(data.train)} training pictures do not fill one step ({need}); take smaller batches"
            )
        view = _view(data.train, config, augment=augment, seed=seed)
        pinned = torch.cuda.is_available()  # timm's create_loader makes its own order, which cannot be resumed
        inner = DataLoader(
            view,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            persistent_workers=workers > 0,
            pin_memory=pinned,
        )
    return TrainLoader(inner, mixup=mixup, key=(seed, rank), epoch=epoch, skip=skip)


def validation_loader(
    data: Data, config: PictureConfig, *, batch_size: int = 256, workers: int = 0, share: tuple[int, int] | None = None
) -> PictureLoader:
    """The validation pictures in their own order; each process sees every W-th, none twice, and the last batch may be short.

    Args: as `train_loader`.

    Returns:
        ``(pictures, labels)`` by batches.

    Raises:
        DataError: numbers out of range.
    """
    rank, world = share or (processes.rank(), processes.world())
    _check_counts(data, batch_size, workers, rank, world)
    return eval_loader(data.validation, config, batch_size=batch_size, workers=workers, part=(rank, world))


def eval_loader(
    pictures: Pictures,
    config: PictureConfig,
    *,
    batch_size: int,
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
    indices: Sequence[int] | None = None,
) -> PictureLoader:
    """Batches of `pictures` under the validation transform.

    Args:
        pictures: in memory, in files, or a stream.
        config: how they are brought to the model.
        batch_size: pictures a batch.
        workers: processes that read them; 0: this one.
        part: ``(k, n)``: every n-th picture from the k-th on.
        indices: those at these places instead, in this order.

    Returns:
        ``(pictures, labels)`` by batches, the last one perhaps short.
    """
    if isinstance(pictures, IterableDataset):
        return PictureLoader(_stream(pictures, config, batch_size, workers, None))
    own = range(part[0], len(pictures), part[1]) if indices is None else indices
    view = _view(pictures, config, indices=own)
    if isinstance(view, ArrayView):
        return PictureLoader(DataLoader(view, batch_size, num_workers=workers, collate_fn=_collate))
    return PictureLoader(_timm_loader(view, config, batch_size, workers))


def _view(
    pictures: ArrayPictures | FilePictures,
    config: PictureConfig,
    *,
    augment: Augment | None = None,
    indices: Sequence[int] | None = None,
    seed: int = 0,
) -> ArrayView | FileView:
    if isinstance(pictures, ArrayPictures):
        return ArrayView(ArrayTransform(pictures, config, augment), indices=indices, seed=seed)
    view = FileView(pictures, config, indices=indices, seed=seed)
    view.transform = train_transform(config, augment) if augment else None
    return view


def _stream(
    dataset: IterableDataset[Any], config: PictureConfig, batch_size: int, workers: int, augment: Augment | None
) -> DataLoader[Any]:
    own = copy.copy(dataset)  # the transform is set on it
    loader = _timm_loader(own, config, batch_size, workers, is_training=augment is not None)
    own.transform = train_transform(config, augment) if augment else own.transform  # type: ignore[attr-defined]
    return loader


def _timm_loader(
    dataset: Dataset[Any], config: PictureConfig, batch_size: int, workers: int, *, is_training: bool = False
) -> DataLoader[Any]:
    loader: DataLoader[Any] = create_loader(
        dataset,
        config.input_size,
        batch_size,
        is_training=is_training,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        use_prefetcher=False,
        persistent_workers=False,
    )
    return loader


def _collate(samples: Any) -> Any:
    return default_collate(samples) if isinstance(samples, list) else samples  # a whole batch already, or a DataError


def _check_counts(data: Data, batch_size: int, workers: int, rank: int, world: int) -> None:
    if batch_size < 1 or workers < 0 or not 0 <= rank < world:
        raise DataError(f"{data.name}: batch {batch_size}, {workers} workers, process {rank} of {world}: out of range")
