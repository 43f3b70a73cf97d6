"""Kept weights in the order the kernel reads them: chunk after chunk of columns, row after row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


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

    @property
    def width(self) -> int:
        """Columns of the flattened weight, ``in / groups * kernel``."""
        return math.prod(self.shape[1:])


@torch.no_grad()
def pack(weight: Tensor, groups: int = 1, *, chunk: int = 64, vectors: int = 8, zeros: bool = False) -> Packed:
    """A float32 weight ``(out, in / groups, ...)`` without its zeros.

    Args:
        groups: of the convolution.
        chunk, vectors: see `Tile`.
        zeros: keep the zeros too.

    Returns:
        Its values and columns by chunks of columns, the rows of each one after the other.
    """
    out, rows = weight.shape[0], weight.shape[0] // groups
    width = math.prod(weight.shape[1:])
    chunks = -(-width // chunk)
    lines = F.pad(weight.detach().float().reshape(out, width), (0, chunks * chunk - width))
    lines = lines.reshape(groups, rows, chunks, chunk).transpose(1, 2).contiguous()  # groups chunks rows chunk
    kept = lines != 0
    if zeros:
        kept = (torch.arange(chunks * chunk) < width).reshape(1, chunks, 1, chunk).expand(lines.shape).contiguous()
    places = kept.flatten().nonzero()[:, 0]
    counts = F.pad(torch.bincount(places // chunk, minlength=out * chunks).cumsum(0), (1, 0)).int()
    columns = (places % chunk).int().to(torch.int16)  # wrap above 32,767: the kernel reads them unsigned
    return Packed(lines.flatten()[places], columns, counts, tuple(weight.shape), groups, chunk, vectors)


@torch.no_grad()
def pack_for_lanes(
    weight: Tensor, groups: int, offsets: Sequence[int], pitch: int, *, chunk: int, zeros: bool
) -> tuple[Packed, Tensor]:
    """A weight packed for pictures as lanes: its columns count vectors from where their chunk starts.

    Args:
        weight: ``(out, in / groups, kernel height, kernel width)``.
        groups: of the convolution.
        offsets: of the taps, in vectors from where an input channel begins.
        pitch: vectors from one input channel to the next.
        chunk, zeros: see `Tile`.

    Returns:
        The packed weight, and ``(groups * chunks,)``, int32: where each chunk starts, in vectors from where the picture does.
    """
    taps, channels = len(offsets), weight.shape[1]
    spread = max(offsets) - min(offsets)
    assert spread < 1 << 16, "pictures too large for columns of 16 bits"
    together = max(1, min(chunk // taps, channels, ((1 << 16) - 1 - spread) // pitch + 1))
    packed = pack(weight, groups, chunk=together * taps, zeros=zeros)
    places = (torch.arange(channels)[:, None] * pitch + torch.tensor(list(offsets))).flatten()
    chunks, rows = -(-len(places) // packed.chunk), weight.shape[0] // groups
    starts = torch.stack([part.min() for part in places.split(packed.chunk)])
    lines = torch.repeat_interleave(torch.arange(len(packed.pointers) - 1), (packed.pointers[1:] - packed.pointers[:-1]).long())
    at = lines // rows % chunks
    columns = places[at * packed.chunk + (packed.columns.long() & 0xFFFF)] - starts[at]
    of_groups = starts + torch.arange(groups)[:, None] * channels * pitch
    return replace(packed, columns=columns.int().to(torch.int16)), of_groups.flatten().int()


def unpack(values: Tensor, columns: Tensor, pointers: Tensor, shape: Sequence[int], groups: int, chunk: int) -> Tensor:
    """The dense weight that `pack` was given.

    Args:
        values, columns, pointers, groups, chunk: of `Packed`.
        shape: ``(out, in / groups, ...)``.

    Returns:
        A tensor of that shape, zero where nothing was kept.
    """
    width = math.prod(shape[1:])
    chunks, rows = -(-width // chunk), shape[0] // groups
    lines = torch.repeat_interleave(torch.arange(len(pointers) - 1), (pointers[1:] - pointers[:-1]).long())
    dense = values.new_zeros(groups * chunks * rows, chunk)
    dense[lines, columns.long() & 0xFFFF] = values
    dense = dense.reshape(groups, chunks, rows, chunk).transpose(1, 2).reshape(shape[0], chunks * chunk)
    return dense[:, :width].reshape(tuple(shape))
