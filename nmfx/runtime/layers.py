"""What a site becomes: a convolution or linear layer with all that follows it fused, dense or sparse."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmfx.runtime.layout.packed import Packed, pack
from nmfx.runtime.layout.tiles import LANES, SPARSE, TILES, Tile
from nmfx.runtime.operators import OPERATORS, padded

INF = math.inf
DEPTHWISE = "dense, depthwise"


@dataclass(frozen=True, eq=False)
class Fused:
    """``clamp(conv(x, weight) + bias + residual, low, high)``, batch norm folded in; or the same of a linear layer.

    Attributes:
        name: of the weight in the model.
        weight: ``(out, in / groups, kernel height, kernel width)`` or ``(out, in)``, with zeros.
        geometry: stride, padding and dilation, two numbers each, padding also four (top, left, bottom, right); empty for a
            linear layer.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    geometry: tuple[tuple[int, ...], ...] = ()
    groups: int = 1
    residual: bool = False
    low: float = -INF
    high: float = INF

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution over pictures, rather than a linear layer over tokens."""
        return bool(self.geometry)

    @property
    def depthwise(self) -> bool:
        """Whether each group has one output channel of one input channel, so that sparse rows would share nothing."""
        return self.is_conv and tuple(self.weight.shape[:2]) == (self.groups, 1)

    @functools.cached_property
    def kept(self) -> int:
        """Weights that are not zero."""
        return int(self.weight.count_nonzero())

    @functools.lru_cache(maxsize=1)  # noqa: B019 - ways by lanes differ in what a chain makes of the same one
    def packed(self, chunk: int, *, zeros: bool) -> Packed:
        """The weight as the kernel reads it (`pack`)."""
        return pack(self.weight, self.groups, chunk=chunk, zeros=zeros)

    @property
    def options(self) -> dict[str, Any]:
        """Geometry and limits by the names that operators have for them."""
        return dict(zip(("stride", "padding", "dilation"), map(list, self.geometry))) | {"low": self.low, "high": self.high}


class KernelLayer(nn.Module):
    """A site computed by an operator of the kernel; a residual is added before the clamp.

    Args:
        operator: its name.
        tensors, options: its arguments by name, all but what is read and added.

    Attributes:
        lanes: whether, and for sparse ones by which tile, a chain computes it on pictures as lanes.
    """

    def __init__(
        self, operator: str, tensors: Mapping[str, Tensor | None], options: Mapping[str, Any], lanes: Tile | bool | None = None
    ) -> None:
        super().__init__()
        self.operator, self.names = operator, tuple(OPERATORS[operator].arguments)
        self.options, self.lanes = dict(options), lanes
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def arguments(self, x: Any, residual: Any = None) -> list[Any]:
        """All arguments of the operator, in their order."""
        given = {"input": x, "residual": residual, **self._buffers, **self.options}
        return [given[name] for name in self.names]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(batch, in, height, width)`` to ``(batch, out, height, width)``, or ``(..., in)`` to ``(..., out)``."""
        return getattr(torch.ops.nmfx, self.operator).default(*self.arguments(x, residual))  # type: ignore[no-any-return]


class SparseConv2d(KernelLayer):
    """A sparse convolution."""


class SparseLinear(KernelLayer):
    """A sparse linear layer."""


class Depthwise(KernelLayer):
    """A depthwise convolution, dense."""

    def __init__(self, fused: Fused, *, lanes: bool = False) -> None:
        super().__init__(
            "depthwise_conv2d", {"weight": fused.weight.contiguous(), "bias": fused.bias}, fused.options, lanes or None
        )


class DenseConv2d(nn.Module):
    """PyTorch's own convolution, by oneDNN with its weight packed at the first call where it takes the clamp."""

    def __init__(self, fused: Fused, *, channels_last: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", fused.weight)
        self.register_buffer("bias", fused.bias)
        self.geometry, self.groups, self.channels_last = fused.geometry, fused.groups, channels_last
        self.limits, unlimited = (fused.low, fused.high), (-INF, INF)
        self.after: tuple[Any, ...] = ("relu" if self.limits == (0.0, INF) else "none", [], "")
        if INF not in map(abs, self.limits):
            self.after = ("hardtanh", list(self.limits), "")
        self.packable = torch.backends.mkldnn.is_available() and (self.after[0] != "none" or self.limits == unlimited)
        self.packed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # oneDNN's format cannot be copied; the weight is packed again

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(batch, in, height, width)`` to ``(batch, out, height, width)``."""
        stride, padding, dilation = map(list, self.geometry)
        if len(padding) == 4:
            x, padding = padded(x, padding), [0, 0]
        if not self.packable:
            y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, self.groups)  # type: ignore[arg-type]
            return (y if residual is None else y + residual).clamp(*self.limits)
        if self.packed is None:
            reorder, shape = torch.ops.mkldnn._reorder_convolution_weight, list(x.shape)
            self.packed = reorder(self.weight.contiguous(), padding, stride, dilation, self.groups, shape)  # type: ignore[operator]
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        after = self.after if residual is None else ("none", [], "")
        rest = (self.bias, padding, stride, dilation, self.groups, *after)
        y = torch.ops.mkldnn._convolution_pointwise(x, self.packed, *rest)
        if residual is not None:
            y = y.add_(residual).clamp_(*self.limits)
        return y.contiguous()  # type: ignore[no-any-return]


class DenseLinear(nn.Module):
    """A dense linear layer by PyTorch."""

    def __init__(self, fused: Fused) -> None:
        super().__init__()
        self.register_buffer("weight", fused.weight)
        self.register_buffer("bias", fused.bias)
        self.limits = (fused.low, fused.high)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        y = F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]
        return y if self.limits == (-INF, INF) else y.clamp_(*self.limits)


LAYERS = (KernelLayer, DenseConv2d, DenseLinear)


def dense_layers(fused: Fused, *, lanes: bool = False) -> dict[str, nn.Module]:
    """The dense ways to compute a site, by name."""
    if not fused.is_conv:
        return {"dense": DenseLinear(fused)}
    found: dict[str, nn.Module] = {"dense": DenseConv2d(fused), "dense, channels last": DenseConv2d(fused, channels_last=True)}
    if fused.depthwise:
        found[DEPTHWISE] = Depthwise(fused)
    if fused.depthwise and lanes:
        found[f"{DEPTHWISE}, {LANES}"] = Depthwise(fused, lanes=True)
    return found


def sparse_layer(fused: Fused, tile: Tile, plain: Tile | None = None) -> KernelLayer:
    """The sparse layer of a site; a tile by lanes counts in chains that have lanes, and `plain` elsewhere."""
    cut = (plain or Tile()) if tile.lanes else tile
    packed = fused.packed(cut.chunk, zeros=cut.zeros)
    tensors = {"values": packed.values, "columns": packed.columns, "pointers": packed.pointers, "bias": fused.bias}
    options = fused.options | {"width": packed.width, "chunk": cut.chunk, "vectors": cut.vectors}
    if not fused.is_conv:
        return SparseLinear("sparse_linear", tensors, options | {"out_features": packed.shape[0]})
    options |= {"out_channels": packed.shape[0], "kernel": list(packed.shape[2:]), "groups": fused.groups}
    return SparseConv2d("sparse_conv2d", tensors, options, tile if tile.lanes else None)


def layer_for(fused: Fused, chosen: str, plain: str | None = None) -> nn.Module:
    """The layer that computes a site in the way of this name; `plain` names that of a sparse one where there are no lanes."""
    if chosen.startswith(SPARSE):
        tiles = {str(tile): tile for tile in TILES}
        return sparse_layer(fused, tiles[chosen], tiles.get(plain or ""))
    return dense_layers(fused, lanes=True)[chosen]


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers compute the same in the same way."""
    if type(one) is not type(other):
        return False
    state = ("packed", "training")
    mine, theirs = ({k: v for k, v in vars(each).items() if k[0] != "_" and k not in state} for each in (one, other))
    buffers = dict(other.named_buffers())
    same = mine == theirs and buffers.keys() == dict(one.named_buffers()).keys()
    return same and all(torch.equal(value, buffers[name]) for name, value in one.named_buffers())
