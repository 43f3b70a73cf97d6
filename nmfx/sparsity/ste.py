"""Gradients through a mask: straight-through, SR-STE, or kept weights only."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Gradient = Literal["sr-ste", "ste", "kept"]


class MaskedRead(torch.autograd.Function):
    """``masked = where(mask, weight, 0)`` with the gradient of a training method.

    Backward gives the dense weight, for the gradient ``g`` of the masked one:

    - ``decay >= 0``: ``g + decay * (1 - mask) * weight``, SR-STE (Zhou et al., ICLR 2021, eq. 9); 0 is the plain
      straight-through estimator;
    - ``decay is None``: ``mask * g``, kept weights only (ASP, and the search of DominoSearch).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, masked: Tensor, decay: float | None) -> Tensor:
        """`masked` already holds the value; it is returned as a view, so that a read costs nothing."""
        ctx.decay = decay
        if decay is None:
            ctx.save_for_backward(mask)
        elif decay > 0:
            ctx.save_for_backward(weight, masked)
        return masked.view_as(masked)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Gradient of the dense weight."""
        (grad,) = grads
        if ctx.decay is None:
            (mask,) = ctx.saved_tensors
            return torch.where(mask, grad, grad.new_zeros(())), None, None, None
        if ctx.decay == 0:
            return grad, None, None, None
        weight, masked = ctx.saved_tensors
        dropped = weight - masked  # exactly (1 - mask) * weight: w - w and w - 0 both round to themselves
        return dropped.mul_(ctx.decay).add_(grad), None, None, None
