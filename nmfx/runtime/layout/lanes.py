"""Pictures as lanes: how the operators of a chain lay out what goes from one to the next (nmfx/runtime/kernel/lanes.h).

The rows of a picture are dealt out to the lanes of vectors, so that the next pixel is the next vector and every shift of a
window an aligned vector somewhere else. `plan` chooses lanes for the pictures of a chain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NO_PIXEL = 1 << 20  # lanes: no pixel
IN_STRIP = 1 << 22  # floats of a channel at most; an index counts strips above them


@dataclass(frozen=True)
class Window:
    """What a convolution reads of a picture ``height x width``, to make one ``ceil(height / stride) x ceil(width / stride)``.

    Attributes:
        kernel, dilation: of height and width.
        padding: above and to the left; what lies below and to the right follows from the sizes.
    """

    height: int
    width: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @staticmethod
    def of(
        shape: tuple[int, int],
        out: tuple[int, int],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, ...],
        dilation: tuple[int, int],
    ) -> Window | None:
        """The window of a convolution.

        Args:
            shape, out: height and width of the picture that is read, and of the one that is made.
            kernel, stride, dilation: of height and width.
            padding: two numbers, or four: top, left, bottom, right.

        Returns:
            The window; None where lanes cannot compute it: strides above 2 or unequal, outputs of other sizes.
        """
        step = stride[0]
        window = Window(*shape, kernel, step, (padding[0], padding[1]), dilation)
        return window if stride[1] == step <= 2 and out == window.out and (step == 1 or out != shape) else None

    @property
    def taps(self) -> list[tuple[int, int]]:
        """Rows down and columns to the right of what each weight of a filter reads, from the output pixel times the stride."""
        (kh, kw), (dh, dw), (ph, pw) = self.kernel, self.dilation, self.padding
        return [(y * dh - ph, x * dw - pw) for y in range(kh) for x in range(kw)]

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns, modulo a stride of two, that the taps read."""
        return tuple(sorted({(row % 2, column % 2) for row, column in self.taps}))

    def gap(self, strips: int) -> tuple[int, int]:
        """Columns that it reads beyond a strip, to the left and to the right, at most, when pictures are cut into `strips`."""
        first, last = min(x for _, x in self.taps), max(x for _, x in self.taps)
        read, made = (_columns(size, strips) for size in (self.width, self.out[1]))
        left = max(begin - self.stride * there for begin, there in zip(read[:-1], made[:-1], strict=True))
        right = max(self.stride * (there - 1) + 1 - end for end, there in zip(read[1:], made[1:], strict=True))
        return max(0, left - first), max(0, right + last)

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        return -(-self.height // self.stride), -(-self.width // self.stride)


@dataclass(frozen=True)
class Lanes:
    """How the channels of a picture lie in memory.

    Attributes:
        picture: height and width in pixels.
        line: pixels from one row of a strip to the next, the zeros between them counted.
        size: lanes of a vector.
        strips: from left to right, each with all its channels behind one another.
        rows, width, pitch: rows of a lane, vectors of each, and from one to the next. Where a lane begins anywhere in a row
            there is one "row", of all vectors.
        length: vectors of a lane.
        left, right: columns beyond a strip that windows look at.
        before, vectors: of a channel of a strip, those before the first pixel and all.
    """

    picture: tuple[int, int]
    line: int
    size: int
    strips: int
    rows: int
    width: int
    pitch: int
    length: int
    left: int = 0
    right: int = 0
    before: int = 0
    vectors: int = 0

    @staticmethod
    def of(picture: tuple[int, int], gap: tuple[int, int], size: int, rows: int, strips: int) -> Lanes:
        """Lanes for a picture.

        Args:
            picture: height and width in pixels.
            gap: columns that windows read beyond a strip, to the left and to the right.
            size: lanes of a vector.
            rows: whole rows in a lane; 0 cuts rows where a lane is full.
            strips: from left to right; one where rows are cut.

        Returns:
            The lanes, without a halo.
        """
        height, width = picture
        left, right = gap
        between = left + right if strips > 1 else max(gap)  # at the ends of rows the same zeros serve both
        if rows:
            line = width // strips + between
            return Lanes(picture, line, size, strips, rows, width // strips, line, rows * line, left, right)
        line = width + between
        length = -(-((height - 1) * line + width) // size)
        return Lanes(picture, line, size, 1, 1, length, length, length)

    @staticmethod
    def in_place(picture: tuple[int, int], source: Lanes) -> tuple[int, Lanes]:
        """The output of a stride of two whose rows stay in their lanes and columns in their strips.

        Returns:
            Rows of a lane of `source` from one that is read to the next, and the output's lanes, of which every second one is
            empty where a single row cannot be halved.
        """
        width = -(-picture[1] // source.strips)
        down, rows, line = (2, source.rows // 2, width) if source.rows % 2 == 0 else (1, source.rows, 2 * width)
        return down, Lanes(picture, line, source.size, source.strips, rows, width, width, rows * width)

    @property
    def numbers(self) -> list[int]:
        """These lanes as the numbers that the kernel reads (kernel/lanes.h)."""
        counts = [self.rows, self.width, self.pitch, self.length, self.before, self.vectors]
        return [*counts, self.strips, self.left, self.right]

    @property
    def whole_rows(self) -> bool:
        """Whether lanes hold whole rows."""
        return self.length == self.rows * self.line and self.strips * self.width == self.picture[1]

    @property
    def columns(self) -> list[int]:
        """The column of the picture at which each strip begins, and its width at the end."""
        return _columns(self.picture[1], self.strips)

    def seen_by(self, windows: Iterable[tuple[list[int], int]]) -> Lanes:
        """The lanes with the halo of `windows`: for each the offsets of its taps, and its last position, in vectors."""
        before = after = 0
        for offsets, last in windows:
            before, after = max(before, -min(offsets)), max(after, last + max(offsets) - self.length + 1)
        vectors = before + self.length + after
        return replace(self, before=before, vectors=vectors + (vectors % 16 == 0))  # channels in all sets of the cache

    def offset(self, row: int, column: int) -> int:
        """Vectors from a pixel to the one `row` rows down and `column` columns to the right."""
        return row * self.line + column

    def last(self, down: int, across: int, out: Lanes) -> int:
        """The last vector that a window is set on, in steps of `down` rows and `across` vectors."""
        late = max(self.late(across, out)) if out.strips == self.strips else 0
        return down * (out.rows - 1) * self.pitch + across * (out.width - 1) + max(0, late)

    def late(self, across: int, out: Lanes) -> list[int]:
        """For each strip, vectors by which its first window is late, as strips of odd width do not halve."""
        return [across * there - here for here, there in zip(self.columns[:-1], out.columns[:-1], strict=True)]

    def places(self) -> Tensor:
        """Row and column of the picture for every float of a channel of every strip, ``(2, strips, vectors, size)``; -1 where
        there is no pixel. Columns of the neighbouring strips are counted, where windows look at them.
        """
        height, width = self.picture
        vectors = torch.arange(-self.before, self.vectors - self.before)[:, None]
        place = torch.arange(self.size) * self.length + vectors + self.left * (self.strips > 1)
        row, column = place.div(self.line, rounding_mode="floor"), place.remainder(self.line)
        column = column - self.left * (self.strips > 1) + torch.tensor(self.columns[:-1])[:, None, None]
        row = row.expand(column.shape)
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return torch.where(inside, torch.stack([row, column]), -1)

    def mask(self) -> Tensor:
        """-1 where a lane holds a pixel: ``(rows, 1, size)`` for whole rows, else ``(1, width, size)``."""
        held = (self.places()[0, 0, self.before : self.before + self.length] >= 0).int().neg()
        held = held.reshape(self.rows, self.pitch, self.size)[:, : self.width]
        return (held[:, :1] if self.whole_rows else held).contiguous()


def sources(local: Lanes, source: Lanes) -> Tensor:
    """Where every vector of a channel with its halo (`local`) is found in `source`.

    Returns:
        ``(strips, vectors, 4)``, int32: strips to the right, vectors from the first pixel of the channel, lanes to shift by
        (NO_PIXEL for zeros), and floats from where the mask of `source` begins.
    """
    found = []
    for strip in range(local.strips):
        for vector in range(-local.before, local.vectors - local.before):
            if not source.whole_rows:
                lanes, there = divmod(vector, source.length)
                found.append((0, there, lanes, there * source.size) if there < source.width else (0, 0, NO_PIXEL, 0))
                continue
            line, column = divmod(vector + local.left * (local.strips > 1), local.pitch)
            column -= local.left * (local.strips > 1)
            lanes, row = divmod(line, local.rows)
            beside, there = divmod(column, source.width)
            inside = 0 <= strip + beside < local.strips
            found.append((beside, row * source.pitch + there, lanes, row * source.size) if inside else (0, 0, NO_PIXEL, 0))
    return torch.tensor(found, dtype=torch.int32).reshape(local.strips, local.vectors, 4)


def _columns(width: int, strips: int) -> list[int]:
    return [-(-width * strip // strips) for strip in range(strips + 1)]


def from_plain(lanes: Lanes, window: Window | None = None) -> Tensor:
    """Index ``(strips, floats)``: for every float of lanes its pixel in a plain plane, -1 for none (`rearrange` in the kernel).

    With a window of stride 2, for its phases, one after the other.
    """
    height, width = (window.height, window.width) if window else lanes.picture
    stride = window.stride if window else 1
    row, column = lanes.places()
    found = []
    for a, b in window.phases if window else ((0, 0),):
        y, x = row * stride + a, column * stride + b
        found.append(torch.where((row >= 0) & (y < height) & (x < width), y * width + x, -1))
    return torch.stack(found, 1).int().flatten(1).contiguous()


def to_plain(lanes: Lanes) -> Tensor:
    """Index ``(1, pixels)`` of the float in lanes for every pixel of a plain plane."""
    height, width = lanes.picture
    starts = torch.tensor(lanes.columns)
    columns = torch.arange(width)
    strip = torch.searchsorted(starts, columns, right=True) - 1
    place = torch.arange(height)[:, None] * lanes.line + columns - starts[strip]
    lane, vector = place.div(lanes.length, rounding_mode="floor"), place.remainder(lanes.length)
    channel = (lanes.before + vector) * lanes.size + lane
    return (strip * IN_STRIP + channel).int().reshape(1, -1).contiguous()


def between(first: Lanes, index: Tensor) -> Tensor:
    """`index` of `from_plain`, with places in the lanes `first` instead of a plain plane."""
    plain = to_plain(first)[0]
    return torch.where(index >= 0, plain[index.clamp_min(0).long()], -1).int()
