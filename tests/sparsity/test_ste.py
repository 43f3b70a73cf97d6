"""Laws of the gradients: each training method's formula, bit for bit, and nothing else."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.ste import MaskedCompute, MaskedRead, pulled

METHODS = {"ste": False, "kept": True}
methods = pytest.mark.parametrize("kept_only", METHODS.values(), ids=METHODS)


def formula(mask: Tensor, grad: Tensor, kept_only: bool) -> Tensor:
    return torch.where(mask, grad, torch.zeros_like(grad)) if kept_only else grad


def read(weight: Tensor, kept_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The value read, the mask and the tensor behind the value."""
    mask = make_mask(weight, 2, Grouping((weight.shape[0], weight.shape[1], 1), 4))
    masked = torch.where(mask, weight.detach(), torch.zeros((), dtype=weight.dtype))
    return MaskedRead.apply(weight, mask, masked, kept_only, SimpleNamespace), mask, masked


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_the_formula(kept_only: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 16).to(dtype).requires_grad_()
    value, mask, masked = read(weight, kept_only)
    grad = torch.randn(6, 16).to(dtype)
    value.backward(grad)
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    assert torch.equal(weight.grad, formula(mask, grad, kept_only))
    assert torch.equal(masked, weight.detach().masked_fill(~mask, 0))  # backward wrote nothing into it


@methods
def test_a_read_costs_nothing(kept_only: bool) -> None:
    value, mask, masked = read(torch.randn(4, 8, requires_grad=True), kept_only)
    assert value.requires_grad
    assert value.data_ptr() == masked.data_ptr()
    assert torch.equal(value, masked)
    assert not mask.requires_grad
    assert not masked.requires_grad


@methods
def test_gradients_add_up_over_reads(kept_only: bool) -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    grads = [torch.randn(4, 8), torch.randn(4, 8)]
    for grad in grads:
        value, mask, _ = read(weight, kept_only)
        value.backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, sum(formula(mask, grad, kept_only) for grad in grads))


def test_kept_ignores_what_arrives_at_dropped_weights() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    value, mask, _ = read(weight, True)
    value.backward(torch.full((4, 8), math.nan).masked_fill(mask, 1.0))
    assert weight.grad is not None
    assert torch.equal(weight.grad, mask.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", [2e-4, 5e-4, 1.0])
def test_the_pull_is_the_formula(decay: float, dtype: torch.dtype) -> None:
    weight, grad = torch.randn(6, 16).to(dtype), torch.randn(6, 16).to(dtype)
    mask = make_mask(weight, 2, Grouping((6, 16, 1), 4))
    found = pulled(grad, weight, mask, decay)
    assert found.dtype == dtype
    assert torch.equal(found, grad + decay * torch.where(mask, torch.zeros_like(weight), weight))
    assert torch.equal(pulled(torch.zeros_like(grad), weight, mask, 1.0), weight.masked_fill(mask, 0))


@methods
def test_through_a_loss(kept_only: bool) -> None:
    weight, x = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8)
    value, mask, masked = read(weight, kept_only)
    torch.nn.functional.linear(x, value).square().sum().backward()
    plain = masked.clone().requires_grad_()
    torch.nn.functional.linear(x, plain).square().sum().backward()
    assert weight.grad is not None
    assert plain.grad is not None
    assert torch.equal(weight.grad, formula(mask, plain.grad, kept_only))


@methods
def test_only_the_weight_has_a_gradient(kept_only: bool) -> None:
    context, weight, cache = SimpleNamespace(), torch.randn(2, 4), SimpleNamespace(dirty=False)
    MaskedRead.forward(context, weight, weight > 0, weight * (weight > 0), kept_only, lambda: cache)
    grads = MaskedRead.backward(context, torch.ones(2, 4))
    assert [grad is None for grad in grads] == [False, True, True, True, True]
    assert cache.dirty


@methods
def test_compilers_get_the_same(kept_only: bool) -> None:
    weight, grad = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    value, mask, _ = read(weight, kept_only)
    computed = MaskedCompute.apply(weight, mask, kept_only)
    assert torch.equal(computed, value)
    (expected,) = torch.autograd.grad(value, weight, grad)
    (found,) = torch.autograd.grad(computed, weight, grad)
    assert torch.equal(found, expected)
