"""Kept weights in the order the kernel reads them: chunk after chunk of columns, row after row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TILES = ((64, 8), (96, 8), (128, 8), (256, 8), (128, 4), (192, 4), (256, 4), (512, 4))  # columns, vectors of a tile: to try


@dataclass(frozen=True)
class Packed:
    """A weight ``(out, in / groups, ...)`` without its zeros, whatever their pattern.

    Columns are the flattened ``(in / groups, ...)``, cut into chunks; for every group, chunk and row, in this order, there are
    `values` at `columns` (16-bit, from the start of the chunk) from ``pointers[i]`` up to ``pointers[i + 1]``.
    """

    values: Tensor
    columns: Tensor
    pointers: Tensor
    shape: tuple[int, ...]
    groups: int
    chunk: int
    vectors: int


@torch.no_grad()
def pack(weight: Tensor, groups: int = 1, *, chunk: int = 64, vectors: int = 8) -> Packed:
    """Take the zeros out of a float32 weight.

    Args:
        chunk: columns whose activations are packed together, up to 65,536; with 4 * 16 * `vectors` bytes each they should fit
            into the first-level cache.
        vectors: of a tile of pixels, 1 to 8.
    """
    out, rows = weight.shape[0], weight.shape[0] // groups
    width = math.prod(weight.shape[1:])
    chunks = -(-width // chunk)
    lines = F.pad(weight.detach().float().reshape(out, width), (0, chunks * chunk - width))
    lines = lines.reshape(groups, rows, chunks, chunk).transpose(1, 2)  # groups chunks rows chunk
    kept = lines != 0
    places = torch.arange(chunk, dtype=torch.int32).to(
        torch.int16
    )  # above 32,767 they wrap, and the kernel reads them unsigned
    counts = F.pad(kept.sum(3).flatten().cumsum(0), (1, 0)).int()
    columns = places.expand(kept.shape)[kept]
    return Packed(lines[kept].contiguous(), columns, counts, tuple(weight.shape), groups, chunk, vectors)


def unpack(values: Tensor, columns: Tensor, pointers: Tensor, shape: Sequence[int], groups: int, chunk: int) -> Tensor:
    """The dense weight of `shape` again."""
    width = math.prod(shape[1:])
    chunks, rows = -(-width // chunk), shape[0] // groups
    lines = torch.repeat_interleave(torch.arange(len(pointers) - 1), (pointers[1:] - pointers[:-1]).long())
    dense = values.new_zeros(groups * chunks * rows, chunk)
    dense[lines, columns.long() & 0xFFFF] = values
    dense = dense.reshape(groups, chunks, rows, chunk).transpose(1, 2).reshape(shape[0], chunks * chunk)
    return dense[:, :width].reshape(tuple(shape))
