"""Laws of masks that V adjacent output rows share: groups are N:M, rows of a vector agree, V = 1 is as if there were none."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from nmfx.errors import CheckpointError, PatternError, SchemeError, VerificationError
from nmfx.models.census import find_sites
from nmfx.models.site import Site
from nmfx.passes.thresholds import shared_squares, sorted_magnitudes
from nmfx.scheme import Scheme, fit
from nmfx.sparsity.layout import Grouping, group
from nmfx.sparsity.mask import check_groups, make_mask, update_mask
from nmfx.sparsity.packing import pack, packed_sizes, unpack
from nmfx.sparsity.pattern import VECTORS, Pattern

CASES = {  # shape, rows, M, flat, outputs
    "linear": ((11, 16), (11, 16, 1), 8, False, (11, 16)),
    "default": ((11, 16), (11, 16, 1), 8, False, None),
    "conv": ((13, 8, 3, 2), (13, 8, 6), 4, False, (13, 48)),
    "grouped": ((10, 8, 3, 1), (10, 8, 3), 4, False, (5, 24)),
    "stacked": ((3, 7, 8), (21, 8, 1), 4, False, (7, 8)),
    "transposed": ((16, 9, 2), (2, 8, 18), 4, False, (9, 2)),
    "matmul": ((8, 11), (1, 8, 11), 4, False, (11, 1)),
    "experts": ((3, 8, 5), (3, 8, 5), 4, False, (5, 1)),
    "heads": ((8, 3, 5), (1, 8, 15), 4, False, (5, 1)),
    "short": ((9, 10, 2), (9, 10, 2), 4, False, (9, 20)),
    "only-short": ((9, 3), (9, 3, 1), 4, False, (9, 3)),
    "flat": ((10, 3, 4, 2), (10, 3, 8), 8, True, (10, 24)),
    "flat-behind": ((3, 10, 8), (1, 3, 80), 8, True, (10, 8)),
}
cases = pytest.mark.parametrize("case", CASES)
vectors = pytest.mark.parametrize("vector", VECTORS)


def grouping_of(case: str, vector: int) -> tuple[tuple[int, ...], Grouping]:
    shape, rows, m, flat, outputs = CASES[case]
    return shape, Grouping(rows, m, flat, vector, outputs)


def members(grouping: Grouping) -> list[list[list[int]]]:
    """For every group of every vector: the places in memory of its positions, one list for each of the rows that share."""
    run, step = grouping.run
    place = torch.arange(grouping.numel).view(-1, run, step)  # runs, outputs, weights of one
    unit = Grouping(grouping.rows, grouping.m, grouping.flat)
    index = {}  # place -> (group, position)
    number = 0
    for block in unit.blocks(unit.as_lines(torch.arange(grouping.numel).view(grouping.rows))):
        for entries in block.movedim(2, -1).flatten(0, -2).tolist():
            index |= {entry: (number, position) for position, entry in enumerate(entries)}
            number += 1
    found: dict[int, dict[int, list[int]]] = {}  # by the group of the first row
    for r, o, w in product(range(len(place)), range(run), range(step)):
        at = int(place[r, o, w])
        first = int(place[r, o - o % grouping.vector, w])
        found.setdefault(index[first][0], {}).setdefault(o, []).append(at)
    return [[sorted(row, key=lambda at: index[at][1]) for row in rows.values()] for rows in found.values()]


def stated_mask(scores: Tensor, n: int, grouping: Grouping) -> Tensor:
    """The definition, one vector at a time: the positions of the largest sums, the earlier on ties."""
    mask, flat = torch.zeros(grouping.numel, dtype=torch.bool), scores.flatten().float()
    for rows in members(grouping):
        sums = [float(sum(flat[place] for place in places)) for places in zip(*rows, strict=True)]
        for position in sorted(range(len(sums)), key=lambda i: -sums[i])[:n]:
            for row in rows:
                mask[row[position]] = True
    return mask.view(scores.shape)


@cases
@vectors
def test_members_are_all_weights_once(case: str, vector: int) -> None:
    _, grouping = grouping_of(case, vector)
    found = members(grouping)
    assert sorted(at for rows in found for row in rows for at in row) == list(range(grouping.numel))
    assert max(map(len, found)) == min(vector, grouping.run[0])
    assert len(found) == grouping.leaders.groups
    assert grouping.leaders.vector == 1


@cases
@vectors
@pytest.mark.parametrize("values", ["random", "tied"])
def test_mask_is_its_definition(case: str, vector: int, values: str) -> None:
    shape, grouping = grouping_of(case, vector)
    weight = torch.randn(shape) if values == "random" else torch.randint(-2, 3, shape).float()
    for n in (1, 2, grouping.m - 1, grouping.m):
        mask = make_mask(weight, n, grouping)
        assert torch.equal(mask, stated_mask(weight.abs(), n, grouping))
        assert mask.is_contiguous()
        assert int(mask.sum()) == grouping.kept(n)
        plain = Grouping(grouping.rows, grouping.m, grouping.flat)
        for block in plain.blocks(plain.as_lines(mask.contiguous())):  # ordinary N:M to whoever looks
            assert bool((block.sum(2) == min(n, block.shape[2])).all())
        assert check_groups("w", weight * mask, n, grouping) == grouping.groups
        fast, masked = torch.ones_like(mask), torch.full_like(weight, math.nan)
        update_mask(weight, n, grouping, fast, masked)
        assert torch.equal(fast, mask)
        assert torch.equal(masked, torch.where(mask, weight, 0.0))


@cases
def test_one_row_alone_is_as_before(case: str) -> None:
    shape, grouping = grouping_of(case, 1)
    weight, plain = torch.randn(shape), Grouping(grouping.rows, grouping.m, grouping.flat)
    assert torch.equal(make_mask(weight, 2, grouping), make_mask(weight, 2, plain))
    assert grouping.leaders == grouping
    assert packed_sizes(2, grouping) == packed_sizes(2, plain)


@cases
@vectors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_packed_once(case: str, vector: int, dtype: torch.dtype) -> None:
    shape, grouping = grouping_of(case, vector)
    weight = torch.randn(shape).to(dtype)
    mask = make_mask(weight, 2, grouping)
    values, positions = pack(weight, mask, 2, grouping)
    assert (len(values), len(positions)) == packed_sizes(2, grouping)
    assert torch.equal(positions, pack(grouping.lead(mask), grouping.lead(mask), 2, grouping.leaders)[1])
    found, found_mask = unpack(values, positions, 2, grouping, shape)
    assert torch.equal(found, weight * mask)
    assert torch.equal(found_mask, mask)


@cases
@pytest.mark.parametrize("vector", VECTORS[1:])
def test_rows_that_do_not_share_are_found(case: str, vector: int) -> None:
    shape, grouping = grouping_of(case, vector)
    alone = Grouping(grouping.rows, grouping.m, grouping.flat)
    weight = torch.randn(shape)
    mask = make_mask(weight, 1, alone)
    assert check_groups("w", weight * mask, 1, alone)
    with pytest.raises(VerificationError, match=rf"^w: group \d+ of vector \d+, {vector} rows that share a mask"):
        check_groups("w", weight * mask, 1, grouping)
    with pytest.raises(CheckpointError, match="keep different positions"):
        pack(weight, mask, 1, grouping)
    with pytest.raises(VerificationError, match=r"group 0 of row 0 holds"):
        check_groups("w", torch.ones(shape), 1, grouping)


@cases
@vectors
def test_squares_of_each_rank_are_what_masks_drop(case: str, vector: int) -> None:
    shape, grouping = grouping_of(case, vector)
    weight = torch.randn(shape)
    squares = shared_squares(weight, grouping)
    assert squares.shape == (grouping.m,)
    for n in range(1, grouping.m + 1):
        dropped = weight[~make_mask(weight, n, grouping)].double().square().sum()
        assert float(squares[n:].sum()) == pytest.approx(float(dropped), rel=1e-5, abs=1e-9)
    ordered = sorted_magnitudes(weight, grouping)
    assert ordered.shape == (grouping.m, grouping.leaders.groups)
    assert float(ordered.sum()) == pytest.approx(float(weight.abs().sum()), rel=1e-5)


@pytest.mark.parametrize("score", ["input-norm", "gradient"])
@pytest.mark.parametrize("case", ["conv", "flat", "transposed"])
def test_every_score_is_summed(score: str, case: str) -> None:
    shape, grouping = grouping_of(case, 4)
    weight, full = torch.randn(shape), grouping.rows if score == "gradient" else (1, grouping.rows[1], 1)
    evidence = torch.rand(full)
    rows = weight.reshape(grouping.rows)
    scores = rows.abs() * evidence.sqrt() if score == "input-norm" else rows.square() * evidence
    mask = make_mask(weight, 2, grouping, score, evidence)
    assert torch.equal(mask.reshape(grouping.rows), stated_mask(scores, 2, grouping))
    fast, masked = torch.ones_like(mask), torch.zeros_like(weight)
    update_mask(weight, 2, grouping, fast, masked, score, evidence)
    assert torch.equal(fast, mask)


@pytest.mark.parametrize("vector", VECTORS)
def test_memory_format_does_not_show(vector: int) -> None:
    shape, grouping = grouping_of("conv", vector)
    weight = torch.randn(shape)
    moved = weight.to(memory_format=torch.channels_last)
    mask, masked = torch.ones_like(moved, dtype=torch.bool), torch.zeros_like(moved)
    update_mask(moved, 2, grouping, mask, masked)
    assert torch.equal(mask, make_mask(weight, 2, grouping))
    assert torch.equal(masked, weight * mask)


def test_flat_groups_of_shared_rows_end_with_an_output() -> None:
    rows, outputs = (16, 3, 49), (16, 147)
    assert group("w", rows, Pattern("4:16"), "flat").flat
    with pytest.raises(SchemeError, match=r"w: 4:16x4 in the flat layout needs the number of weights of an output \(147\)"):
        group("w", rows, Pattern("4:16x4"), "flat", outputs=outputs)
    site = Site("w", "conv2d", (16, 3, 7, 7), rows, 1, 1, 4, (("", "w"),))
    assert fit(site, Pattern("4:16x4"), "flat") == (Pattern.DENSE, "147 weights of an output do not divide by 16")
    assert fit(site, Pattern("4:16"), "flat") == (Pattern("4:16"), "")
    assert fit(site, Pattern("2:21x4"), "flat") == (Pattern("2:21x4"), "")


class Everything(nn.Module):
    """Weights whose outputs lie in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.up, self.up_grouped = nn.ConvTranspose2d(18, 8, 2, 2), nn.ConvTranspose2d(8, 10, 2, 2, groups=2)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.qkv = nn.Linear(10, 18)
        self.mix, self.experts = nn.Parameter(torch.randn(18, 12)), nn.Parameter(torch.randn(3, 12, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_grouped(self.up(self.grouped(self.stem(x)))).flatten(2).mT
        x = self.qkv(self.attention(x, x, x)[0]) @ self.mix
        return x.unsqueeze(1) @ self.experts


OUTPUTS = {
    "stem.weight": (12, 36),
    "grouped.weight": (6, 36),
    "up.weight": (8, 4),
    "up_grouped.weight": (5, 4),
    "attention.in_proj_weight": (10, 10),  # q, k and v
    "attention.out_proj.weight": (10, 10),
    "qkv.weight": (6, 10),
    "mix": (12, 1),
    "experts": (6, 1),
}


def test_outputs_of_sites() -> None:
    sites = find_sites(Everything(), torch.empty(1, 4, 2, 2))
    assert {site.name: site.outputs for site in sites} == OUTPUTS
    for site in sites:
        run, step = site.outputs
        assert site.weights % (run * step) == 0


def test_outputs_that_do_not_fit() -> None:
    rows = (12, 8, 9)
    assert all(Grouping(rows, 4, outputs=outputs).fits for outputs in [None, (12, 72), (6, 72), (3, 3), (9, 1)])
    wrong = [(5, 72), (12, 36), (0, 72), (12, 0), (4, 2), (24, 72)]
    assert not any(Grouping(rows, 4, outputs=outputs).fits for outputs in wrong)
    odd = Site("w", "conv_transpose2d", (12, 72, 9), rows, 1, 1, 4, (("", "w"),))  # a view of its parameter
    assert odd.outputs == (12, 72)


@vectors
def test_kept_weights_are_counted(vector: int) -> None:
    model = Everything()
    sites = find_sites(model, torch.empty(1, 4, 2, 2))
    scheme = Scheme.uniform(sites, Pattern(1, 4, vector), remainder="short")
    weights = dict(model.named_parameters())
    kept = {site.name: int(make_mask(weights[site.name], scheme[site.name].n, scheme.grouping(site)).sum()) for site in sites}
    assert {site.name: scheme.kept(site) for site in sites} == kept
    plain = Scheme.uniform(sites, Pattern(1, 4), remainder="short")
    assert scheme.totals(sites) == plain.totals(sites)


def test_pattern_of_a_vector() -> None:
    pattern = Pattern("4:16x4")
    assert pattern == Pattern(4, 16, 4) == Pattern(pattern) == Pattern(" 4 : 16 x 4 ")
    assert (str(pattern), repr(pattern)) == ("4:16x4", "Pattern('4:16x4')")
    assert pattern != Pattern("4:16") == Pattern("4:16x1")
    assert len({pattern, Pattern("4:16"), Pattern(4, 16, 4)}) == 2
    assert (pattern.n, pattern.m, pattern.vector, pattern.density, pattern.is_dense) == (4, 16, 4, 0.25, False)
    assert Pattern("4:4x4").is_dense
    patterns = [Pattern(text) for text in ("2:4x8", "1:4x2", "2:8", "1:4", "2:4")]
    assert [str(p) for p in sorted(patterns, key=lambda p: p.order)] == ["1:4", "1:4x2", "2:8", "2:4", "2:4x8"]


@pytest.mark.parametrize("text", ["2:4x3", "2:4x0", "2:4x16", "2:4x", "2:4x4x4", "2:4*4"])
def test_pattern_of_no_vector(text: str) -> None:
    with pytest.raises(PatternError, match=r"V, after the x, is one of 1, 2, 4, 8|is not an N:M pattern"):
        Pattern(text)
