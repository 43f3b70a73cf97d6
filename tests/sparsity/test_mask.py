"""Laws of the mask: exactly N a group, the largest magnitudes, the earlier on ties; the fast mask is the plain one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nmfx.errors import VerificationError
from nmfx.sparsity import select
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import check_groups, make_mask, top_mask, update_mask

SHAPES = {  # M -> shape and grouping
    "linear": lambda m: ((5, 3 * m), Grouping((5, 3 * m, 1), m)),
    "conv": lambda m: ((3, 2 * m, 3, 2), Grouping((3, 2 * m, 6), m)),
    "transposed": lambda m: ((4 * m, 3, 2), Grouping((2, 2 * m, 6), m)),
    "short": lambda m: ((3, 2 * m + max(1, m // 2), 3), Grouping((3, 2 * m + max(1, m // 2), 3), m)),
    "only-short": lambda m: ((4, m - 1, 2), Grouping((4, m - 1, 2), m)),
    "flat": lambda m: ((2 * m, 3, 3, 3), Grouping((2 * m, 3, 9), m, flat=True)),
}


def with_nan(shape: tuple[int, ...]) -> Tensor:
    values = torch.randn(shape)
    return values.masked_fill(torch.rand(shape) < 0.3, math.nan).masked_fill(torch.rand(shape) < 0.1, -math.inf)


VALUES = {
    "random": torch.randn,
    "tied": lambda shape: torch.randint(-2, 3, shape).float(),
    "zero": lambda shape: torch.zeros(shape).copysign(torch.randn(shape)),
    "constant": lambda shape: torch.full(shape, -0.5),
    "nan": with_nan,
    "tiny": lambda shape: torch.randn(shape) * 1e-40,  # subnormal
}
PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 16), (3, 7), (15, 16), (2, 32), (32, 64), (4, 4)]

shape_ids = pytest.mark.parametrize("layout", SHAPES)
value_ids = pytest.mark.parametrize("values", VALUES)
pattern_ids = pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda number: str(number))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def fast(weight: Tensor, n: int, grouping: Grouping) -> tuple[Tensor, Tensor]:
    """The mask and the masked weight, from tensors that hold rubbish before."""
    mask, masked = torch.ones_like(weight, dtype=torch.bool), torch.full_like(weight, math.nan)
    update_mask(weight, n, grouping, mask, masked)
    return mask, masked


def kept_per_group(mask: Tensor, grouping: Grouping) -> list[tuple[int, int]]:
    """(kept, size) of every group."""
    blocks = grouping.blocks(grouping.as_lines(mask.contiguous()))
    return [(count, block.shape[2]) for block in blocks for count in block.sum(dim=2).flatten().tolist()]


def stated_mask(weight: Tensor, n: int, grouping: Grouping) -> Tensor:
    """The definition, one group at a time: the largest magnitudes, the earlier position on ties, NaN above all."""
    mask = torch.zeros(grouping.lines, dtype=torch.bool)
    lines = grouping.as_lines(weight.abs().double())
    outer, length, inner = lines.shape
    for o, start, k in itertools.product(range(outer), range(0, length, grouping.m), range(inner)):
        stop = min(start + grouping.m, length)
        magnitudes = [math.inf if math.isnan(a) else min(a, 1e300) for a in lines[o, start:stop, k].tolist()]
        order = sorted(range(stop - start), key=lambda i: -magnitudes[i])  # sorted is stable
        for i in order[:n]:
            mask[o, start + i, k] = True
    return grouping.from_lines(mask, tuple(weight.shape))


@shape_ids
@value_ids
@pattern_ids
def test_fast_mask_is_the_plain_one(layout: str, values: str, n: int, m: int) -> None:
    shape, grouping = SHAPES[layout](m)
    weight = VALUES[values](shape)
    before = weight.clone()
    mask, masked = fast(weight, n, grouping)
    assert torch.equal(mask, make_mask(weight, n, grouping))
    assert torch.equal(bits(masked), bits(torch.where(mask, weight, torch.zeros(()))))
    assert all(kept == min(n, size) for kept, size in kept_per_group(mask, grouping))
    assert int(mask.sum()) == grouping.kept(n)
    assert torch.equal(bits(weight), bits(before))


@shape_ids
@value_ids
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 7)], ids=str)
def test_plain_mask_is_its_definition(layout: str, values: str, n: int, m: int) -> None:
    shape, grouping = SHAPES[layout](m)
    weight = VALUES[values](shape)
    assert torch.equal(make_mask(weight, n, grouping), stated_mask(weight, n, grouping))


@shape_ids
@pytest.mark.parametrize("values", ["random", "tied", "nan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_precisions(layout: str, values: str, dtype: torch.dtype) -> None:
    shape, grouping = SHAPES[layout](16)
    weight = VALUES[values](shape).to(dtype)
    mask, masked = fast(weight, 4, grouping)
    assert torch.equal(mask, make_mask(weight, 4, grouping))
    assert masked.dtype == dtype
    assert torch.equal(bits(masked), bits(torch.where(mask, weight, torch.zeros((), dtype=dtype))))


@pytest.mark.parametrize("layout", ["conv", "flat"])
@pytest.mark.parametrize("values", ["random", "tied", "nan"])
def test_memory_format_does_not_show(layout: str, values: str) -> None:
    shape, grouping = SHAPES[layout](4)
    weight = VALUES[values](shape)
    mask, masked = fast(weight.to(memory_format=torch.channels_last), 2, grouping)
    expected, expected_masked = fast(weight, 2, grouping)
    assert torch.equal(mask, expected)
    assert torch.equal(bits(masked.contiguous()), bits(expected_masked))
    assert torch.equal(make_mask(weight.to(memory_format=torch.channels_last), 2, grouping), expected)


@pytest.mark.parametrize("chunk", [1, 13, 100])
@pytest.mark.parametrize("layout", ["conv", "short"])
@pytest.mark.parametrize("values", ["random", "tied", "nan"])
def test_chunks_do_not_show(chunk: int, layout: str, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, grouping = SHAPES[layout](8)
    weight = VALUES[values](shape)
    whole = fast(weight, 3, grouping)[0]
    monkeypatch.setattr(select, "CHUNK", chunk)
    assert torch.equal(fast(weight, 3, grouping)[0], whole)


def test_literal() -> None:
    weight = torch.tensor([[0.5, -3.0, 0.0, 2.0, 1.0, -1.0, 1.0, 1.0]])
    mask = make_mask(weight, 2, Grouping((1, 8, 1), 4))
    assert mask.int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]  # the earlier of the ties


def test_nan_counts_as_largest() -> None:
    weight = torch.tensor([[9.0, math.inf, math.nan, -1.0]])
    assert make_mask(weight, 1, Grouping((1, 4, 1), 4)).int().tolist() == [[0, 0, 1, 0]]
    assert make_mask(weight, 2, Grouping((1, 4, 1), 4)).int().tolist() == [[0, 1, 1, 0]]


@value_ids
def test_more_kept_keeps_the_same(values: str) -> None:
    shape, grouping = SHAPES["short"](8)
    weight = VALUES[values](shape)
    masks = [fast(weight, n, grouping)[0] for n in range(1, 9)]
    assert all((small <= large).all() for small, large in itertools.pairwise(masks))
    assert masks[-1].all()


@shape_ids
@value_ids
def test_all_kept_changes_no_bit(layout: str, values: str) -> None:
    shape, grouping = SHAPES[layout](4)
    weight = VALUES[values](shape)
    mask, masked = fast(weight, 4, grouping)
    assert mask.all()
    assert torch.equal(bits(masked), bits(weight))


@shape_ids
def test_sign_and_scale_do_not_matter(layout: str) -> None:
    shape, grouping = SHAPES[layout](8)
    weight = torch.randn(shape)
    mask, masked = fast(weight, 3, grouping)
    assert torch.equal(fast(-weight, 3, grouping)[0], mask)
    assert torch.equal(fast(weight * 2**-7, 3, grouping)[0], mask)
    assert torch.equal(fast(masked, 3, grouping)[0], mask)  # masking twice is masking once


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_top_mask_takes_any_dimension(dim: int) -> None:
    score = torch.randn(6, 5, 7)
    mask = top_mask(score, 2, dim)
    assert (mask.sum(dim) == 2).all()
    lowest_kept = score.masked_fill(~mask, math.inf).amin(dim)
    assert (lowest_kept >= score.masked_fill(mask, -math.inf).amax(dim)).all()
    assert top_mask(score, 99, dim).all()


@shape_ids
def test_check_groups_counts_groups_and_takes_what_the_mask_gives(layout: str) -> None:
    shape, grouping = SHAPES[layout](4)
    _, masked = fast(torch.randn(shape), 2, grouping)
    assert check_groups("w", masked, 2, grouping) == grouping.groups
    assert check_groups("w", -0.0 * masked, 1, grouping) == grouping.groups  # negative zeros are zeros


def test_check_groups_names_the_group() -> None:
    weight = torch.zeros(3, 8, 2)
    weight[1, 4:7, 1] = 1.0
    with pytest.raises(VerificationError, match=r"fc\.weight: group 1 of row 3 holds 3 non-zeros, expected at most 2 of 4"):
        check_groups("fc.weight", weight, 2, Grouping((3, 8, 2), 4))
    assert check_groups("fc.weight", weight, 3, Grouping((3, 8, 2), 4)) == 12
