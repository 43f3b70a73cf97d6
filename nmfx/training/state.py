"""A training run on disk, and what has to agree for it to go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nmfx.errors import CheckpointError
from nmfx.graph.parallel import as_share
from nmfx.states import Tensors, read_state, write_state

KIND = "finetune"


def save_state(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a state whole or not at all.

    Raises:
        CheckpointError: a number is not finite: such a state would be of no use, and take the place of a good one.
        NmfxError: it cannot be written.
    """
    if broken := next((n for n, v in tensors.items() if v.is_floating_point() and not bool(v.isfinite().all())), None):
        raise CheckpointError(f"{path}: {broken} is not finite any more; not saved, the state before is intact; lower lr")
    write_state(path, KIND, tensors, {"about": dict(about)})


def load_state(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """What `save_state` was given.

    Raises:
        CheckpointError: no such file, or it is not of a training run.
    """
    tensors, header = read_state(path, KIND, "a training run", "about")
    return tensors, header["about"]


def check_identity(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run on disk is the one that is asked for.

    Raises:
        CheckpointError: naming the settings that differ.
    """
    now = {"parallel": "ddp", **json.loads(json.dumps(dict(now)))}
    before = {"parallel": "ddp", **before}  # runs from before there was FSDP
    names = dict.fromkeys((*now, *before))
    different = [f"{name} {_shown(before, name)} -> {_shown(now, name)}" for name in names if before.get(name) != now.get(name)]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise CheckpointError(
            f"{path} is of a run with other settings ({'; '.join(different[:3])}{more}); give the same ones to resume it, or "
            f"--force (another folder, from Python) to start anew"
        )


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return str(settings.get(name, "absent"))[:120]


def fill(model: nn.Module, tensors: Tensors, path: Path) -> None:
    """Load a state dict, key for key; where the model's weights are shared out, every process takes its own.

    Raises:
        CheckpointError: it is of another model.
    """
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


def restore_optimizer(optimizer: Optimizer, tensors: Tensors, plain: Mapping[str, Any]) -> None:
    """Give an optimiser of the same parameters the state that `optimizer_state` took."""
    whole = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole["state"] = {}
    for key, value in {**tensors, **plain["numbers"]}.items():
        index, name = int(key.partition(".")[0]), key.partition(".")[2]
        if isinstance(value, Tensor) and value.shape == parameters[index].shape:  # in its parameter's memory format
            like = torch.empty_like(parameters[index], dtype=value.dtype, requires_grad=False)
            value = like.copy_(as_share(value, like))
        whole["state"].setdefault(index, {})[name] = value
    for group, saved in zip(whole["param_groups"], plain["groups"], strict=True):
        group.update(saved)
    optimizer.load_state_dict(whole)


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that stand for all weights and buffers of a model's state dict."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
