"""What a compiled model gives against what the model gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmfx.errors import NmfxError
from nmfx.runtime.compiled import CompiledModel


def same(found: Any, wanted: Any) -> None:
    """Outputs of one kind, within rounding."""
    found, wanted = tree_leaves(found), tree_leaves(wanted)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, Tensor):
            other = other.detach()
            assert one.dtype == other.dtype
            scale = float(other.nan_to_num().abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * scale, equal_nan=True)
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
    same(found, wanted)
    return True
