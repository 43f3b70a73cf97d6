"""Laws of the gradients: each training method's formula, bit for bit, and nothing else."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.ste import MaskedCompute, MaskedRead

METHODS = {"sr-ste": 2e-4, "sr-ste-5e-4": 5e-4, "sr-ste-1": 1.0, "ste": 0.0, "kept": None}
methods = pytest.mark.parametrize("decay", METHODS.values(), ids=METHODS)


def formula(weight: Tensor, mask: Tensor, grad: Tensor, decay: float | None) -> Tensor:
    if decay is None:
        return torch.where(mask, grad, torch.zeros_like(grad))
    return grad + decay * torch.where(mask, torch.zeros_like(weight), weight)


def read(weight: Tensor, decay: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The value read, the mask and the tensor behind the value."""
    mask = make_mask(weight, 2, Grouping((weight.shape[0], weight.shape[1], 1), 4))
    masked = torch.where(mask, weight.detach(), torch.zeros((), dtype=weight.dtype))
    return MaskedRead.apply(weight, mask, masked, decay, SimpleNamespace), mask, masked


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_the_formula(decay: float | None, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 16).to(dtype).requires_grad_()
    value, mask, masked = read(weight, decay)
    grad = torch.randn(6, 16).to(dtype)
    value.backward(grad)
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    assert torch.equal(weight.grad, formula(weight.detach(), mask, grad, decay))
    assert torch.equal(masked, weight.detach().masked_fill(~mask, 0))  # backward wrote nothing into it


@methods
def test_a_read_costs_nothing(decay: float | None) -> None:
    value, mask, masked = read(torch.randn(4, 8, requires_grad=True), decay)
    assert value.requires_grad
    assert value.data_ptr() == masked.data_ptr()
    assert torch.equal(value, masked)
    assert not mask.requires_grad
    assert not masked.requires_grad


@methods
def test_gradients_add_up_over_reads(decay: float | None) -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    grads = [torch.randn(4, 8), torch.randn(4, 8)]
    for grad in grads:
        value, mask, _ = read(weight, decay)
        value.backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, sum(formula(weight.detach(), mask, grad, decay) for grad in grads))


def test_kept_ignores_what_arrives_at_dropped_weights() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    value, mask, _ = read(weight, None)
    value.backward(torch.full((4, 8), math.nan).masked_fill(mask, 1.0))
    assert weight.grad is not None
    assert torch.equal(weight.grad, mask.float())


def test_sr_ste_leaves_kept_weights_alone() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    value, mask, _ = read(weight, 1.0)
    value.backward(torch.zeros(4, 8))
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.where(mask, 0.0, weight.detach()))  # dropped weights shrink towards zero


@methods
def test_through_a_loss(decay: float | None) -> None:
    weight, x = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8)
    value, mask, masked = read(weight, decay)
    torch.nn.functional.linear(x, value).square().sum().backward()
    plain = masked.clone().requires_grad_()
    torch.nn.functional.linear(x, plain).square().sum().backward()
    assert weight.grad is not None
    assert plain.grad is not None
    assert torch.equal(weight.grad, formula(weight.detach(), mask, plain.grad, decay))


@methods
def test_only_the_weight_has_a_gradient(decay: float | None) -> None:
    context, weight, cache = SimpleNamespace(), torch.randn(2, 4), SimpleNamespace(dirty=False)
    MaskedRead.forward(context, weight, weight > 0, weight * (weight > 0), decay, lambda: cache)
    grads = MaskedRead.backward(context, torch.ones(2, 4))
    assert [grad is None for grad in grads] == [False, True, True, True, True]
    assert cache.dirty


@methods
def test_compilers_get_the_same(decay: float | None) -> None:
    weight, grad = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    value, mask, _ = read(weight, decay)
    computed = MaskedCompute.apply(weight, mask, decay)
    assert torch.equal(computed, value)
    (expected,) = torch.autograd.grad(value, weight, grad)
    (found,) = torch.autograd.grad(computed, weight, grad)
    assert torch.equal(found, expected)
