"""The sparse operators as torch sees them: schemas, shapes for torch.compile, and plain PyTorch where there is no kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nmfx.runtime.checks import check_conv2d, check_depthwise, check_linear, check_max_pool2d, check_pictures
from nmfx.runtime.packed import unpack

_PACKED = "Tensor values, Tensor columns, Tensor pointers, Tensor? bias"
_LIBRARY = torch.library.Library("nmfx", "DEF")
_LIBRARY.define(
    f"sparse_conv2d(Tensor input, {_PACKED}, Tensor? residual, int out_channels, int width, int[2] kernel, int[2] stride, "
    "int[] padding, int[2] dilation, int groups, float low, float high, int chunk, int vectors) -> Tensor"
)
_LIBRARY.define(
    f"sparse_linear(Tensor input, {_PACKED}, int out_features, int width, float low, float high, int chunk, "
    "int vectors) -> Tensor"
)
_LIBRARY.define(
    "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, int[] padding, "
    "int[2] dilation, float low, float high) -> Tensor"
)
_LIBRARY.define("average(Tensor input) -> Tensor")
_LIBRARY.define("chain(Tensor[] inputs, Tensor[] constants, Tensor program, int images) -> Tensor[]")
_LIBRARY.define("max_pool2d(Tensor input, int[2] kernel, int[2] stride, int[2] padding) -> Tensor")


def _conv2d(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    pointers: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    width: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    low: float,
    high: float,
    chunk: int,
    vectors: int,
) -> Tensor:
    """`sparse_conv2d` in plain PyTorch, where there is no kernel: a dense convolution with the weight unpacked."""
    packed, rest = (values, columns, pointers, bias), (kernel, stride, padding, dilation, groups, low, high, chunk, vectors)
    check_conv2d(input, packed, residual, out_channels, width, *rest, known=True)
    shape = (out_channels, input.shape[1] // groups, *kernel)
    weight = unpack(values, columns, pointers, shape, groups, chunk)
    if len(padding) == 4:
        input, padding = padded(input, padding), (0, 0)
    y = F.conv2d(input, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    return (y if residual is None else y + residual).clamp(low, high)


def _linear(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    pointers: Tensor,
    bias: Tensor | None,
    out_features: int,
    width: int,
    low: float,
    high: float,
    chunk: int,
    vectors: int,
) -> Tensor:
    """`sparse_linear` in plain PyTorch, where there is no kernel: a dense product with the weight unpacked."""
    check_linear(input, (values, columns, pointers, bias), out_features, width, chunk, vectors, known=True)
    weight = unpack(values, columns, pointers, (out_features, width), 1, chunk)
    return F.linear(input, weight, bias).clamp(low, high)


def _depthwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    low: float,
    high: float,
) -> Tensor:
    """`depthwise_conv2d` in plain PyTorch, where there is no kernel."""
    check_depthwise(input, weight, bias, residual, stride, padding, dilation)
    if len(padding) == 4:
        input, padding = padded(input, padding), (0, 0)
    y = F.conv2d(input, weight, bias, tuple(stride), tuple(padding), tuple(dilation), len(weight))
    return (y if residual is None else y + residual).clamp(low, high)


def _max_pool2d(input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """`max_pool2d` in plain PyTorch, where there is no kernel."""
    check_max_pool2d(input, kernel, stride, padding)
    return F.max_pool2d(input, tuple(kernel), tuple(stride), tuple(padding))


def _average(input: Tensor) -> Tensor:
    """`average` in plain PyTorch, where there is no kernel."""
    check_pictures(input)
    return F.adaptive_avg_pool2d(input, 1)


def padded(input: Tensor, padding: Sequence[int]) -> Tensor:
    """Pictures with zeros around: top, left, bottom, right."""
    top, left, bottom, right = padding
    return F.pad(input, (left, right, top, bottom))


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "sparse_conv2d": _conv2d,
    "sparse_linear": _linear,
    "depthwise_conv2d": _depthwise,
    "max_pool2d": _max_pool2d,
    "average": _average,
}
for _name, _plain in _PLAIN.items():
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")  # the kernel's, for CPU, goes before it


@torch.library.register_fake("nmfx::sparse_conv2d")  # type: ignore[untyped-decorator]
def _conv2d_shape(input: Tensor, *rest: Any) -> Tensor:
    return input.new_empty(check_conv2d(input, rest[:4], *rest[4:], known=False))


@torch.library.register_fake("nmfx::depthwise_conv2d")  # type: ignore[untyped-decorator]
def _depthwise_shape(input: Tensor, weight: Tensor, bias: Any, residual: Any, *geometry: Any) -> Tensor:
    return input.new_empty(check_depthwise(input, weight, bias, residual, *geometry[:3]))


@torch.library.register_fake("nmfx::max_pool2d")  # type: ignore[untyped-decorator]
def _max_pool2d_shape(input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    return input.new_empty(check_max_pool2d(input, kernel, stride, padding))


@torch.library.register_fake("nmfx::average")  # type: ignore[untyped-decorator]
def _average_shape(input: Tensor) -> Tensor:
    check_pictures(input)
    return input.new_empty((*input.shape[:2], 1, 1))


@torch.library.register_fake("nmfx::sparse_linear")  # type: ignore[untyped-decorator]
def _linear_shape(input: Tensor, *rest: Any) -> Tensor:
    out, width, _low, _high, chunk, vectors = rest[4:]
    return input.new_empty(check_linear(input, rest[:4], out, width, chunk, vectors, known=False))
