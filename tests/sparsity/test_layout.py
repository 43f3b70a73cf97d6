"""Laws of the layout: every weight lies in exactly one group, and groups run along the input channels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nmfx.errors import SchemeError
from nmfx.sparsity.layout import Grouping, group
from nmfx.sparsity.pattern import Pattern

CASES = {  # shape, grouping
    "linear": ((5, 8), Grouping((5, 8, 1), 4)),
    "conv": ((3, 8, 3, 2), Grouping((3, 8, 6), 4)),
    "transposed": ((16, 3, 5), Grouping((2, 8, 15), 4)),
    "short": ((3, 10, 3), Grouping((3, 10, 3), 4)),
    "only-short": ((3, 3, 2), Grouping((3, 3, 2), 4)),
    "flat": ((4, 3, 3, 3), Grouping((4, 3, 9), 4, flat=True)),
    "m=1": ((3, 5), Grouping((3, 5, 1), 1)),
    "one-row": ((64,), Grouping((1, 64, 1), 64)),
}
cases = pytest.mark.parametrize(("shape", "grouping"), CASES.values(), ids=CASES)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A weight whose entries say where they lie in memory."""
    return torch.arange(math.prod(shape)).view(shape)


def groups_of(weight: Tensor, grouping: Grouping) -> set[tuple[int, ...]]:
    blocks = grouping.blocks(grouping.as_lines(weight))
    return {tuple(entries) for block in blocks for entries in block.movedim(2, -1).flatten(0, -2).tolist()}


@cases
def test_lines_lose_nothing(shape: tuple[int, ...], grouping: Grouping) -> None:
    weight = numbered(shape)
    lines = grouping.as_lines(weight)
    assert lines.shape == grouping.lines
    assert torch.equal(grouping.from_lines(lines, shape), weight)
    if not grouping.flat:
        assert lines.data_ptr() == weight.data_ptr()  # a view: writing to it writes the weight


@cases
def test_every_weight_is_in_one_group(shape: tuple[int, ...], grouping: Grouping) -> None:
    groups = groups_of(numbered(shape), grouping)
    assert sorted(entry for entries in groups for entry in entries) == list(range(math.prod(shape)))
    assert len(groups) == grouping.groups
    sizes = [size for count, size in grouping.sizes for _ in range(count)]
    assert sorted(map(len, groups)) == sorted(sizes)
    assert grouping.numel == math.prod(shape) == sum(sizes)


@cases
def test_kept_counts_short_groups(shape: tuple[int, ...], grouping: Grouping) -> None:
    sizes = [len(entries) for entries in groups_of(numbered(shape), grouping)]
    for n in range(1, grouping.m + 1):
        assert grouping.kept(n) == sum(min(n, size) for size in sizes)
    assert grouping.kept(grouping.m) == grouping.numel


def test_blocks_are_views_of_the_lines() -> None:
    grouping = Grouping((2, 10, 3), 4)
    lines = torch.zeros(grouping.lines)
    for block in grouping.blocks(lines):
        block.fill_(1)
    assert lines.all()


def test_a_convolution_groups_input_channels() -> None:
    weight = numbered((3, 8, 3, 2))
    places = itertools.product(range(3), (0, 4), range(3), range(2))
    expected = {tuple(weight[o, i : i + 4, y, x].tolist()) for o, i, y, x in places}
    assert groups_of(weight, Grouping((3, 8, 6), 4)) == expected


def test_a_linear_groups_input_features() -> None:
    weight = numbered((5, 8))
    assert groups_of(weight, Grouping((5, 8, 1), 4)) == {tuple(row) for row in weight.view(-1, 4).tolist()}


def test_a_grouped_transposed_convolution_groups_the_input_channels_of_one_conv_group() -> None:
    weight = numbered((16, 3, 5))  # (in, out / 2, k): two conv groups of 8 input channels
    expected = {tuple(weight[i : i + 4, o, k].tolist()) for i in range(0, 16, 4) for o in range(3) for k in range(5)}
    assert groups_of(weight, Grouping((2, 8, 15), 4)) == expected


def test_flat_groups_cross_rows_channels_last() -> None:
    weight = numbered((4, 3, 3, 3))
    expected = {tuple(row) for row in weight.permute(0, 2, 3, 1).reshape(-1, 4).tolist()}
    assert groups_of(weight, Grouping((4, 3, 9), 4, flat=True)) == expected


def test_flat_and_strict_agree_where_m_divides_the_axis() -> None:
    weight = numbered((3, 8, 2, 2))
    assert groups_of(weight, Grouping((3, 8, 4), 4)) == groups_of(weight, Grouping((3, 8, 4), 4, flat=True))
    assert group("w", (3, 8, 4), Pattern("2:4"), "flat") == group("w", (3, 8, 4), Pattern("2:4"), "strict")


@pytest.mark.parametrize(
    ("rows", "layout", "short", "flat"),
    [((3, 8, 9), "strict", False, False), ((4, 3, 9), "flat", False, True), ((3, 6, 9), "strict", True, False)],
    ids=["divides", "flat", "short"],
)
def test_group(rows: tuple[int, int, int], layout: str, short: bool, flat: bool) -> None:
    grouping = group("w", rows, Pattern("2:4"), layout, short=short)  # type: ignore[arg-type]
    assert grouping == Grouping(rows, 4, flat)


@pytest.mark.parametrize(
    ("rows", "layout", "expected"),
    [
        ((4, 6, 1), "strict", ["fc.weight", "2:4", "in=6", "2, 3, 6"]),
        ((4, 1, 9), "strict", ["fc.weight", "in=1", "no M divides it"]),
        ((3, 3, 9), "flat", ["fc.weight", "81", "divide by 4"]),
    ],
    ids=["strict", "depthwise", "flat"],
)
def test_what_cannot_be_cut_says_why(rows: tuple[int, int, int], layout: str, expected: list[str]) -> None:
    with pytest.raises(SchemeError) as caught:
        group("fc.weight", rows, Pattern("2:4"), layout)  # type: ignore[arg-type]
    for words in expected:
        assert words in str(caught.value)
