"""The operators of the kernel in one table: what torch is told of each, and what programs call it by.

A C++ function of the same name and the same arguments computes each (kernel/); its number in programs is the library's.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nmfx.runtime.checks import check_bias, check_packed, check_pictures, check_residual, check_window, expect
from nmfx.runtime.kernel.library import NativeProgram, load_kernel, loaded
from nmfx.runtime.layout.packed import unpack
from nmfx.runtime.quantized import reference


@dataclass(frozen=True, eq=False)
class Operator:
    """An operator of the kernel.

    Attributes:
        name: of the C++ function; of `torch.ops.nmfx` too where torch knows it.
        schema: the arguments as torch writes them; empty where the C++ ones are not torch's, as pictures by lanes are not.
        sizes: of the output, by the arguments and whether they have values that are to be checked; raises a RuntimeError in the
            kernel's words. None where only programs name the operator.
        plain: the same in plain PyTorch, for where there is no kernel.
        lanes: the operator that computes this one on pictures as lanes.
        planes: the operator that computes this one on pictures of bytes as planes; alone it runs in plain PyTorch.
        gives: the type of the output where it is not the input's.
    """

    name: str
    schema: str = ""
    sizes: Callable[[Any, bool], Sequence[int]] | None = None
    plain: Callable[[Any], Tensor] | None = None
    lanes: str = ""
    planes: str = ""
    gives: torch.dtype | None = None

    @functools.cached_property
    def arguments(self) -> dict[str, str]:
        """The type of every argument, by name, in their order."""
        return {name: kind for kind, name in (one.split(" ") for one in self.schema.split(", ") if one)}

    @property
    def code(self) -> int:
        """Its number in programs."""
        return loaded().operators[self.name]

    def named(self, arguments: Sequence[Any]) -> dict[str, Any]:
        """Arguments by their names."""
        return dict(zip(self.arguments, arguments, strict=True))

    def encode(self, arguments: Sequence[Any], place: Callable[[Any], int], *, over: bool = False) -> list[int]:
        """The operator and its arguments as numbers of a program.

        Args:
            place: the number that stands for a tensor, or for what stands for one.
            over: the output may be written where the residual is.
        """
        numbers = [self.code]
        for (name, kind), value in zip(self.arguments.items(), arguments, strict=True):
            if kind.startswith("Tensor"):
                numbers += [place(value), *[int(over)] * (name == "residual")]
            elif "[" in kind:
                numbers += [len(value), *value]
            else:
                numbers.append(bits_of(value) if kind == "float" else int(value))
        return numbers

    def with_kernel(self, *arguments: Any) -> Tensor:
        """What the kernel computes, if there is one: a program of this step alone."""
        if self.planes or load_kernel():
            return self.without_kernel(*arguments)
        assert self.sizes is not None
        self.sizes(SimpleNamespace(**self.named(arguments)), False)
        inputs: list[Tensor] = []

        def place(tensor: Tensor | None) -> int:
            if tensor is None:
                return -1
            inputs.append(tensor)
            return len(inputs) - 1

        step = self.encode(arguments, place)
        count = len(inputs)
        numbers = [count, *[0] * count, 1, 1, *step, 0, 1, count]  # inputs of any size, one step, which leaves, the output
        return NativeProgram(torch.tensor(numbers), (), 1)(inputs)[0]

    def without_kernel(self, *arguments: Any) -> Tensor:
        """What the kernel would compute, checked and in plain PyTorch."""
        assert self.sizes is not None
        assert self.plain is not None
        given = SimpleNamespace(**self.named(arguments))
        self.sizes(given, True)
        return self.plain(given)

    def without_values(self, *arguments: Any) -> Tensor:
        """A tensor of the output's sizes for tensors without values: what torch.compile and torch.export see."""
        assert self.sizes is not None
        sizes = self.sizes(SimpleNamespace(**self.named(arguments)), False)
        return arguments[0].new_empty(sizes, dtype=self.gives or arguments[0].dtype)  # type: ignore[no-any-return]


# Of each operator, `given` its arguments by name: what it asks of them, and the sizes of its output; `known` says whether
# tensors have values, which are checked too. Then what it computes, in plain PyTorch.


def _sparse_conv2d_sizes(given: Any, known: bool) -> Sequence[int]:
    """``(batch, out, height, width)``."""
    x, groups, kernel = given.input, given.groups, given.kernel
    expect(groups > 0 and x.dim() == 4 and x.shape[1] % groups == 0, "channels that divide by the groups")
    check_pictures(x)
    sizes = (x.shape[0], given.out_channels, *check_window(x, kernel, given.stride, given.padding, given.dilation))
    fits = x.shape[1] // groups * kernel[0] * kernel[1] == given.width
    expect(fits, f"pictures of the weight's channels, got {x.shape[1]}")
    check_packed(given, given.out_channels, groups, known)
    check_residual(given.residual, sizes)
    return sizes


def _depthwise_conv2d_sizes(given: Any, known: bool) -> Sequence[int]:
    """``(batch, channels, height, width)``."""
    x, weight = given.input, given.weight
    check_pictures(x)
    fits = weight.dim() == 4 and weight.dtype == torch.float32 and tuple(weight.shape[:2]) == (x.shape[1], 1)
    expect(fits, f"a float32 weight (channels, 1, height, width) of these channels, got {x.shape[1]}")
    sizes = (*x.shape[:2], *check_window(x, weight.shape[2:], given.stride, given.padding, given.dilation))
    check_residual(given.residual, sizes)
    check_bias(given.bias, len(weight))
    return sizes


def _sparse_linear_sizes(given: Any, known: bool) -> Sequence[int]:
    """``(..., out)``."""
    x, width = given.input, given.width
    expect(x.dim() >= 1 and x.dtype == torch.float32 and x.layout == torch.strided, "float32 tokens (..., features)")
    expect(x.shape[-1] == width, f"tokens of {width} features, got {x.shape[-1]}")
    check_packed(given, given.out_features, 1, known)
    return (*x.shape[:-1], given.out_features)


def _max_pool2d_sizes(given: Any, known: bool) -> Sequence[int]:
    """``(batch, channels, height, width)``."""
    check_pictures(given.input)
    expect(len(given.padding) == 2, "padding of two numbers")
    sizes = check_window(given.input, given.kernel, given.stride, given.padding, (1, 1))
    half = all(2 * pad <= size for pad, size in zip(given.padding, given.kernel, strict=True))
    expect(half, "pictures no smaller than the kernel, padding of half of it at most")
    return (*given.input.shape[:2], *sizes)


def _average_sizes(given: Any, known: bool) -> Sequence[int]:
    """``(batch, channels, 1, 1)``."""
    check_pictures(given.input)
    return (*given.input.shape[:2], 1, 1)


def padded(input: Tensor, padding: Sequence[int]) -> Tensor:
    """Pictures with zeros around: top, left, bottom, right."""
    top, left, bottom, right = padding
    return F.pad(input, (left, right, top, bottom))


def _convolved(given: Any, weight: Tensor, groups: int) -> Tensor:
    x, padding = (padded(given.input, given.padding), (0, 0)) if len(given.padding) == 4 else (given.input, given.padding)
    y = F.conv2d(x, weight, given.bias, tuple(given.stride), tuple(padding), tuple(given.dilation), groups)
    return (y if given.residual is None else y + given.residual).clamp(given.low, given.high)


def _sparse_conv2d(given: Any) -> Tensor:
    shape = (given.out_channels, given.input.shape[1] // given.groups, *given.kernel)
    return _convolved(
        given, unpack(given.values, given.columns, given.pointers, shape, given.groups, given.chunk), given.groups
    )


def _sparse_linear(given: Any) -> Tensor:
    weight = unpack(given.values, given.columns, given.pointers, (given.out_features, given.width), 1, given.chunk)
    return F.linear(given.input, weight, given.bias).clamp(given.low, given.high)


_PACKED = "Tensor values, Tensor columns, Tensor pointers, Tensor? bias"
_BLOCKS = "Tensor values, Tensor columns, Tensor blocks, Tensor scales, Tensor shifts"
_TABLE = (
    Operator(
        "sparse_conv2d",
        f"Tensor input, {_PACKED}, Tensor? residual, int out_channels, int width, int[2] kernel, int[2] stride, int[] padding, "
        "int[2] dilation, int groups, float low, float high, int chunk, int vectors",
        _sparse_conv2d_sizes,
        _sparse_conv2d,
        lanes="lanes_conv2d",
    ),
    Operator(
        "sparse_linear",
        f"Tensor input, {_PACKED}, int out_features, int width, float low, float high, int chunk, int vectors",
        _sparse_linear_sizes,
        _sparse_linear,
    ),
    Operator(
        "depthwise_conv2d",
        "Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, int[] padding, int[2] dilation, "
        "float low, float high",
        _depthwise_conv2d_sizes,
        lambda given: _convolved(given, given.weight, len(given.weight)),
        lanes="lanes_by_channel",
    ),
    Operator(
        "max_pool2d",
        "Tensor input, int[2] kernel, int[2] stride, int[2] padding",
        _max_pool2d_sizes,
        lambda given: F.max_pool2d(given.input, tuple(given.kernel), tuple(given.stride), tuple(given.padding)),
        lanes="lanes_by_channel",
    ),
    Operator(
        "average", "Tensor input", _average_sizes, lambda given: F.adaptive_avg_pool2d(given.input, 1), lanes="lanes_average"
    ),
    Operator("flatten", "Tensor input"),
    Operator("rearrange", "Tensor input, Tensor index, int[2] sizes, bool plain"),
    Operator("lanes_conv2d"),
    Operator("lanes_by_channel"),
    Operator("lanes_average"),
    Operator(
        "quantize",
        "Tensor input, float inverse, int zero",
        reference.quantize_sizes,
        reference.quantize,
        planes="planes_of",
        gives=torch.uint8,
    ),
    Operator(
        "dequantize",
        "Tensor input, float scale, int zero",
        reference.dequantize_sizes,
        reference.dequantize,
        planes="plain_of_planes",
        gives=torch.float32,
    ),
    Operator(
        "int8_conv2d",
        f"Tensor input, {_BLOCKS}, Tensor? residual, int out_channels, int[2] kernel, int[2] stride, int[] padding, "
        "int[2] dilation, int groups, int zero, int zero_out, float residual_scale, int low, int high, int height",
        reference.conv2d_sizes,
        reference.conv2d,
        planes="planes_conv",
    ),
    Operator(
        "int8_linear",
        f"Tensor input, {_BLOCKS}, int out_features, int width, float inverse, int zero, float low, float high, int height",
        reference.linear_sizes,
        reference.linear,
        planes="quantized_linear",
    ),
    Operator(
        "int8_max_pool2d",
        "Tensor input, int[2] kernel, int[2] stride, int[2] padding",
        reference.max_pool2d_sizes,
        reference.max_pool2d,
        planes="planes_max_pool",
    ),
    Operator(
        "int8_average",
        "Tensor input, float scale, int zero",
        reference.average_sizes,
        reference.average,
        planes="planes_average",
        gives=torch.float32,
    ),
    *map(Operator, ("planes_of", "planes_again", "planes_conv", "planes_max_pool", "planes_average", "plain_of_planes")),
    Operator("quantized_linear"),
)
OPERATORS = {one.name: one for one in _TABLE}


def bits_of(number: float) -> int:
    """A double as the integer of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


_LIBRARY = torch.library.Library("nmfx", "DEF")
for _one in _TABLE:
    if _one.sizes:
        _LIBRARY.define(f"{_one.name}({_one.schema}) -> Tensor")
        _LIBRARY.impl(_one.name, _one.with_kernel, "CPU")
        _LIBRARY.impl(_one.name, _one.without_kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"nmfx::{_one.name}", _one.without_values)
