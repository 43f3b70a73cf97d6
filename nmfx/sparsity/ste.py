"""Gradients through a mask: straight-through, SR-STE, or kept weights only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nmfx.errors import NmfxError


def dense_gradient(grad: Tensor, weight: Tensor, mask: Tensor, masked: Tensor, decay: float | None) -> Tensor:
    """Gradient of the dense weight from that of the masked one, ``g``.

    - ``decay >= 0``: ``g + decay * (1 - mask) * weight``, SR-STE (Zhou et al., ICLR 2021, eq. 9); 0 is the plain
      straight-through estimator;
    - ``decay is None``: ``mask * g``, kept weights only (ASP, and the search of DominoSearch).
    """
    if decay is None:
        return torch.where(mask, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))
    if decay == 0:
        return grad
    dropped = weight - masked  # exactly (1 - mask) * w: w - w and w - 0 need no rounding
    return dropped.mul_(decay).add_(grad)  # one new tensor, not three: fresh memory costs more than the arithmetic


class MaskedRead(torch.autograd.Function):
    """The masked value that is already there, with the gradient of a training method; the fast path of eager mode.

    It saves no tensors in the autograd sense, so that one output can serve every read between two updates, whatever the order
    of their backward passes; what `note`, a weak reference, points to is marked dirty when one has run.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, masked: Tensor, decay: float | None, note: Any) -> Tensor:
        """A view of `masked`: a read costs nothing."""
        ctx.weight, ctx.mask, ctx.masked, ctx.decay, ctx.note = weight, mask, masked, decay, note
        return masked.view_as(masked)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the dense weight."""
        if (cache := ctx.note()) is not None:
            cache.dirty = True
        if ctx.decay and not ctx.weight.untyped_storage().nbytes():  # reading freed memory would end the process
            raise NmfxError(
                "a masked weight was freed before its backward pass: FSDP needs a backward pass after every forward pass with "
                "gradients; run the others under torch.no_grad()"
            )
        return dense_gradient(grads[0], ctx.weight.detach(), ctx.mask, ctx.masked, ctx.decay), None, None, None, None


class MaskedCompute(torch.autograd.Function):
    """The same for compilers and function transforms: everything is computed and saved in the open."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, decay: float | None) -> Tensor:
        """``where(mask, weight, 0)``."""
        return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradient needs."""
        weight, mask, ctx.decay = inputs
        ctx.save_for_backward(weight, mask, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the dense weight."""
        weight, mask, masked = ctx.saved_tensors
        if ctx.decay:
            return grads[0] + (weight - masked).detach() * ctx.decay, None, None  # in place would not do under vmap
        return dense_gradient(grads[0], weight, mask, masked, ctx.decay), None, None
