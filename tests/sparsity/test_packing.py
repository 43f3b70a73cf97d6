"""Laws of packing: unpack(pack(w)) = w bit for bit, one code per choice, and nothing corrupt goes through."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nmfx.errors import CheckpointError
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.packing import pack, packed_sizes, unpack
from nmfx.sparsity.pattern import Pattern

PATTERNS = ["1:1", "1:2", "2:4", "1:4", "4:16", "8:16", "15:16", "3:7", "2:32", "16:32", "32:64"]
LAYOUTS = ["linear", "conv", "transposed", "short", "only-short", "flat"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

pattern_ids = pytest.mark.parametrize("pattern", [Pattern(text) for text in PATTERNS], ids=str)
layout_ids = pytest.mark.parametrize("layout", LAYOUTS)


def weight_case(layout: str, m: int) -> tuple[tuple[int, ...], Grouping]:
    """A small weight shape and its grouping."""
    short = 2 * m + max(1, m // 2) if m > 1 else 2
    return {
        "linear": ((5, 2 * m), Grouping((5, 2 * m, 1), m)),
        "conv": ((3, 2 * m, 3, 3), Grouping((3, 2 * m, 9), m)),
        "transposed": ((4 * m, 3, 5), Grouping((2, 2 * m, 15), m)),  # two conv groups of 2 m input channels
        "short": ((3, short, 3), Grouping((3, short, 3), m)),
        "only-short": ((3, max(1, m - 1), 3), Grouping((3, max(1, m - 1), 3), m)),
        "flat": ((m, 3, 3, 3), Grouping((m, 3, 9), m, flat=True)),
    }[layout]


def random_mask(shape: tuple[int, ...], n: int, grouping: Grouping) -> Tensor:
    """Any n of each group, equally likely."""
    lines = torch.empty(grouping.lines, dtype=torch.bool)
    for block in grouping.blocks(lines):
        block.copy_(torch.rand(block.shape).argsort(dim=2).argsort(dim=2) < n)
    return grouping.from_lines(lines, shape).contiguous()


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every bit at random: NaNs, infinities, subnormals and negative zeros among them."""
    return torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def groups_of(mask: Tensor, grouping: Grouping, full: bool) -> list[list[int]]:
    """Positions kept in each full (or short) group, in the order of (outer, groups, inner), by plain indexing."""
    lines = grouping.as_lines(mask.contiguous())
    outer, length, inner = lines.shape
    starts = [start for start in range(0, length, grouping.m) if (start + grouping.m <= length) == full]
    rows = itertools.product(range(outer), starts, range(inner))
    return [lines[o, s : s + grouping.m, k].nonzero().flatten().tolist() for o, s, k in rows]


def code_length(choices: int) -> int:
    """The smallest number of bits that tells `choices` apart."""
    return next(bits for bits in itertools.count() if 2**bits >= choices)


def reference_positions(mask: Tensor, n: int, grouping: Grouping) -> bytes:
    """The format as its definition states it, on one long Python integer per stream."""
    coded = b""
    for full in (True, False):
        size = grouping.m if full else grouping.lines[1] % grouping.m
        width, stream, at = code_length(math.comb(size, min(n, size))), 0, 0
        for kept in groups_of(mask, grouping, full):
            stream |= sum(math.comb(p, i) for i, p in enumerate(kept, start=1)) << at
            at += width
        coded += stream.to_bytes(math.ceil(at / 8), "little")
    return coded


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def packed() -> tuple[Tensor, Tensor, Grouping]:
    """A 3 x 12 linear weight, packed at 2:4: 9 ranks of 3 bits, so that 5 bits of the last byte are spare."""
    grouping = Grouping((3, 12, 1), 4)
    return *pack(torch.randn(3, 12), random_mask((3, 12), 2, grouping), 2, grouping), grouping


@layout_ids
@pattern_ids
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_unpack_inverts_pack_bit_for_bit(dtype: torch.dtype, pattern: Pattern, layout: str) -> None:
    shape, grouping = weight_case(layout, pattern.m)
    weight, mask = random_bits(shape, dtype), random_mask(shape, pattern.n, grouping)
    values, positions = pack(weight, mask, pattern.n, grouping)
    again, again_mask = unpack(values, positions, pattern.n, grouping, shape)
    assert (values.dtype, again.dtype, positions.dtype) == (dtype, dtype, torch.uint8)
    assert torch.equal(again_mask, mask)
    assert torch.equal(as_integers(again), as_integers(weight).where(mask, 0))
    assert torch.equal(as_integers(values), as_integers(weight)[mask])
    assert again.is_contiguous()
    assert again_mask.is_contiguous()


@layout_ids
@pattern_ids
def test_positions_follow_the_format(pattern: Pattern, layout: str) -> None:
    shape, grouping = weight_case(layout, pattern.m)
    mask = random_mask(shape, pattern.n, grouping)
    values, positions = pack(torch.randn(shape), mask, pattern.n, grouping)
    assert bytes(positions.tolist()) == reference_positions(mask, pattern.n, grouping)
    assert packed_sizes(pattern.n, grouping) == (len(values), len(positions))


def test_literal_code() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    _, positions = pack(torch.randn(4, 4), mask, 2, Grouping((4, 4, 1), 4))
    assert positions.tolist() == [0b00_001_101, 0b0000_010_0]  # ranks 5, 1, 0, 2


@pytest.mark.parametrize(("n", "m", "bits"), [(1, 1, 0), (1, 2, 1), (2, 4, 3), (4, 16, 11), (2, 32, 9), (32, 64, 61)])
def test_bits_per_group(n: int, m: int, bits: int) -> None:
    assert packed_sizes(n, Grouping((8, m, 1), m)) == (8 * n, bits)


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in range(1, 10) for n in range(1, m + 1)], ids=lambda value: str(value))
def test_every_choice_has_its_own_rank(n: int, m: int) -> None:
    choices = list(itertools.combinations(range(m), n))
    mask = torch.zeros(len(choices), m, dtype=torch.bool)
    mask[torch.arange(len(choices))[:, None], torch.tensor(choices)] = True
    grouping = Grouping((len(choices), m, 1), m)
    values, positions = pack(torch.randn(mask.shape), mask, n, grouping)
    stream, width = int.from_bytes(bytes(positions.tolist()), "little"), code_length(len(choices))
    ranks = [stream >> (i * width) & ((1 << width) - 1) for i in range(len(choices))]
    assert sorted(ranks) == list(range(len(choices)))
    assert torch.equal(unpack(values, positions, n, grouping, tuple(mask.shape))[1], mask)


@pattern_ids
def test_first_and_last_choice(pattern: Pattern) -> None:
    n, m = pattern.n, pattern.m
    mask = torch.zeros(2, m, dtype=torch.bool)
    mask[0, :n] = mask[1, m - n :] = True
    grouping = Grouping((2, m, 1), m)
    values, positions = pack(torch.randn(2, m), mask, n, grouping)
    choices = math.comb(m, n)
    assert int.from_bytes(bytes(positions.tolist()), "little") == (choices - 1) << code_length(choices)
    assert torch.equal(unpack(values, positions, n, grouping, (2, m))[1], mask)


@pytest.mark.parametrize("text", ["2:4", "3:7", "2:32"])
def test_more_groups_than_one_pass(text: str) -> None:
    pattern = Pattern(text)
    shape, grouping = (3, 6001 * pattern.m + 1), Grouping((3, 6001 * pattern.m + 1, 1), pattern.m)
    weight, mask = torch.randn(shape), random_mask(shape, pattern.n, grouping)
    again, again_mask = unpack(*pack(weight, mask, pattern.n, grouping), pattern.n, grouping, shape)
    assert torch.equal(again_mask, mask)
    assert torch.equal(again, weight.where(mask, 0))


def test_negative_zero_and_nan_payload_survive() -> None:
    words = [-0x80000000, 0x7F800001, 0x7FC12345, -1]  # -0.0, a signalling NaN, a quiet one, a negative one
    weight = torch.tensor([words], dtype=torch.int32).view(torch.float32).repeat(1, 2)
    mask, grouping = torch.tensor([[True] * 4 + [False] * 4]), Grouping((1, 8, 1), 8)
    again, _ = unpack(*pack(weight, mask, 4, grouping), 4, grouping, (1, 8))
    assert again.view(torch.int32).tolist() == [words + [0] * 4]


@pytest.mark.parametrize("flat", [False, True], ids=["strict", "flat"])
def test_memory_format_does_not_show(flat: bool) -> None:
    grouping = Grouping((4, 8, 9), 4, flat)
    weight, mask = torch.randn(4, 8, 3, 3, requires_grad=True), random_mask((4, 8, 3, 3), 2, grouping)
    last = pack(*(t.to(memory_format=torch.channels_last) for t in (weight, mask)), 2, grouping)
    for a, b in zip(pack(weight, mask, 2, grouping), last, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_no_weights() -> None:
    grouping = Grouping((0, 4, 1), 4)
    values, positions = pack(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.bool), 2, grouping)
    assert (len(values), len(positions)) == packed_sizes(2, grouping) == (0, 0)
    assert unpack(values, positions, 2, grouping, (0, 4))[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("at", "kept", "message"),
    [
        ((2, 5), True, "group 1 of row 2 keeps 3 of 4 weights, expected exactly 2"),
        ((1, 0), False, "group 0 of row 1 keeps 1 of 4 weights, expected exactly 2"),
        ((1, 10), True, "group 2 of row 1 keeps 3 of 3 weights, expected exactly 2"),
    ],
    ids=["too-many", "too-few", "short-group"],
)
def test_pack_refuses_a_mask_of_another_pattern(at: tuple[int, int], kept: bool, message: str) -> None:
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0]).bool().repeat(3, 1)
    mask[at] = kept
    with pytest.raises(CheckpointError, match=message):
        pack(torch.randn(3, 11), mask, 2, Grouping((3, 11, 1), 4))


@pytest.mark.parametrize(
    "mask", [torch.ones(3, 4).bool(), torch.ones(8, 4).bool(), torch.ones(4, 8)], ids=["numel", "shape", "dtype"]
)
def test_pack_refuses_a_mask_that_does_not_fit(mask: Tensor) -> None:
    with pytest.raises(CheckpointError, match="bool mask of one shape"):
        pack(torch.randn(4, 8), mask, 4, Grouping((4, 8, 1), 4))


def test_unpack_refuses_other_lengths(packed: tuple[Tensor, Tensor, Grouping]) -> None:
    values, positions, grouping = packed
    for parts in ((values[:-1], positions), (values, positions[:-1]), (values, positions.repeat(2))):
        with pytest.raises(CheckpointError, match="takes 18 values and 4 position bytes, got"):
            unpack(*parts, 2, grouping, (3, 12))
    with pytest.raises(CheckpointError, match=r"and torch\.int32 positions"):
        unpack(values, positions.int(), 2, grouping, (3, 12))
    with pytest.raises(CheckpointError, match=r"shape \(3, 11\) does not fit rows \(3, 12, 1\)"):
        unpack(values, positions, 2, grouping, (3, 11))


@pytest.mark.parametrize("rank", [6, 7])
def test_unpack_refuses_a_corrupt_rank(packed: tuple[Tensor, Tensor, Grouping], rank: int) -> None:
    values, positions, grouping = packed
    positions[1] = positions[1] & 0b1111_0001 | rank << 1  # bits 9 to 11: the rank of group 3
    with pytest.raises(CheckpointError, match=rf"rank 3 of 9 is {rank}, expected less than C\(4, 2\) = 6"):
        unpack(values, positions, 2, grouping, (3, 12))


def test_unpack_refuses_a_corrupt_end(packed: tuple[Tensor, Tensor, Grouping]) -> None:
    values, positions, grouping = packed
    positions[-1] |= 0b1000_0000
    with pytest.raises(CheckpointError, match="the last 5 bits"):
        unpack(values, positions, 2, grouping, (3, 12))


def test_corruption_never_passes_unseen() -> None:
    """Another position stream either raises or is the code of another mask that fits the pattern."""
    grouping, values = Grouping((2, 16, 1), 16), torch.ones(8)
    for _ in range(200):
        positions = torch.randint(0, 256, (3,), dtype=torch.uint8)
        try:
            weight, mask = unpack(values, positions, 4, grouping, (2, 16))
        except CheckpointError:
            continue
        assert torch.equal(pack(weight, mask, 4, grouping)[1], positions)
