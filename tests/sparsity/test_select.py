"""Laws of the selection networks: they sort, by the zero-one principle, and drop only what no wanted rank needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmfx.sparsity import select


def zero_one(size: int) -> Tensor:
    """All 2**size columns of zeros and ones: a network that sorts these sorts everything (Knuth, 5.3.4)."""
    return ((torch.arange(1 << size) >> torch.arange(size).unsqueeze(1)) & 1).to(torch.int8)


def ranked(columns: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    rows = select.run(list(columns.clone().unbind(0)), ranks, torch.empty_like(columns[0]))
    return [rows[rank] for rank in ranks]


@pytest.mark.parametrize("size", [*range(1, 13), 16])
def test_all_ranks_sort(size: int) -> None:
    columns = zero_one(size)
    expected = columns.sort(dim=0, descending=True).values
    assert torch.equal(torch.stack(ranked(columns, tuple(range(size)))), expected)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 11, 12])
def test_two_neighbouring_ranks(size: int) -> None:
    columns = zero_one(size)
    expected = columns.sort(dim=0, descending=True).values
    for n in range(1, size):
        assert torch.equal(torch.stack(ranked(columns, (n - 1, n))), expected[n - 1 : n + 1]), n


@pytest.mark.parametrize(("size", "n"), [(16, 4), (16, 8), (32, 2), (32, 16), (64, 32), (48, 5)])
def test_two_ranks_of_large_groups(size: int, n: int) -> None:
    columns = torch.randint(0, 40, (size, 500))
    expected = columns.sort(dim=0, descending=True).values
    assert torch.equal(torch.stack(ranked(columns, (n - 1, n))), expected[n - 1 : n + 1])


def test_comparators_that_nothing_needs_are_left_out() -> None:
    assert len(select.network(16, tuple(range(16)))) == 63  # Batcher's count
    assert len(select.network(16, (3, 4))) == 49
    assert select.network(1, (0,)) == ()
    for size in (4, 7, 16):
        for a, b, need_max, need_min in select.network(size, (1, 2)):
            assert 0 <= a < b < size
            assert need_max or need_min


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 16, 32, 64])
def test_sort_groups_is_torch_sort(size: int, dtype: torch.dtype) -> None:
    block = torch.randn(3, 5, size, 2).to(dtype)
    block[0] = block[0].round()  # ties and zeros
    expected = block.abs().movedim(2, 0).flatten(1).sort(dim=0, descending=True).values
    found = select.sort_groups(block)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found, expected.to(found.dtype))  # half precision widens without rounding


def test_sort_groups_leaves_the_weight_alone_and_takes_views() -> None:
    weight = torch.randn(6, 3, 16).permute(0, 2, 1)  # not contiguous
    block, before = weight.unflatten(1, (4, 4)), weight.clone()
    expected = block.abs().movedim(2, 0).flatten(1).sort(dim=0, descending=True).values
    assert torch.equal(select.sort_groups(block), expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 15])
def test_chunks_do_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "CHUNK", chunk)
    block = torch.randn(2, 5, 8, 1)
    assert torch.equal(select.sort_groups(block), block.abs().movedim(2, 0).flatten(1).sort(dim=0, descending=True).values)
