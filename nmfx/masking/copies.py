"""Copies of models that hold masked weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nmfx.masking.owner import masks_derived, unmask

MASKS_IN_FORWARD = "_masks_in_forward"  # in the __dict__ of a module of a throw-away copy, which tracers leave whole


def throw_away_copy(model: nn.Module, device: str | None = "meta") -> nn.Module:
    """An unmasked deep copy to run and trace: on the meta device it costs no memory; with None the data is copied too."""
    memo: dict[int, Any] = {}
    if device is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            grad = tensor.requires_grad
            memo[id(tensor)] = nn.Parameter(empty, grad) if isinstance(tensor, nn.Parameter) else empty
    result = deep_copy(model, memo)
    for module in result.modules():
        if masks_derived(module):
            module.__dict__[MASKS_IN_FORWARD] = True
        unmask(module, keep_masked=False)
    return result


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy with parameters of its own: a scripted module would copy its parameters into the autograd graph.

    Weights that a hook has computed from parameters (torch.nn.utils.weight_norm), which deepcopy refuses, are copied by value.
    """
    memo = {} if memo is None else memo
    for value in (value for module in model.modules() for value in vars(module).values()):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    with torch.no_grad():
        result = copy.deepcopy(model, memo)
    for new, old in zip(result.parameters(), model.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return result
