"""The optimiser and its schedule, of timm, and the optimiser's state on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from nmfx.errors import CheckpointError, NmfxError
from nmfx.files.parsing import printable
from nmfx.files.sealed import Tensors
from nmfx.masking.parallel import as_share
from nmfx.settings.training import Settings
from nmfx.training.state import SavedOptimizer

AS_WEIGHTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # of optimisers: shaped as their parameters


def make_optimizer(model: nn.Module, settings: Settings, steps: int) -> tuple[Optimizer, Any]:
    """The optimiser of `model` and its scheduler, None for ``none``; an epoch has so many `steps`.

    Raises:
        NmfxError: timm does not know them.
    """
    s = settings
    warmup = s.epochs / 24 if s.warmup_epochs is None else s.warmup_epochs
    times = {"num_epochs": s.epochs, "warmup_epochs": warmup, "updates_per_epoch": steps, "step_on_epochs": False}
    try:
        optimizer = create_optimizer_v2(model, s.opt, lr=s.lr, weight_decay=s.weight_decay, momentum=s.momentum)
        scheduler = create_scheduler_v2(optimizer, s.sched, warmup_lr=s.lr / 1000, **times)[0]
        if scheduler is None and s.sched != "none":  # older versions say nothing
            raise ValueError(f"unknown scheduler {s.sched!r}")
        return optimizer, scheduler
    except (AssertionError, ValueError, TypeError, KeyError, RuntimeError) as error:
        said = error or type(error).__name__
        raise NmfxError(f"timm does not accept opt {s.opt!r} with sched {s.sched!r}: {said}") from error


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
