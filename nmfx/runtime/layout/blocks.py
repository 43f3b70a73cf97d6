"""Kept int8 weights as the kernel reads them: rows in blocks that share their columns, four of which make a quad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nmfx.runtime.checks import expect

MOST_COLUMNS = 1 << 16  # input channels times taps: columns are numbers of 16 bits
HEIGHTS = (1, 2, 4)
INTERLEAVE, MULTIPLY = 8.0, 4.0  # instructions of a quad over a vector of pixels: once for a block, and for each of its rows


@dataclass(frozen=True)
class Blocks:
    """A weight of int8 without its zeros (kernel/quantized.h).

    Attributes:
        values: int8, for every quad of a block the four weights of each of its rows.
        columns: int16 (unsigned), four of each quad: numbers of ``(input channel, kernel position)`` over all groups.
        blocks: int32 ``(blocks, 5)``: first row, rows, quads, and the quads at which its columns and its values begin.
        height: rows of a block; values of those that are missing are zero.
    """

    values: Tensor
    columns: Tensor
    blocks: Tensor
    height: int


def block(weight: Tensor, groups: int = 1, height: int | None = None) -> Blocks:
    """An int8 weight ``(out, in / groups, ...)`` in blocks.

    Args:
        height: rows of a block; None takes the one of `HEIGHTS` that needs the fewest instructions.
    """
    out, width = weight.shape[0], weight[0].numel()
    lines = weight.reshape(groups, out // groups, width)
    if height is None:
        costs = {one: _quads(_kept(lines, one)).sum().item() * (INTERLEAVE + MULTIPLY * one) for one in HEIGHTS}
        height = min(HEIGHTS, key=costs.__getitem__)
    kept = _kept(lines, height)  # groups, blocks, columns
    masks, which = kept.unique(dim=1, return_inverse=True) if groups == 1 else (kept, torch.arange(kept.shape[1]))
    masks, quads = masks.flatten(0, 1), _quads(masks).flatten()  # lists of columns: shared by blocks where there is one group
    group = torch.arange(groups).repeat_interleave(len(masks) // groups)
    line, place = _padded(masks, quads)
    columns = place + group[line] * width
    begins = F.pad(quads.cumsum(0), (1, 0))
    of_block = torch.arange(groups)[:, None] * (len(masks) // groups) + which if groups > 1 else which[None]
    of_block = of_block.flatten()  # the list of each block
    counts = quads[of_block]
    rows = F.pad(lines, (0, 0, 0, -lines.shape[1] % height)).reshape(-1, height, width)
    owner = torch.arange(len(rows)).repeat_interleave(counts * 4)
    within = torch.arange(len(owner)) - F.pad((counts * 4).cumsum(0), (1, 0))[owner]
    source = begins[of_block][owner] * 4 + within
    true = within < kept.flatten(0, 1).sum(1)[owner]  # the rest pads the last quad
    values = rows[owner, :, place[source]] * true[:, None]
    values = values.reshape(-1, 4, height).transpose(1, 2).contiguous().flatten()
    of_group = torch.arange(kept.shape[1]) * height
    first = (torch.arange(groups)[:, None] * lines.shape[1] + of_group).flatten()
    there = (lines.shape[1] - of_group).clamp_max(height).repeat(groups)
    starts = F.pad(counts.cumsum(0), (1, 0))[:-1]
    table = torch.stack([first, there, counts, begins[:-1][of_block], starts], 1)
    return Blocks(values.to(torch.int8), columns.int().to(torch.int16), table.int().contiguous(), height)


def unblock(values: Tensor, columns: Tensor, blocks: Tensor, height: int, shape: Sequence[int], groups: int) -> Tensor:
    """The weight of `block`, int8 of `shape`."""
    width = math.prod(shape[1:])
    _, rows, counts, first, starts = blocks.long().unbind(1)
    owner = torch.arange(len(blocks)).repeat_interleave(counts)
    within = torch.arange(len(owner)) - F.pad(counts.cumsum(0), (1, 0))[owner]
    quads = values.reshape(-1, height, 4)[starts[owner] + within].transpose(1, 2)  # quads, columns, rows
    places = (columns.long() & 0xFFFF).reshape(-1, 4)[first[owner] + within] % width
    lines = torch.zeros(len(blocks), width, height, dtype=torch.int32)
    lines.index_put_((owner[:, None].expand_as(places), places), quads.int(), accumulate=True)  # those that pad are zero
    there = torch.arange(height) < rows[:, None]
    return lines.transpose(1, 2)[there].to(torch.int8).reshape(*shape)


def row_sums(values: Tensor, blocks: Tensor, height: int) -> Tensor:
    """The sum of every row's weights, int32 ``(out,)``."""
    _, rows, counts, _, starts = blocks.long().unbind(1)
    summed = F.pad(values.reshape(-1, height, 4).int().sum(2).cumsum(0), (0, 0, 1, 0))
    sums = summed[starts + counts] - summed[starts]
    return sums[torch.arange(height) < rows[:, None]].int()


def check_blocks(given: Any, rows: int, width: int, groups: int, known: bool) -> None:
    """Check a weight in blocks.

    Args:
        given: `values`, `columns`, `blocks`, `height`.
        rows: of all groups.
        width: columns of a row.
        known: the tensors have values, which are checked too.

    Raises:
        RuntimeError: naming what was expected.
    """
    values, columns, blocks, height = given.values, given.columns, given.blocks, given.height
    expect(height in HEIGHTS, "blocks of 1, 2 or 4 rows")
    kinds = (values.dtype, columns.dtype, blocks.dtype) == (torch.int8, torch.int16, torch.int32)
    lines = values.dim() == columns.dim() == 1 and len(values) % (4 * height) == 0 and len(columns) % 4 == 0
    expect(kinds and lines and blocks.dim() == 2 and blocks.shape[1] == 5, "values of int8, columns of int16, blocks of int32")
    expect(0 < width * groups <= MOST_COLUMNS, "columns that 16 bits can count")
    if not known:
        return
    first, there, counts, begins, starts = blocks.long().unbind(1)
    expected = F.pad(there.cumsum(0), (1, 0))
    in_order = torch.equal(first, expected[:-1]) and int(expected[-1]) == rows and bool(((there > 0) & (there <= height)).all())
    expect(in_order, "blocks of all rows")
    inside = (counts >= 0) & (begins >= 0) & (starts >= 0) & (begins + counts <= len(columns) // 4)
    expect(bool((inside & (starts + counts <= len(values) // (4 * height))).all()), "blocks within their weights")
    expect(bool(((columns.long() & 0xFFFF) < width * groups).all()), "columns of the weight's")


def _kept(lines: Tensor, height: int) -> Tensor:
    """Which columns a block of rows has, ``(groups, blocks, columns)``."""
    padded = F.pad(lines != 0, (0, 0, 0, -lines.shape[1] % height))
    return padded.reshape(lines.shape[0], -1, height, lines.shape[2]).any(2)


def _quads(kept: Tensor) -> Tensor:
    return -(-kept.sum(-1) // 4)


def _padded(masks: Tensor, quads: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of every mask, the last one repeated to whole quads: numbers of the masks, and of the columns."""
    line = torch.arange(len(masks)).repeat_interleave(quads * 4)
    kept_line, kept_place = masks.nonzero(as_tuple=True)
    counts = masks.sum(1)
    within = torch.arange(len(line)) - F.pad((quads * 4).cumsum(0), (1, 0))[line]
    source = F.pad(counts.cumsum(0), (1, 0))[line] + torch.minimum(within, counts[line] - 1)
    return line, kept_place[source] if len(kept_line) else line
