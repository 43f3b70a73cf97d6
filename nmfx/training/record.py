"""What a training run says of itself: while it runs, after every epoch, at the end."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from nmfx.errors import NmfxError
from nmfx.files.atomic import write_text
from nmfx.training.evaluation import Evaluation


@dataclass(frozen=True)
class Progress:
    """After an update: `step` of `steps` in `epoch` of `epochs` (both from 0), the epoch's mean loss so far, the last top-1."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    images_per_second: float
    top1: float | None

    @property
    def share(self) -> float:
        """How much of the run is done, 0..1."""
        return (self.epoch + (self.step + 1) / self.steps) / self.epochs


@dataclass(frozen=True)
class Epoch:
    """A line of the log: mean training loss, then what the validation pictures say; `lr` is that of the last update."""

    epoch: int
    train_loss: float
    top1: float
    top5: float
    loss: float
    lr: float
    images_per_second: float


@dataclass(frozen=True)
class Finetuned:
    """The end of a run: the trained model on the validation pictures, every epoch, and the best one."""

    evaluation: Evaluation
    epochs: tuple[Epoch, ...]
    distilled: bool = False

    @property
    def best(self) -> Epoch:
        """The first epoch of the highest top-1; the last one where the dense model's answers were learnt alone: its learning
        rate has come down, and held-back pictures are too few to choose among hundreds of epochs.
        """
        return self.epochs[-1] if self.distilled else max(self.epochs, key=lambda epoch: epoch.top1)


@dataclass
class Position:
    """Where a run stands, in numbers: the next update, the loss summed over the epoch's updates, the log."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    log: list[Epoch] = field(default_factory=list)

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy after the last epoch, 0..1; None before the first."""
        return self.log[-1].top1 if self.log else None


def write_log(path: Path, epochs: Iterable[Epoch]) -> None:
    """The log as CSV, whole: after a resume no line is missing and none is there twice."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [column.name for column in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in epochs)
    write_text(path, text.getvalue())


class Board:
    """TensorBoard's view of the log, if it is asked for."""

    def __init__(self, folder: Path | None, *, start: int) -> None:
        self.writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise NmfxError(f"TensorBoard logs need the package ({error}): pip install tensorboard") from error
        self.writer = SummaryWriter(str(folder), purge_step=start)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.writer is not None:
            self.writer.close()

    def add(self, epoch: Epoch) -> None:
        """Add a point to the curve of each number of the log."""
        if self.writer is not None:
            for name, value in asdict(epoch).items():
                self.writer.add_scalar(name, value, epoch.epoch)
            self.writer.flush()
