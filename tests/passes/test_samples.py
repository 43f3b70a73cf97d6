"""A product as matrices: whatever reads the weight, its inputs times the weight are its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nmfx.models.storages import storage_of
from nmfx.passes.samples import Product, product_of

W = Callable[..., Tensor]


class Seen(TorchDispatchMode):
    """Keeps the products that read one weight, with what they gave."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.found = weight, list[tuple[Product, Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = product_of(func._schema.name, args, lambda t: storage_of(t) == storage_of(self.weight))
        out = func(*args, **(kwargs or {}))
        if product is not None:
            self.found.append((product, out))
        return out


def convolution(dims: int, groups: int, *, transposed: bool) -> tuple[tuple[int, ...], Callable[[Tensor], Tensor]]:
    kernel, sizes, dilation = [3, 2, 3][:dims], [9, 8, 7][:dims], 2 if dims < 3 else 1
    shape = (6, 8 // groups, *kernel) if transposed else (8, 6 // groups, *kernel)
    name = f"conv{'_transpose' if transposed else ''}{dims}d"
    extra = {"output_padding": 1} if transposed else {}
    x, bias, function = torch.randn(2, 6, *sizes), torch.randn(8), getattr(F, name)
    return shape, lambda w: function(x, w, bias, stride=2, padding=1, dilation=dilation, groups=groups, **extra)


CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    f"conv{'T' * transposed}{dims}d, {groups} groups": convolution(dims, groups, transposed=transposed)
    for dims in (1, 2, 3)
    for groups in (1, 2)
    for transposed in (False, True)
} | {
    "linear": ((5, 6), lambda w: F.linear(torch.randn(4, 6), w, torch.randn(5))),
    "linear over tokens": ((5, 6), lambda w: F.linear(torch.randn(3, 4, 6), w)),
    "linear over strided tokens": ((5, 6), lambda w: F.linear(torch.randn(3, 4, 6).transpose(0, 1), w, torch.randn(5))),
    "linear over one vector": ((5, 6), lambda w: F.linear(torch.randn(6), w, torch.randn(5))),
    "a part of a projection": ((15, 6), lambda w: F.linear(torch.randn(4, 6), w[5:10], torch.randn(5))),
    "the weight first": ((5, 6), lambda w: w @ torch.randn(6, 7)),
    "the weight first, over a batch": ((5, 6), lambda w: w @ torch.randn(3, 6, 7)),
    "matmul": ((5, 6), lambda w: torch.randn(3, 7, 5) @ w),
    "experts": ((3, 5, 6), lambda w: torch.bmm(torch.randn(3, 4, 5), w)),
    "experts with biases": ((3, 5, 6), lambda w: torch.baddbmm(torch.randn(3, 1, 6), torch.randn(3, 4, 5), w)),
    "experts first": ((3, 5, 6), lambda w: torch.bmm(w, torch.randn(3, 6, 4))),
    "unbatched": ((8, 6, 3, 3), lambda w: F.conv2d(torch.randn(6, 9, 9), w)),
}


@pytest.mark.parametrize("name", CASES)
def test_inputs_times_the_weight_are_the_outputs(name: str) -> None:
    torch.manual_seed(0)
    shape, run = CASES[name]
    weight = torch.randn(shape)
    with torch.no_grad(), Seen(weight) as seen:
        run(weight)
    assert seen.found
    for product, out in seen.found:
        matrix = product.matrix(product.weight)
        assert torch.equal(product.tensor(matrix), product.weight)
        for drawn in (None, torch.tensor([product.positions - 1, 0])):
            x, y = product.samples(out, drawn)
            assert y is not None
            assert x.shape[1] == y.shape[1]
            torch.testing.assert_close(x @ matrix.mT, y, rtol=1e-4, atol=1e-4)
