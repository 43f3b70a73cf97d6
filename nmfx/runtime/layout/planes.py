"""Pictures of bytes as planes: how the int8 operators of a chain lay out what goes from one to the next (kernel/planes.h).

A channel is one stream of pixels, row after row, with bytes between the rows that stand for the zeros around a picture. Every
shift of a window is then the same stream from another place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nmfx.runtime.layout.lanes import Window

LINE = 64  # bytes: channels begin at and are computed by so many (kernel/planes.h)


@dataclass(frozen=True)
class Planes:
    """How a picture lies in memory.

    Attributes:
        height, width: in pixels.
        row: bytes from one row to the next.
        pitch: bytes of a channel.
        margin: bytes before the first channel and behind the last that windows read.
        zero: the byte that stands for zero.
    """

    height: int
    width: int
    row: int
    pitch: int
    margin: int
    zero: int

    @property
    def length(self) -> int:
        """Bytes from the first pixel of a channel to behind the last."""
        return (self.height - 1) * self.row + self.width

    @property
    def numbers(self) -> list[int]:
        """These planes as the numbers that the kernel reads."""
        return [self.height, self.width, self.row, self.pitch, self.margin, self.zero]

    def mask(self) -> Tensor:
        """255 where a byte of a channel is a pixel, uint8 ``(bytes that are computed,)``."""
        place = torch.arange(whole_lines(self.length))
        return ((place % self.row < self.width) & (place < self.length)).to(torch.uint8) * 255


@dataclass(frozen=True)
class Picture:
    """What `node` makes, as planes; or the `phases` of it that a window with a stride of two reads, each a picture."""

    node: Hashable
    phases: tuple[tuple[int, int], ...] = ()

    @property
    def stride(self) -> int:
        """Of the windows that read it."""
        return 2 if self.phases else 1

    @property
    def numbers(self) -> list[int]:
        """The phases as the kernel reads them."""
        return [2 * row + column for row, column in self.phases] or [0]


def whole_lines(count: int) -> int:
    """The next multiple of `LINE`."""
    return -(-count // LINE) * LINE


def read_by(window: Window, node: Hashable) -> Picture:
    """The picture of a node that a window reads."""
    return Picture(node, window.phases if window.stride == 2 else ())


def taps(window: Window) -> list[tuple[int, int, int]]:
    """For each tap the picture that it reads of each channel, and how far down and to the right."""
    stride, phases = window.stride, window.phases
    if stride == 1:
        return [(0, row, column) for row, column in window.taps]
    return [(phases.index((row % 2, column % 2)), row // 2, column // 2) for row, column in window.taps]


def rows_of(windows: Iterable[Window], shapes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Bytes of a row with those behind it, for each size of pictures: windows never see past the next row's beginning."""
    gaps: dict[tuple[int, int], int] = defaultdict(int)
    for window in windows:
        gaps[window.out] = max(gaps[window.out], *(abs(column) for _, _, column in taps(window)))
    return {shape: shape[1] + gaps[shape] for shape in {*gaps, *shapes}}


def offsets(window: Window, planes: Planes, channels: int) -> Tensor:
    """Bytes from the first channel to what each column of a weight reads, int32 ``(channels * taps,)``.

    Args:
        planes: of what is read.
        channels: before phases were split off.
    """
    count = max(1, len(window.phases)) if window.stride == 2 else 1
    within = torch.tensor([phase * planes.pitch + down * planes.row + right for phase, down, right in taps(window)])
    return (torch.arange(channels)[:, None] * (count * planes.pitch) + within).flatten().int()


def lay_out(
    shapes: Mapping[Picture, tuple[int, int]], windows: Mapping[Picture, list[Window]], zeros: Mapping[Hashable, int]
) -> dict[Picture, Planes]:
    """Planes for every picture of a chain.

    Args:
        shapes: height and width of each; of the output of the windows that read phases.
        windows: that read it.
        zeros: the byte that stands for zero, by node.
    """
    rows = rows_of((one for several in windows.values() for one in several), shapes.values())
    found = {}
    for picture, (height, width) in shapes.items():
        row = rows[height, width]
        reach = [abs(down * row + right) for window in windows.get(picture, ()) for _, down, right in taps(window)]
        seen = max(reach, default=0)
        pitch = whole_lines((height - 1) * row + width + seen)
        found[picture] = Planes(height, width, row, pitch, whole_lines(seen), zeros[picture.node])
    return found
