"""(weight, mask) <-> kept values + packed positions.

**Values** are the kept weights, bit for bit, in the row-major order of the weight.

**Positions** say which weights of a group are kept. A group that keeps ``p1 < p2 < ... < pn`` is coded by its rank in
the combinatorial number system, ``C(p1, 1) + C(p2, 2) + ... + C(pn, n)``: the number of choices of n positions that are
smaller when read as binary numbers (position p is bit p). Ranks run from 0 to ``C(size, n) - 1`` and take
``ceil(log2 C(size, n))`` bits each: 11 for 4:16, none where there is no choice. They are laid end to end, without gaps,
in the order of the flattened ``(outer, groups, inner)`` of `Grouping.blocks`, the least significant bit first: bit i of
the stream is bit ``i % 8`` (worth ``1 << i % 8``) of byte ``i // 8``. Full groups make one stream and short last groups
another; each starts on a byte, and its last byte is filled with zeros. Rows that share a mask have their positions once: those
of `Grouping.leaders`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmfx.errors import CheckpointError
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.pattern import MAX_M

Bytes = NDArray[np.uint8]
Words = NDArray[np.integer[Any]]

_CHUNK = 1 << 13  # groups a pass, so that the arithmetic stays in cache; a multiple of 8, so that a pass ends on a byte
_LOW = 16  # positions decoded by one table look-up
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes -> type; floats may rewrite a NaN


def pack(weight: Tensor, mask: Tensor, n: int, grouping: Grouping) -> tuple[Tensor, Tensor]:
    """Kept values and packed positions of a weight; `unpack` is the inverse.

    Args:
        mask: bool, shaped as `weight`, true = kept: exactly ``min(n, size)`` in every group, the same in rows that share.

    Returns:
        ``(values, positions)``: 1-D of `weight`'s dtype, and 1-D uint8 bytes; their lengths are `packed_sizes`.

    Raises:
        CheckpointError: the shapes disagree, or a group keeps another number of weights, or rows that should share do not.
    """
    if mask.dtype != torch.bool or mask.shape != weight.shape or mask.numel() != grouping.numel:
        raise CheckpointError(
            f"expected a weight and a bool mask of one shape that fit rows {grouping.rows}, "
            f"got {tuple(weight.shape)} and {mask.dtype} {tuple(mask.shape)}"
        )
    mask = mask.detach().contiguous()
    streams, leaders, leading = [], grouping.leaders, mask
    if grouping.vector > 1:
        leading = grouping.lead(mask).contiguous()
        if not torch.equal(grouping.spread(leading), mask.view(grouping.rows)):
            raise CheckpointError(f"rows that share a mask, {grouping.vector} at a time, keep different positions")
    for index, block in enumerate(leaders.blocks(leaders.as_lines(leading))):
        size, choices = block.shape[2], _to_words(_group_bits(block))  # choices: outer, groups, inner
        _check_kept(np.bitwise_count(choices), min(n, size), size, first=index * (leaders.lines[1] // leaders.m))
        width, parts = _rank_bits(size, n), np.split(choices.ravel(), range(_CHUNK, choices.size, _CHUNK))
        streams += [np.packbits(_to_bits(_rank(part), width), bitorder="little") for part in parts]
    kept = _flat(weight.detach().contiguous()).take(np.flatnonzero(mask.numpy()))
    positions = np.concatenate([np.empty(0, np.uint8), *streams])
    return torch.from_numpy(kept).view(weight.dtype), torch.from_numpy(positions)


def unpack(values: Tensor, positions: Tensor, n: int, grouping: Grouping, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Weight and mask of `shape` from what `pack` returned; dropped weights are zero.

    Args:
        values: the kept weights, ``(kept,)``.
        positions: where they stand, uint8 ``(bytes,)``.
        n: weights kept in a group.
        grouping: how the weight is cut into groups.

    Returns:
        ``(weight, mask)``: contiguous, of the dtype of `values`, and bool.

    Raises:
        CheckpointError: the lengths do not fit the pattern and the shape, or the positions are corrupt.
    """
    _check_lengths(values, positions, n, grouping, shape)
    leaders = grouping.leaders
    lines = torch.empty(leaders.lines, dtype=torch.bool)
    stream = positions.detach().contiguous().numpy()
    for block, (count, size) in zip(leaders.blocks(lines), leaders.sizes, strict=True):
        coded, stream = np.split(stream, [_stream_bytes(count, size, n)])
        parts = [_to_bits(_unrank(ranks, size, n), size) for ranks in _read_ranks(coded, count, size, n)]
        bits = _group_bits(block)
        bits[...] = np.concatenate(parts).reshape(bits.shape)
    mask = grouping.spread(leaders.from_lines(lines, leaders.rows)).reshape(shape).contiguous()
    weight = torch.zeros(shape, dtype=values.dtype)
    _flat(weight)[np.flatnonzero(mask.numpy())] = _flat(values.detach().contiguous())
    return weight, mask


def packed_sizes(n: int, grouping: Grouping) -> tuple[int, int]:
    """Number of kept values, and number of position bytes."""
    return grouping.kept(n), sum(_stream_bytes(count, size, n) for count, size in grouping.leaders.sizes)


def _rank_bits(size: int, n: int) -> int:
    """``ceil(log2 C(size, n))``: bits of one rank."""
    return (math.comb(size, min(n, size)) - 1).bit_length()


def _stream_bytes(count: int, size: int, n: int) -> int:
    """Bytes of `count` ranks, the last one filled up."""
    return -(-count * _rank_bits(size, n) // 8)


def _flat(tensor: Tensor) -> Words:
    """The bits of a contiguous tensor as a flat view of integers."""
    return tensor.view(-1).view(_INTEGERS[tensor.element_size()]).numpy()


def _group_bits(block: Tensor) -> Bytes:
    """A view ``(outer, groups, inner, size)`` of a bool block ``(outer, groups, size, inner)``."""
    return block.movedim(2, 3).numpy().view(np.uint8)


def _to_words(bits: Bytes) -> Words:
    """Bits ``(..., width)``, the lowest first -> unsigned words ``(...)`` of the narrowest type that holds them."""
    *lead, width = bits.shape
    word = max(8, 1 << (width - 1).bit_length())
    padded = np.zeros((*lead, word), np.uint8)  # numpy packs one long row of bits 20 times faster than many short ones
    padded[..., :width] = bits
    return np.packbits(padded, bitorder="little").view(f"u{word // 8}").reshape(lead)


def _bytes(words: Words) -> Bytes:
    """The bytes of `words` ``(count,)``, the lowest first: ``(count, itemsize)``."""
    return words.view(np.uint8).reshape(len(words), words.itemsize)


def _to_bits(words: Words, width: int) -> Bytes:
    """The lowest `width` bits of `words` ``(count,)``, the lowest first: uint8 ``(count, width)``."""
    return np.unpackbits(_bytes(words), axis=1, count=width, bitorder="little")


@cache
def _binomials() -> NDArray[np.int64]:
    """``C(p, k)`` at ``[p, k]``, for every position p."""
    return np.array([[math.comb(p, k) for k in range(MAX_M + 1)] for p in range(MAX_M)])


@cache
def _byte_ranks() -> NDArray[np.int64]:
    """``[b, k, v]``: what byte b of a choice, of value v, adds to its rank when the bytes below keep k positions."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # v, bit
    order = np.arange(MAX_M - 7)[:, None, None] + bits.cumsum(axis=1, dtype=np.int64)  # k, v, bit: its i in C(p, i)
    return np.stack([(bits * _binomials()[p, order]).sum(axis=2) for p in np.arange(MAX_M).reshape(-1, 8)])


@cache
def _low_choices() -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """All choices of k among the lowest 16 positions, sorted by k, then by rank; and where each k starts."""
    counts = np.bitwise_count(np.arange(1 << _LOW, dtype=np.uint16))
    starts = np.searchsorted(np.sort(counts), np.arange(_LOW + 1))
    return np.argsort(counts, kind="stable").astype(np.uint16), starts


def _rank(choices: Words) -> NDArray[np.int64]:
    """Rank of each choice (unsigned words, position p is bit p), byte by byte."""
    ranks, kept = np.zeros((2, len(choices)), np.int64)
    for table, byte in zip(_byte_ranks(), _bytes(choices).T, strict=False):
        ranks += table.ravel().take(256 * kept + byte)
        kept += np.bitwise_count(byte)
    return ranks


def _unrank(ranks: NDArray[np.int64], size: int, n: int) -> NDArray[np.uint64]:
    """Choices of `n` of `size` positions: the highest positions one by one, the lowest 16 from a table."""
    choices = np.zeros(len(ranks), np.uint64)
    left = np.full(len(ranks), min(n, size))  # positions still to find
    for position in range(size - 1, _LOW - 1, -1):
        below = _binomials()[position].take(left)  # choices that leave this position out come first
        taken = ranks >= below
        ranks = ranks - below * taken
        left -= taken
        choices += choices + taken
    low, starts = _low_choices()
    return (choices << np.uint64(_LOW)) | low.take(starts.take(left) + ranks)


def _read_ranks(stream: Bytes, count: int, size: int, n: int) -> Iterator[NDArray[np.int64]]:
    """The `count` ranks of one stream, chunk by chunk."""
    width, choices = _rank_bits(size, n), math.comb(size, min(n, size))
    if (spare := -count * width % 8) and stream[-1] >> (8 - spare):
        raise CheckpointError(f"corrupt positions: the last {spare} bits of a stream of {count} ranks should be zeros")
    for start in range(0, max(count, 1), _CHUNK):  # at least one pass, were it empty
        length = min(_CHUNK, count - start)
        bits = np.unpackbits(stream[start * width // 8 :], count=length * width, bitorder="little")
        ranks = _to_words(bits.reshape(length, width)).astype(np.int64)
        if (bad := np.flatnonzero(ranks >= choices)).size:
            raise CheckpointError(
                f"corrupt positions: rank {start + bad[0]} of {count} is {ranks[bad[0]]}, "
                f"expected less than C({size}, {n}) = {choices}"
            )
        yield ranks


def _check_kept(counts: Words, n: int, size: int, first: int) -> None:
    """Raise unless every group keeps `n`; counts ``(outer, groups, inner)`` start at group `first` of their row."""
    if (bad := np.argwhere(counts != n)).size:
        outer, index, inner = bad[0]
        raise CheckpointError(
            f"group {first + index} of row {outer * counts.shape[2] + inner} keeps {counts[outer, index, inner]} of "
            f"{size} weights, expected exactly {n}; {len(bad)} such groups"
        )


def _check_lengths(values: Tensor, positions: Tensor, n: int, grouping: Grouping, shape: tuple[int, ...]) -> None:
    """Raise unless the parts and the shape fit the pattern."""
    if math.prod(shape) != grouping.numel:
        raise CheckpointError(f"shape {tuple(shape)} does not fit rows {grouping.rows}")
    kept, coded = packed_sizes(n, grouping)
    if values.shape != (kept,) or positions.shape != (coded,) or positions.dtype != torch.uint8:
        raise CheckpointError(
            f"{n}:{grouping.m} over rows {grouping.rows} takes {kept} values and {coded} position bytes, "
            f"got values {tuple(values.shape)} and {positions.dtype} positions {tuple(positions.shape)}"
        )
