"""Gradients through a mask, straight through or of kept weights only, and SR-STE's pull on what is dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dense_gradient(grad: Tensor, mask: Tensor, kept_only: bool) -> Tensor:
    """Gradient of the dense weight from that of the masked one, ``g``.

    - as it is: the straight-through estimator; SR-STE adds its pull when the weight is updated (see `pulled`);
    - ``kept_only``: ``mask * g`` (ASP, and the search of DominoSearch).
    """
    return torch.where(mask, grad, torch.zeros((), dtype=grad.dtype, device=grad.device)) if kept_only else grad


def pulled(grad: Tensor, weight: Tensor, mask: Tensor, decay: float | Tensor) -> Tensor:
    """``grad + decay * (1 - mask) * weight``, a new tensor: the gradient of SR-STE (Zhou et al., ICLR 2021, eq. 9)."""
    dropped = torch.where(mask, torch.zeros((), dtype=weight.dtype, device=weight.device), weight)
    return dropped.to(grad.dtype).mul_(decay).add_(grad)


class MaskedRead(torch.autograd.Function):
    """The masked value that is already there, with the gradient of a training method; the fast path of eager mode.

    Tensors are kept outside of autograd's saved tensors, so that one output can serve every read between two updates, whatever
    the order of their backward passes; what `note`, a weak reference, points to is marked dirty when one has run.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, masked: Tensor, kept_only: bool, note: Any) -> Tensor:
        """A read that costs nothing.

        Args:
            ctx: autograd's.
            weight: the dense weight, which gets the gradient.
            mask: bool, true = kept.
            masked: the value, ``where(mask, weight, 0)``.
            kept_only: dropped weights get no gradient.
            note: a weak reference to the cache that a backward pass makes dirty.

        Returns:
            A view of `masked`.
        """
        ctx.mask, ctx.kept_only, ctx.note = mask, kept_only, note
        return masked.view_as(masked)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the dense weight."""
        if (cache := ctx.note()) is not None:
            cache.dirty = True
        return dense_gradient(grads[0], ctx.mask, ctx.kept_only), None, None, None, None


class MaskedCompute(torch.autograd.Function):
    """`MaskedRead` for compilers and function transforms, which must see the computation: nothing is cached."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, kept_only: bool) -> Tensor:
        """``where(mask, weight, 0)``."""
        return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradient needs."""
        _, mask, ctx.kept_only = inputs
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the dense weight."""
        (mask,) = ctx.saved_tensors
        return dense_gradient(grads[0], mask, ctx.kept_only), None, None
