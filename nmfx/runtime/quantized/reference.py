"""The int8 operators in plain PyTorch, and what they ask of their arguments: what the kernel equals bit for bit.

A byte q stands for ``(q - zero) * scale``. Pictures are uint8 ``(batch, channels, height, width)``, weights int8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nmfx.runtime.checks import LONGEST, check_pictures, check_window, expect
from nmfx.runtime.layout.blocks import check_blocks, unblock


def check_bytes(x: Tensor) -> None:
    """Pictures of bytes that have pixels."""
    expect(x.dim() == 4 and x.dtype == torch.uint8, "uint8 pictures (batch, channels, height, width)")
    expect(all(1 <= size <= LONGEST for size in x.shape[1:]), f"pictures with channels and pixels, got {list(x.shape)}")


def _check_rows(given: Any, rows: int) -> None:
    fits = [one.dtype == torch.float32 and tuple(one.shape) == (rows,) for one in (given.scales, given.shifts)]
    expect(all(fits), "a float32 scale and shift of every row")


def _check_zero(*zeros: int) -> None:
    expect(all(0 <= zero <= 255 for zero in zeros), "bytes that stand for zero")


def quantize_sizes(given: Any, known: bool) -> Sequence[int]:
    """As the input's."""
    check_pictures(given.input)
    _check_zero(given.zero)
    return tuple(given.input.shape)


def quantize(given: Any) -> Tensor:
    """Float32 as bytes: ``x * inverse + zero``, rounded to the nearest, half to even."""
    exact = (
        given.input.double() * torch.tensor(given.inverse, dtype=torch.float32).double() + given.zero
    )  # rounded once, as by a fused multiply-add
    return exact.float().nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)  # type: ignore[no-any-return]


def dequantize_sizes(given: Any, known: bool) -> Sequence[int]:
    """As the input's."""
    check_bytes(given.input)
    _check_zero(given.zero)
    return tuple(given.input.shape)


def dequantize(given: Any) -> Tensor:
    """Bytes as float32."""
    return (given.input.float() - given.zero) * given.scale  # type: ignore[no-any-return]


def _weight(given: Any, shape: Sequence[int], groups: int) -> Tensor:
    return unblock(given.values, given.columns, given.blocks, given.height, shape, groups).double()


def conv2d_sizes(given: Any, known: bool) -> Sequence[int]:
    """``(batch, out, height, width)``."""
    x, out, groups = given.input, given.out_channels, given.groups
    check_bytes(x)
    expect(
        groups > 0 and x.shape[1] % groups == 0 and 0 < out <= LONGEST and out % groups == 0,
        "channels that divide by the groups",
    )
    sizes = (x.shape[0], out, *check_window(x, given.kernel, given.stride, given.padding, given.dilation))
    check_blocks(given, out, x.shape[1] // groups * math.prod(given.kernel), groups, known)
    _check_rows(given, out)
    _check_zero(given.zero, given.zero_out, given.low, given.high)
    one = given.residual
    expect(
        one is None or (one.dtype == torch.uint8 and tuple(one.shape) == sizes), f"a uint8 residual of the shape {list(sizes)}"
    )
    return sizes


def conv2d(given: Any) -> Tensor:
    """``sum * scale + shift + residual * residual_scale``, each rounded to float32, as bytes within the limits."""
    shape = (given.out_channels, given.input.shape[1] // given.groups, *given.kernel)
    weight, padding = _weight(given, shape, given.groups), given.padding
    x = given.input.double() - given.zero
    if len(padding) == 4:
        top, left, bottom, right = padding
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    sums = F.conv2d(x, weight, None, tuple(given.stride), tuple(padding), tuple(given.dilation), given.groups)
    sums = sums + (given.zero * weight.sum((1, 2, 3)))[:, None, None]  # of bytes as they are
    scales, shifts = (one.double()[:, None, None] for one in (given.scales, given.shifts))
    y = (sums.float().double() * scales + shifts).float()
    if given.residual is not None:
        factor = torch.tensor(given.residual_scale, dtype=torch.float32).double()
        y = (given.residual.double() * factor + y.double()).float()
    return y.round().clamp(given.low, given.high).to(torch.uint8)  # type: ignore[no-any-return]


def linear_sizes(given: Any, known: bool) -> Sequence[int]:
    """``(..., out)``."""
    x, width, out = given.input, given.width, given.out_features
    expect(x.dim() >= 1 and x.dtype == torch.float32 and 0 < out <= LONGEST, "float32 tokens (..., features)")
    expect(x.shape[-1] == width, f"tokens of {width} features, got {x.shape[-1]}")
    check_blocks(given, out, width, 1, known)
    _check_rows(given, out)
    _check_zero(given.zero)
    return (*x.shape[:-1], out)


def linear(given: Any) -> Tensor:
    """Float32 in and out; ``sum * scale + shift`` within the limits."""
    weight = _weight(given, (given.out_features, given.width), 1)
    q = quantize(given).double()
    sums = F.linear(q - given.zero, weight) + given.zero * weight.sum(1)
    y = (sums.float().double() * given.scales.double() + given.shifts.double()).float()
    return y.clamp(given.low, given.high)  # type: ignore[no-any-return]


def max_pool2d_sizes(given: Any, known: bool) -> Sequence[int]:
    """``(batch, channels, height, width)``."""
    check_bytes(given.input)
    expect(len(given.padding) == 2, "padding of two numbers")
    sizes = check_window(given.input, given.kernel, given.stride, given.padding, (1, 1))
    expect(
        all(2 * pad <= size for pad, size in zip(given.padding, given.kernel, strict=True)),
        "padding of half the kernel at most",
    )
    return (*given.input.shape[:2], *sizes)


def max_pool2d(given: Any) -> Tensor:
    """The largest byte, or the byte 0 around the picture: of pictures without negative numbers."""
    pooled = F.max_pool2d(given.input.float(), tuple(given.kernel), tuple(given.stride), tuple(given.padding))
    return pooled.to(torch.uint8)


def average_sizes(given: Any, known: bool) -> Sequence[int]:
    """``(batch, channels, 1, 1)``."""
    check_bytes(given.input)
    _check_zero(given.zero)
    return (*given.input.shape[:2], 1, 1)


def average(given: Any) -> Tensor:
    """The mean of every channel, float32; `scale` is that of a byte by the number of pixels."""
    sums = (given.input.long() - given.zero).sum((2, 3), keepdim=True)
    return sums.float() * torch.tensor(given.scale, dtype=torch.float32)  # type: ignore[no-any-return]
