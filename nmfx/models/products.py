"""Operations that sum over products (convolutions, matmuls), and which of their operands may be weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Operand:
    """One operand of a product that may be a weight; `dim` is summed over together with the `other` operand."""

    tensor: Tensor
    dim: int
    macs: int
    other: Tensor
    kind: str = "matmul"
    conv_groups: int = 1

    @property
    def is_kernel(self) -> bool:
        """Whether a convolution reads it as its kernel, which can be nothing but a weight."""
        return self.kind.startswith("conv")

    @property
    def view(self) -> tuple[list[int], list[int], int]:
        """Shape, strides and summed dimension, a transposed convolution's input channels split by its groups."""
        shape, stride, dim = list(self.tensor.shape), list(self.tensor.stride()), self.dim % self.tensor.dim()
        if "transpose" in self.kind and self.conv_groups > 1:  # in / g consecutive channels feed one group of outputs
            length = shape[0] // self.conv_groups
            shape, stride, dim = [self.conv_groups, length, *shape[1:]], [length * stride[0], *stride], 1
        return shape, stride, dim


def _product(a: Tensor, b: Tensor, out: Tensor) -> list[Operand]:
    macs = out.numel() * a.shape[-1]
    return [Operand(b, -2 if b.dim() > 1 else -1, macs, a), Operand(a, -1, macs, b)]


def _convolution(args: tuple[Any, ...], out: Tensor) -> list[Operand]:
    x, weight, transposed, conv_groups = args[0], args[1], args[6], args[8]
    moved = x if transposed else out  # every position of it meets each weight once
    macs = moved.numel() // weight.shape[0] * weight.numel()
    kind = f"conv{'_transpose' if transposed else ''}{weight.dim() - 2}d"
    return [Operand(weight, 0 if transposed else 1, macs, x, kind, conv_groups)]


def _deform_convolution(args: tuple[Any, ...], out: Tensor) -> list[Operand]:
    weight = args[1]
    return [Operand(weight, 1, out.numel() // len(weight) * weight.numel(), args[0], "conv2d")]


PRODUCTS: dict[str, Callable[[tuple[Any, ...], Tensor], list[Operand]]] = {
    "aten::mm": lambda args, out: _product(args[0], args[1], out),
    "aten::mv": lambda args, out: _product(args[0], args[1], out),
    "aten::bmm": lambda args, out: _product(args[0], args[1], out),
    "aten::addmm": lambda args, out: _product(args[1], args[2], out),
    "aten::addmv": lambda args, out: _product(args[1], args[2], out),
    "aten::baddbmm": lambda args, out: _product(args[1], args[2], out),
    "aten::_grouped_mm": lambda args, out: _product(args[0], args[1], out),
    "aten::linear": lambda args, out: [Operand(args[1], -1, out.numel() * args[1].shape[-1], args[0])],
    "aten::convolution": _convolution,
    "aten::_trilinear": lambda args, out: [Operand(args[1], -1, len(args[0]) * args[1].numel(), args[0], "bilinear")],
    "torchvision::deform_conv2d": _deform_convolution,
}
