"""What the operators ask of their tensors and numbers, as the kernel does (kernel/checks.h): for plain PyTorch and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LONGEST = 1 << 30  # of a picture's sides, padding and dilation
WIDEST_STEP = 256  # of strides


def expect(holds: object, what: str) -> None:
    """Raise, in the kernel's words, unless `holds`.

    Raises:
        RuntimeError: it does not hold.
    """
    if not holds:
        raise RuntimeError(f"nmfx runtime: expected {what}")


def check_pictures(x: Tensor) -> None:
    """Pictures ``(batch, channels, height, width)`` that have pixels."""
    expect(
        x.dim() == 4 and x.dtype == torch.float32 and x.layout == torch.strided,
        "float32 pictures (batch, channels, height, width)",
    )
    expect(all(1 <= size <= LONGEST for size in x.shape[1:]), f"pictures with channels and pixels, got {list(x.shape)}")


def check_window(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The same as `output_size`, of arguments that are checked.

    Args: as `output_size`.

    Returns:
        Height and width, both above zero.

    Raises:
        RuntimeError: naming what was expected.
    """
    expect(len(kernel) == 2 and _within(kernel, 1, LONGEST), "a kernel of two sizes")
    expect(len(stride) == 2 and _within(stride, 1, WIDEST_STEP), f"two strides of 1 to {WIDEST_STEP}")
    expect(len(padding) in (2, 4) and _within(padding, 0, LONGEST), "padding of two or four numbers")
    expect(len(dilation) == 2 and _within(dilation, 1, LONGEST), "two dilations")
    out = output_size(x, kernel, stride, padding, dilation)
    expect(all(size > 0 for size in out), "pictures no smaller than the kernel")
    return out


def output_size(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of the output of a window that slides over pictures ``(batch, channels, height, width)``.

    Args:
        kernel, stride, dilation: two numbers each, for height and width.
        padding: two numbers, or four: top, left, bottom, right.

    Returns:
        Height and width; zero or less where the window is larger than the padded picture.
    """
    both = [first + last for first, last in zip(padding[:2], padding[-2:], strict=True)]
    sizes = zip(x.shape[2:], kernel, stride, both, dilation, strict=True)
    return [(n + p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]


def check_packed(given: Any, out: int, groups: int, known: bool) -> None:
    """Check packed weights, as `nmfx.runtime.layout.packed.pack` makes them.

    Args:
        given: `values`, `columns`, `pointers`, `bias`, `width`, `chunk`, `vectors`.
        out, groups: rows in all groups, and how many these are.
        known: the tensors have values, which are checked too; shapes alone otherwise.

    Raises:
        RuntimeError: naming what was expected.
    """
    values, columns, pointers, width, chunk = given.values, given.columns, given.pointers, given.width, given.chunk
    expect(1 <= given.vectors <= 8, "1 to 8 vectors")
    expect(0 < chunk <= 65536 and 0 < width <= LONGEST, "chunks of up to 65,536 columns, and a width")
    expect(groups > 0 and 0 < out <= LONGEST and out % groups == 0, "output channels that divide by the groups")
    kinds = (values.dtype, columns.dtype, pointers.dtype) == (torch.float32, torch.int16, torch.int32)
    in_order = all(one.is_contiguous() and one.dim() == 1 for one in (values, columns, pointers))
    expect(kinds and in_order, "contiguous values of float32, columns of int16, pointers of int32")
    chunks = -(-width // chunk)
    fits = pointers.numel() == out * chunks + 1 and columns.numel() == values.numel()
    expect(fits, "packed weights of this shape")
    check_bias(given.bias, out)
    if known:
        _check_places(columns, pointers, out // groups, width, chunk)


def _check_places(columns: Tensor, pointers: Tensor, rows: int, width: int, chunk: int) -> None:
    counts = pointers[1:].long() - pointers[:-1].long()
    rises = int(pointers[0]) == 0 and int(pointers[-1]) == len(columns) and bool((counts >= 0).all())
    expect(rises, "pointers that rise from 0 to the number of values")
    part = torch.arange(len(counts), device=counts.device) // rows % (-(-width // chunk))
    room = (width - part * chunk).clamp_max(chunk)
    expect(bool((counts <= room).all()), "no more columns in a row than its chunk has")
    lines = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    places = columns.long() & 0xFFFF
    rising = (places[1:] > places[:-1]) | (lines[1:] != lines[:-1])
    expect(bool((places < room[lines]).all()) and bool(rising.all()), "columns in order and within their chunk")


def check_bias(bias: Tensor | None, rows: int) -> None:
    """A bias is absent, or holds one float32 for each of `rows`."""
    fits = bias is None or (bias.dtype == torch.float32 and bias.is_contiguous() and tuple(bias.shape) == (rows,))
    expect(fits, "a contiguous float32 bias of every row")


def check_residual(residual: Tensor | None, sizes: Sequence[int]) -> None:
    """A residual is absent, or float32 of the output's `sizes`."""
    fits = residual is None or (residual.dtype == torch.float32 and tuple(residual.shape) == tuple(sizes))
    expect(fits, f"a float32 residual of the output's shape {list(sizes)}")


def _within(numbers: Sequence[int], least: int, most: int) -> bool:
    return all(least <= number <= most for number in numbers)
