"""A product that reads a weight, as matrices: rows of inputs and of outputs, and the weight between them.

``outputs (groups, samples, rows) = inputs (groups, samples, columns) @ weight (groups, rows, columns)'``, whatever computes it:
a convolution in any number of dimensions, grouped or transposed, a linear, a projection inside an attention, a matmul.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PLACES = {  # of the weight, of the input and of the bias among the arguments
    "aten::convolution": (1, 0, 2),
    "aten::linear": (1, 0, 2),
    "aten::mm": (1, 0, None),
    "aten::bmm": (1, 0, None),
    "aten::addmm": (2, 1, 0),
    "aten::baddbmm": (2, 1, 0),
}


@dataclass(frozen=True)
class Product:
    """One call of a product.

    Attributes:
        weight: what it reads as its weight; writes into it are seen by the call.
        x: what it multiplies.
        bias: what it adds, one number an output channel, or None.
        columns: ``(kernel positions, inputs of one group)``; their product is the number of columns.
        groups: of a convolution, or matrices of a batched product.
        conv: stride, padding, dilation, transposed, output padding; None for matmuls.
        flipped: the weight is the first operand of a matmul, whose output is turned likewise.
    """

    weight: Tensor
    x: Tensor
    bias: Tensor | None
    columns: tuple[int, int]
    rows: int
    groups: int = 1
    conv: tuple[Any, ...] | None = None
    flipped: bool = False

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor shaped as the weight, as ``(groups, rows, columns)``; a copy."""
        positions, inputs = self.columns
        if self.conv is None:
            return (weight if weight.dim() == 3 else weight.unsqueeze(0)).mT.clone(memory_format=torch.contiguous_format)
        if self.conv[3]:
            cut = weight.reshape(self.groups, inputs, self.rows, positions).permute(0, 2, 3, 1)
        else:
            cut = weight.reshape(self.groups, self.rows, inputs, positions).transpose(2, 3)
        cut = cut.clone(memory_format=torch.contiguous_format)
        return cut.view(self.groups, self.rows, positions * inputs)

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        positions, inputs = self.columns
        if self.conv is None:
            return matrix.mT.reshape(self.weight.shape)
        cut = matrix.reshape(self.groups, self.rows, positions, inputs)
        cut = cut.permute(0, 3, 1, 2) if self.conv[3] else cut.transpose(2, 3)
        return cut.reshape(self.weight.shape)

    @property
    def positions(self) -> int:
        """Output positions of one picture that inputs can be taken from, or rows of a matmul's input."""
        if self.conv is None:
            return self.x.shape[-2] if self.weight.dim() == 3 else self.x[..., 0].numel()
        return math.prod(self._geometry(self.x[:1].to("meta"))[-1])

    def samples(self, out: Tensor | None, chosen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``(inputs, outputs)``, float32; outputs without the bias, None where `out` is.

        Args:
            out: what the call gave.
            chosen: indices of positions, all of them if None.
        """
        if self.conv is None:
            if out is not None:
                out = out.mT if self.flipped else out if self.bias is None else out - self.bias
            return self._rows(self.x, chosen), None if out is None else self._rows(out, chosen)
        return self._patches(chosen), None if out is None else self._outputs(out, chosen)

    def _rows(self, value: Tensor, chosen: Tensor | None) -> Tensor:
        value = value if self.weight.dim() == 3 else value.reshape(1, -1, value.shape[-1])
        return (value if chosen is None else value[:, chosen]).float()

    def _outputs(self, out: Tensor, chosen: Tensor | None) -> Tensor:
        flat = out.flatten(2)  # batch, channels, positions
        flat = (flat if chosen is None else flat[..., chosen]).float()
        if self.bias is not None:
            flat = flat - self.bias.float().unsqueeze(-1)
        batch, _, count = flat.shape
        cut = flat.reshape(batch, self.groups, self.rows, count).permute(1, 0, 3, 2)
        return cut.reshape(self.groups, batch * count, self.rows)

    def _geometry(self, x: Tensor) -> tuple[Tensor, Sequence[int], Sequence[int], list[int], list[int]]:
        """The padded input, strides, dilations, kernel and output sizes of the convolution that this is, transposed or not."""
        assert self.conv is not None
        *numbers, transposed, extra = self.conv
        kernel = list(self.weight.shape[2:])
        stride, padding, dilation, extra = ([*v] * len(kernel) if len(v) == 1 else [*v] for v in (*numbers, extra))
        before = after = padding
        if transposed:  # the same as a plain one over the input with zeros between its entries
            sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
            spread = x.new_zeros((*x.shape[:2], *sizes))
            at: Any = (slice(None), slice(None), *[slice(None, None, s) for s in stride])
            spread[at] = x
            before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
            after = [edge + more for edge, more in zip(before, extra, strict=True)]
            x, stride = spread, [1] * len(kernel)
        x = F.pad(x, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])
        parts = zip(x.shape[2:], stride, dilation, kernel, strict=True)
        return x, stride, dilation, kernel, [(n - d * (k - 1) - 1) // s + 1 for n, s, d, k in parts]

    def _patches(self, chosen: Tensor | None) -> Tensor:
        padded, stride, dilation, kernel, sizes = self._geometry(self.x)
        padded = padded.contiguous()
        batch, channels, dims = padded.shape[0], padded.shape[1], len(kernel)
        own = padded.stride()
        steps = [own[2 + i] * stride[i] for i in range(dims)] + [own[2 + i] * dilation[i] for i in range(dims)]
        patches = padded.as_strided((batch, channels, *sizes, *kernel), (own[0], own[1], *steps))
        if chosen is None:
            patches = patches.reshape(batch, channels, math.prod(sizes), math.prod(kernel))
        else:
            at: Any = (slice(None), slice(None), *torch.unravel_index(chosen, sizes))
            patches = patches[at].flatten(3)
        assert self.conv is not None
        if self.conv[3]:
            patches = patches.flip(3)  # a transposed convolution reads its kernel from the other end
        _, _, count, taps = patches.shape
        cut = patches.reshape(batch, self.groups, channels // self.groups, count, taps).permute(1, 0, 3, 4, 2)
        return cut.reshape(self.groups, batch * count, taps * (channels // self.groups)).float()


def product_of(name: str, args: Any, is_weight: Callable[[Tensor], bool]) -> Product | None:
    """The product that an aten operation is, if it reads a weight of interest as its weight.

    Args:
        name: of the operation, as ``aten::convolution``.
        is_weight: whether a tensor is a view of such a weight.
    """
    if name not in PLACES:
        return None
    place, source, bias = PLACES[name]
    weight, x = args[place], args[source]
    added = args[bias] if bias is not None and len(args) > bias else None
    if flipped := not is_weight(weight) and is_weight(x) and name in ("aten::mm", "aten::bmm"):
        weight, x = x.mT, weight.mT  # (W x)' = x' W'
    if not is_weight(weight):
        return None
    if name == "aten::convolution":
        stride, padding, dilation, transposed, extra, groups = args[3:9]
        taps = math.prod(weight.shape[2:])
        inputs = weight.shape[0] // groups if transposed else weight.shape[1]
        rows = weight.shape[1] if transposed else weight.shape[0] // groups
        return Product(weight, x, added, (taps, inputs), rows, groups, (stride, padding, dilation, transposed, extra))
    weight = weight.t() if name == "aten::linear" else weight
    weight = weight[0] if weight.dim() == 3 and weight.stride(0) == 0 else weight  # one weight for a whole batch
    groups = weight.shape[0] if weight.dim() == 3 else 1
    return Product(weight, x, added, (1, weight.shape[-2]), weight.shape[-1], groups, flipped=flipped)
