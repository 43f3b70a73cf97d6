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
from torch.optim import Optimizer

from nmfx.errors import CheckpointError
from nmfx.files.parsing import Count, Finite, Form, printable
from nmfx.files.sealed import Tensors
from nmfx.files.states import check_tensors, read_state, write_state
from nmfx.masking.parallel import as_share
from nmfx.training.record import Epoch

KIND = "finetune"
AS_WEIGHTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # of optimisers: shaped as their parameters
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
    write_state(path, KIND, tensors, _storable(about))


def _storable(value: Any) -> Any:
    """A tree that JSON can hold: a float that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: _storable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    different = [f"{name} {_shown(before, name)} -> {_shown(now, name)}" for name in names if before.get(name) != now.get(name)]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        shown = "; ".join(printable(each, 200) for each in different[:3])
        raise CheckpointError(
            f"{path} is of a run with other settings ({shown}{more}); give the same ones to resume it, or "
            f"--force (another folder, from Python) to start anew"
        )


def _shown(settings: Mapping[str, Any], name: str) -> str:
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


def fill(model: nn.Module, tensors: Tensors, path: Path) -> None:
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


def optimizer_state(optimizer: Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """The state of any optimiser: tensors as ``parameter.name``, and the numbers of parameters and groups.

    Raises:
        CheckpointError: it keeps something else.
    """
    whole, tensors, numbers = optimizer.state_dict(), {}, {}
    for index, entries in whole["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            elif value is None or isinstance(value, int | float | str):
                numbers[f"{index}.{name}"] = value
            else:
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} ({name}), which cannot be saved"
                )
    groups = [{k: v for k, v in group.items() if isinstance(v, int | float)} for group in whole["param_groups"]]
    return tensors, {"numbers": numbers, "groups": groups}


def check_optimizer(optimizer: Optimizer, tensors: Tensors, plain: SavedOptimizer, path: Path) -> None:
    """Check that a saved state is one of `optimizer`, before anything is changed.

    Raises:
        CheckpointError: it has other parameters or groups, or a tensor of neither a parameter's shape nor one number.
    """
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[str, set[str]] = {}
    for key in (*tensors, *plain.numbers):
        index, _, name = key.partition(".")
        if not (index.isascii() and index.isdigit() and len(index) < 10 and int(index) < len(shapes) and name):
            raise CheckpointError(f"{path}: optimizer: {printable(key)} is of none of its {len(shapes)} parameters")
        value = tensors.get(key)
        shape = {"step": torch.Size(), **dict.fromkeys(AS_WEIGHTS, shapes[int(index)])}.get(name)
        if value is not None and shape is not None and value.shape != shape:
            raise CheckpointError(f"{path}: optimizer: {key} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        entries.setdefault(index, set()).add(name)
    if len({frozenset(names) for names in entries.values()}) > 1:
        raise CheckpointError(f"{path}: optimizer: entries of some parameters are missing")
    groups = [group.keys() for group in optimizer.param_groups]
    if len(groups) != len(plain.groups) or not all(saved.keys() <= own for saved, own in zip(plain.groups, groups)):
        raise CheckpointError(f"{path}: optimizer: its {len(plain.groups)} groups have other options than this run's")


def restore_optimizer(optimizer: Optimizer, tensors: Tensors, plain: SavedOptimizer, path: Path) -> None:
    """Give an optimiser of the same parameters the state that `optimizer_state` took (see `check_optimizer`).

    Raises:
        CheckpointError: it does not take it, and is then as it was.
    """
    whole = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole["state"] = {}
    for key, value in {**tensors, **plain.numbers}.items():
        index, name = int(key.partition(".")[0]), key.partition(".")[2]
        if isinstance(value, Tensor) and value.shape == parameters[index].shape:  # in its parameter's memory format
            like = torch.empty_like(parameters[index], dtype=value.dtype, requires_grad=False)
            value = like.copy_(as_share(value, like))
        whole["state"].setdefault(index, {})[name] = value
    for group, saved in zip(whole["param_groups"], plain.groups, strict=True):
        group.update(saved)
    before = dict(optimizer.__dict__)
    try:
        optimizer.load_state_dict(whole)
    except Exception as error:  # of any optimiser
        optimizer.__dict__.update(before)
        raise CheckpointError(f"{path}: optimizer: {type(error).__name__}: {printable(str(error))}") from error


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that stand for all weights and buffers of a model's state dict."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
