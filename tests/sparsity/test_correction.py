"""New values for kept weights: the least loss under a mask, at most N in a group, an error below that of plain masking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmfx.sparsity.correction import CORRECTIONS, Moments, Quadratic, Scaled, Selection, fit_kept
from nmfx.sparsity.mask import top_mask


def problem(groups: int = 2, rows: int = 5, columns: int = 24, samples: int = 400) -> tuple[Tensor, Tensor, Tensor, Moments]:
    """Inputs whose columns are correlated, dense weights, outputs, and their moments."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(groups, samples, columns, generator=make) @ torch.randn(columns, columns, generator=make)
    weight = torch.randn(groups, rows, columns, generator=make)
    y = x @ weight.mT
    moments = Moments.at(x, y, centre=False)
    for part in range(0, samples, 100):
        moments.add(x[:, part : part + 100], y[:, part : part + 100])
    return x, weight, y, moments


def selection(n: int, m: int, columns: int) -> Selection:
    def choose(scores: Tensor) -> Tensor:
        return torch.cat([top_mask(scores[..., i : i + m], n, dim=-1) for i in range(0, columns, m)], -1)

    return Selection(n, [(i, min(i + m, columns)) for i in range(0, columns, m)], choose)


def test_moments_say_the_error_of_any_weights() -> None:
    x, weight, y, moments = problem()
    other = weight + torch.randn_like(weight)
    wanted = float((x @ other.mT - y).square().sum() / y.square().sum())
    assert moments.error(other) == pytest.approx(wanted, rel=1e-4)
    assert moments.error(weight) < 1e-6


@pytest.mark.parametrize("centre", [False, True])
def test_centred_moments_are_those_of_samples_less_their_means(centre: bool) -> None:
    x, weight, y, _ = problem()
    x, y = x + 100 * torch.rand(2, 1, 24), y - 7
    moments = Moments.at(x[:, :100], y[:, :100], centre=centre)
    for part in range(0, 400, 100):
        moments.add(x[:, part : part + 100], y[:, part : part + 100])
    free_x, free_y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    found = moments.centred()
    near = {"rtol": 1e-3, "atol": 1.0 if not centre else 1e-2}  # sums of squares of 100 hide what varies
    torch.testing.assert_close(found.inputs, free_x.mT @ free_x, **near)
    torch.testing.assert_close(found.targets, free_y.mT @ free_x, **near)
    torch.testing.assert_close(moments.means[0], x.mean(1, keepdim=True), rtol=1e-4, atol=1e-4)
    if centre:
        wanted = float((free_x @ weight.mT * 1.1 - free_y).square().sum() / free_y.square().sum())
        assert found.error(weight * 1.1) == pytest.approx(wanted, rel=1e-3)


def test_without_a_mask_the_dense_weights_come_back() -> None:
    _, weight, _, moments = problem()
    for damping in (1e-4, 0.01, 1.0):
        found = Quadratic.of(Scaled(moments), weight, damping).optimum.float()
        assert moments.error(found) < 1e-6
        torch.testing.assert_close(found, weight, rtol=1e-2, atol=1e-2)  # inputs that hardly vary say little of their weights


def test_kept_weights_are_those_of_least_squares() -> None:
    x, weight, y, moments = problem(groups=1)
    mask = torch.rand(weight.shape) < 0.5
    found = fit_kept(Quadratic.of(Scaled(moments), weight, 1e-9), mask, weight, steps=300)
    assert bool((found[~mask] == 0).all())
    for row in range(weight.shape[1]):
        kept = mask[0, row]
        wanted = torch.linalg.lstsq(x[0][:, kept].double(), y[0, :, row : row + 1].double()).solution.flatten()
        torch.testing.assert_close(found[0, row, kept].double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", CORRECTIONS)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 16), (4, 10)])  # a short last group in the last two
def test_every_group_keeps_at_most_n_and_the_error_falls(method: str, n: int, m: int) -> None:
    _, weight, _, moments = problem()
    chosen = selection(n, m, weight.shape[-1])
    found = CORRECTIONS[method](Quadratic.of(Scaled(moments), weight, 0.01), weight, chosen).float()
    for start, end in chosen.spans:
        assert int((found[..., start:end] != 0).sum(-1).max()) <= n
    plain = weight * chosen.choose(weight.abs())
    assert moments.error(found) < moments.error(plain)


@pytest.mark.parametrize("method", CORRECTIONS)
def test_weights_that_are_sparse_already_stay(method: str) -> None:
    x, weight, _, _ = problem()
    chosen = selection(2, 8, weight.shape[-1])
    weight = weight * chosen.choose(weight.abs())
    moments = Moments.at(x, x @ weight.mT, centre=False)
    moments.add(x, x @ weight.mT)
    found = CORRECTIONS[method](Quadratic.of(Scaled(moments), weight, 0.01), weight, chosen).float()
    torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", CORRECTIONS)
def test_inputs_that_never_vary_break_nothing(method: str) -> None:
    weight = torch.randn(1, 3, 8)
    x = torch.zeros(1, 50, 8)
    x[..., 0] = 1
    moments = Moments.at(x, x @ weight.mT, centre=False)
    moments.add(x, x @ weight.mT)
    found = CORRECTIONS[method](Quadratic.of(Scaled(moments), weight, 0.01), weight, selection(2, 4, 8))
    assert bool(found.isfinite().all())
