"""What a compiled model gives against what the model gives."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmfx.errors import NmfxError
from nmfx.runtime.compiled import CompiledModel

ILL = 1e-5  # of the largest output: a model that rounds by more than this is ill conditioned at that input
TIMES = 20.0  # what it may then differ by, in its own rounding: 300 draws of one pixel through ResNetV2's norms gave up to 16


def same(found: Any, wanted: Any, exact: Any = None) -> None:
    """Outputs of one kind, within rounding; `exact` (the model's in float64) widens it where the model is ill conditioned."""
    found, wanted = tree_leaves(found), tree_leaves(wanted)
    exact = wanted if exact is None else tree_leaves(exact)
    assert len(found) == len(wanted) == len(exact)
    for one, other, true in zip(found, wanted, exact, strict=True):
        if isinstance(other, Tensor):
            one, other, true = one.detach(), other.detach(), true.detach()
            assert one.dtype == other.dtype
            scale = float(other.nan_to_num().abs().max()) if other.numel() else 0.0
            own = float((other - true).nan_to_num().abs().max()) if other.numel() else 0.0
            allowed = 1e-4 * scale + (TIMES * own if own > ILL * scale else 0.0)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=allowed, equal_nan=True)
        else:
            assert one == other


def right_or_refused(compiled: CompiledModel, model: nn.Module, x: Tensor) -> bool:
    """Whether it was right; it may be refused instead, by an NmfxError."""
    with torch.no_grad():
        try:
            wanted = model(x)
        except Exception:
            wanted = None
        try:
            found = compiled(x)
        except NmfxError as error:
            found = str(error)
    if isinstance(found, str):
        assert found.startswith("compiled for float32 of sizes")
        assert "got float32" in found
        return False
    assert wanted is not None, "the model itself takes no such input"
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    same(found, wanted, exact)
    return True
