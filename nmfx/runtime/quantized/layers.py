"""Sites as int8 layers: weights and the arithmetic between one range of bytes and the next."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from nmfx.runtime.layers import Fused, KernelLayer
from nmfx.runtime.layout.blocks import MOST_COLUMNS, Blocks, block
from nmfx.runtime.layout.lanes import Window
from nmfx.runtime.quantized.ranges import Step

FEW_TOKENS = 16  # fewer than these leave most of a vector empty


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``(out, ...)`` as int8, and what one of each row stands for, float64 ``(out,)``: symmetric, by the largest."""
    largest = weight.detach().double().flatten(1).abs().amax(1)
    scales = torch.where(largest > 0, largest, 127.0) / 127
    return (weight.double() / scales.reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8), scales


def _in_reach(weight: Tensor, factors: Tensor, shifts: Tensor) -> bool:
    """Whether what a row's sum can be at most becomes an integer of 32 bits (kernel/quantized.h)."""
    largest = (weight[0].numel() + 3) * 255 * 127 * float(factors.abs().max())
    return largest < 1 << 30 and float(shifts.abs().max()) < 1 << 29


def _layer(operator: str, blocks: Blocks, factors: Tensor, shifts: Tensor, options: dict[str, Any]) -> KernelLayer:
    tensors = {"values": blocks.values, "columns": blocks.columns, "blocks": blocks.blocks}
    tensors |= {"scales": factors.float(), "shifts": shifts.float()}
    return KernelLayer(operator, tensors, options | {"height": blocks.height})


def conv_layer(fused: Fused, read: Step, made: Step, added: Step | None) -> KernelLayer | str:
    """A convolution in int8, or why it cannot be.

    Args:
        read, made, added: the bytes of its input, its output and its residual.
    """
    weight, scales = quantize_weight(fused.weight)
    factors = scales * read.scale / made.scale
    shifts = made.zero - read.zero * weight.double().flatten(1).sum(1) * factors
    if fused.bias is not None:
        shifts += fused.bias.double() / made.scale
    residual = 0.0 if added is None else added.scale / made.scale
    if added is not None:
        shifts -= added.zero * residual
    if not _in_reach(weight, factors, shifts) or residual >= 1 << 20:
        return "its outputs are small beside its inputs"
    options: dict[str, Any] = dict(zip(("stride", "padding", "dilation"), map(list, fused.geometry), strict=True))
    options |= {"out_channels": len(weight), "kernel": list(weight.shape[2:]), "groups": fused.groups}
    options |= {"zero": read.zero, "zero_out": made.zero, "residual_scale": residual}
    options |= {"low": made.byte(fused.low), "high": made.byte(fused.high)}
    return _layer("int8_conv2d", block(weight, fused.groups), factors, shifts, options)


def linear_layer(fused: Fused, read: Step) -> KernelLayer | str:
    """A linear layer over float32 tokens that multiplies in int8, or why it cannot be; `read` are the bytes of its input."""
    weight, scales = quantize_weight(fused.weight)
    factors = scales * read.scale
    shifts = -read.zero * weight.double().sum(1) * factors
    if fused.bias is not None:
        shifts += fused.bias.double()
    if not _in_reach(weight, factors, shifts):
        return "its inputs are too large"
    options = {"inverse": 1 / read.scale, "zero": read.zero, "low": fused.low, "high": fused.high}
    options |= {"out_features": len(weight), "width": weight.shape[1]}
    return _layer("int8_linear", block(weight), factors, shifts, options)


def unfit(node: fx.Node, fused: Fused) -> str:
    """Why a site of a lowered graph stays float32 whatever its numbers; empty where it need not."""
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    if not all(isinstance(one, Tensor) for one in values):
        return "its sizes are not known"
    if not fused.is_conv:
        tokens = [size for size in values[0].shape[:-1] if isinstance(size, int)]  # type: ignore[union-attr]
        return "few tokens" if math.prod(tokens) < FEW_TOKENS else ""
    shapes = [tuple(one.shape[2:]) for one in values]  # type: ignore[union-attr]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return "its sizes are free"
    channels, taps = values[1].shape[1], math.prod(fused.weight.shape[2:])  # type: ignore[union-attr]
    stride, padding, dilation = fused.geometry
    window = Window.of(shapes[1], shapes[0], tuple(fused.weight.shape[2:]), stride, padding, dilation)  # type: ignore[arg-type]
    if window is None:
        return "a window that planes cannot compute"
    return "more columns than 16 bits can count" if channels * taps > MOST_COLUMNS else ""
