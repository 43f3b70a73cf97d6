"""A training run on disk, and what has to agree for it to go on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from nmfx.errors import CheckpointError
from nmfx.files.parsing import Count, Finite, Form, printable
from nmfx.files.sealed import Tensors
from nmfx.files.states import check_tensors, read_state, write_state
from nmfx.masking.parallel import as_share
from nmfx.training.record import Epoch

KIND = "finetune"
T = TypeVar("T")


class SavedEpoch(Form, frozen=True):
    """An `Epoch` in a file; null is what was not finite."""

    epoch: Count
    train_loss: Finite | None
    top1: Finite | None
    top5: Finite | None
    loss: Finite | None
    lr: Finite
    images_per_second: Finite

    @property
    def value(self) -> Epoch:
        """The epoch as a line of the log."""
        said: Any = {key: math.nan if each is None else each for key, each in msgspec.to_builtins(self).items()}
        return Epoch(**said)


class SavedPosition(Form, frozen=True):
    """A `Position` of the trainer in a file."""

    epoch: Count
    step: Count
    loss: Finite
    log: list[SavedEpoch]


class SavedOptimizer(Form, frozen=True):
    """The numbers of an optimiser's state in a file: those beside its tensors, and its groups' options."""

    numbers: dict[str, int | Finite | str | None]
    groups: list[dict[str, bool | int | Finite]]


class SavedRun(Form, frozen=True):
    """The state of a training run in a file, but for its tensors."""

    identity: dict[str, Any]
    at: SavedPosition
    optimizer: SavedOptimizer


def save_state(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a state whole or not at all.

    Raises:
        CheckpointError: a number is not finite: such a state would be of no use, and take the place of a good one.
        NmfxError: it cannot be written.
    """
    if broken := next((n for n, v in tensors.items() if v.is_floating_point() and not bool(v.isfinite().all())), None):
        raise CheckpointError(f"{path}: {broken} is not finite any more; not saved, the state before is intact; lower lr")
    write_state(path, KIND, tensors, msgspec.json.decode(msgspec.json.encode(about)))  # which makes null of NaN and infinity


def load_state(path: Path, form: type[T]) -> tuple[Tensors, T]:
    """Tensors and numbers of a state that `save_state` has written, the numbers as a value of `form`.

    Raises:
        CheckpointError: no such file, altered since it was written, or it is not of a training run.
    """
    return read_state(path, KIND, "a training run", form)


def check_identity(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run on disk is the one that is asked for.

    Raises:
        CheckpointError: naming the settings that differ.
    """
    now = json.loads(json.dumps(dict(now)))
    names = dict.fromkeys((*now, *before))
    different = [
        f"{name} {_value_of(before, name)} -> {_value_of(now, name)}" for name in names if before.get(name) != now.get(name)
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        shown = "; ".join(printable(each, 200) for each in different[:3])
        raise CheckpointError(
            f"{path} is of a run with other settings ({shown}{more}); give the same ones to resume it, or "
            f"--force (another folder, from Python) to start anew"
        )


def _value_of(settings: Mapping[str, Any], name: str) -> str:
    return printable(str(settings.get(name, "absent")), 120)


def check_fits(model: nn.Module, tensors: Tensors, path: Path) -> None:
    """Check that a state dict is one of `model`, before anything is changed.

    Raises:
        CheckpointError: naming the first difference.
    """
    try:
        check_tensors(model.state_dict(), tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: of another model: {error}") from error


def load_into(model: nn.Module, tensors: Tensors, path: Path) -> None:
    """Load a state dict, key for key; where the model's weights are shared out, every process takes its own.

    Raises:
        CheckpointError: it is of another model, which is then as it was.
    """
    check_fits(model, tensors, path)
    own = model.state_dict()
    try:
        model.load_state_dict({name: as_share(value, own.get(name)) for name, value in tensors.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{path}: of another model: {' '.join(str(error).split())[:300]}") from error


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that stand for all weights and buffers of a model's state dict."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
