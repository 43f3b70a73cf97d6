"""Kept weights in the order the kernel reads them: chunk after chunk of columns, row after row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

SPARSE, LANES = "sparse", "lanes"  # words of a choice


@dataclass(frozen=True)
class Tile:
    """How the kernel cuts a product.

    Attributes:
        chunk: columns whose activations are read together, up to 65,536; with 4 * 16 * `vectors` bytes each they should fit
            into the first-level cache.
        vectors: of a tile of pixels, 1 to 8.
        lanes: of pictures as lanes, where a chain has them.
        whole: all weights are stored, zeros too, and rows share what they read.
    """

    chunk: int = 64
    vectors: int = 8
    lanes: bool = False
    whole: bool = False

    def __str__(self) -> str:
        """As a choice is named."""
        words = [SPARSE, *[LANES] * self.lanes, *["with zeros"] * self.whole]
        return f"{', '.join(words)} {self.chunk}x{self.vectors}"


_PLAIN = ((64, 8), (96, 8), (128, 8), (256, 8), (128, 4), (192, 4), (256, 4), (512, 4))
_LANES = ((64, 8), (128, 8), (256, 8), (512, 8), (1024, 8), (128, 6), (256, 6), (512, 6), (256, 4), (512, 4))
_WHOLE = ((128, 8), (256, 4), (256, 3), (1024, 4))
TILES = tuple(  # to try
    Tile(*sizes, lanes=lanes, whole=whole)
    for lanes, plain in ((False, _PLAIN), (True, _LANES))
    for whole, all_sizes in ((False, plain), (True, _WHOLE))
    for sizes in all_sizes
)


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
        """Columns: weights of a row, zeros too."""
        return math.prod(self.shape[1:])


@torch.no_grad()
def pack(weight: Tensor, groups: int = 1, *, chunk: int = 64, vectors: int = 8, whole: bool = False) -> Packed:
    """Take the zeros out of a float32 weight.

    Args:
        chunk: columns whose activations are packed together, up to 65,536; with 4 * 16 * `vectors` bytes each they should fit
            into the first-level cache.
        vectors: of a tile of pixels, 1 to 8.
        whole: take none out.
    """
    out, rows = weight.shape[0], weight.shape[0] // groups
    width = math.prod(weight.shape[1:])
    chunks = -(-width // chunk)
    lines = F.pad(weight.detach().float().reshape(out, width), (0, chunks * chunk - width))
    lines = lines.reshape(groups, rows, chunks, chunk).transpose(1, 2)  # groups chunks rows chunk
    kept = lines != 0
    if whole:
        kept = (torch.arange(chunks * chunk) < width).reshape(1, chunks, 1, chunk).expand(kept.shape)
    places = torch.arange(chunk, dtype=torch.int32).to(torch.int16)  # wrap above 32,767: the kernel reads them unsigned
    counts = F.pad(kept.sum(3).flatten().cumsum(0), (1, 0)).int()
    columns = places.expand(kept.shape)[kept]
    return Packed(lines[kept].contiguous(), columns, counts, tuple(weight.shape), groups, chunk, vectors)


@torch.no_grad()
def pack_for_lanes(
    weight: Tensor, groups: int, offsets: Sequence[int], pitch: int, *, chunk: int, whole: bool
) -> tuple[Packed, Tensor]:
    """The same for pictures as lanes, whose columns count vectors from where their chunk starts; and these starts, of every
    group's chunks, in vectors from where the picture does.

    Args:
        offsets: of the taps, in vectors from where an input channel begins.
        pitch: vectors from one input channel to the next.
    """
    taps, channels = len(offsets), weight.shape[1]
    spread = max(offsets) - min(offsets)
    assert spread < 1 << 16, "pictures too large for columns of 16 bits"
    together = max(1, min(chunk // taps, channels, ((1 << 16) - 1 - spread) // pitch + 1))
    packed = pack(weight, groups, chunk=together * taps, whole=whole)
    places = (torch.arange(channels)[:, None] * pitch + torch.tensor(list(offsets))).flatten()
    chunks, rows = -(-len(places) // packed.chunk), weight.shape[0] // groups
    starts = torch.stack([part.min() for part in places.split(packed.chunk)])
    lines = torch.repeat_interleave(torch.arange(len(packed.pointers) - 1), (packed.pointers[1:] - packed.pointers[:-1]).long())
    at = lines // rows % chunks
    columns = places[at * packed.chunk + (packed.columns.long() & 0xFFFF)] - starts[at]
    of_groups = starts + torch.arange(groups)[:, None] * channels * pitch
    return replace(packed, columns=columns.int().to(torch.int16)), of_groups.flatten().int()


def unpack(values: Tensor, columns: Tensor, pointers: Tensor, shape: Sequence[int], groups: int, chunk: int) -> Tensor:
    """The dense weight of `shape` again."""
    width = math.prod(shape[1:])
    chunks, rows = -(-width // chunk), shape[0] // groups
    lines = torch.repeat_interleave(torch.arange(len(pointers) - 1), (pointers[1:] - pointers[:-1]).long())
    dense = values.new_zeros(groups * chunks * rows, chunk)
    dense[lines, columns.long() & 0xFFFF] = values
    dense = dense.reshape(groups, chunks, rows, chunk).transpose(1, 2).reshape(shape[0], chunks * chunk)
    return dense[:, :width].reshape(tuple(shape))
