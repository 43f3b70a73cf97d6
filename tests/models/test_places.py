"""Groups run along what is contracted, in the parameter's own memory: held against brute force over chains of views."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from nmfx.models.census import find_sites
from nmfx.sparsity.layout import Grouping

Step = tuple[str, tuple[Any, ...]]


def apply(steps: list[Step], weight: Tensor) -> Tensor:
    """The chain of views, copies and joins on a tensor."""
    for name, args in steps:
        weight = OPERATIONS[name](weight, *args)
    return weight


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "permute": lambda w, seed: w.permute(*torch.randperm(w.dim(), generator=torch.Generator().manual_seed(seed)).tolist()),
    "flip": lambda w, dim: w.flip(dim % w.dim()),
    "roll": lambda w, dim: w.roll(1, dim % w.dim()),
    "merge": lambda w, dim: w.flatten(dim % (w.dim() - 1), dim % (w.dim() - 1) + 1) if w.dim() > 2 else w,
    "split": lambda w, dim: w.unflatten(dim % w.dim(), (2, -1)) if w.shape[dim % w.dim()] % 2 == 0 and w.dim() < 4 else w,
    "slice": lambda w, dim: w.narrow(dim % w.dim(), 0, max(1, w.shape[dim % w.dim()] - 1)),
    "halves": lambda w, dim: torch.cat(w.chunk(2, dim % w.dim())[::-1], dim % w.dim()),
    "twice": lambda w, dim: torch.stack([w, w.flip(-1)], dim % w.dim()) if w.dim() < 4 else w,
    "expand": lambda w: w.unsqueeze(0).expand(2, *w.shape) if w.dim() < 4 else w,
    "copy": lambda w: w.contiguous(),
    "scale": lambda w: w * 2.0 / 2.0,
    "half": lambda w: w.double().float(),
    "pad": lambda w: F.pad(w, (1, 0)),
    "first": lambda w: w.index_select(0, torch.arange(len(w) - 1, -1, -1, device=w.device)),
    "put": lambda w: torch.zeros_like(w).copy_(w),
}
step = st.sampled_from(sorted(OPERATIONS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.tuples(st.integers(0, 5)) if OPERATIONS[name].__code__.co_argcount > 1 else st.just(()),
    )
)
shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=2, max_size=4)


def product(operand: Tensor, x: Callable[..., Tensor], way: int) -> tuple[Tensor, Tensor]:
    """The operand multiplied by activations, and the operand with the contracted dimension moved last."""
    if operand.dim() == 4:
        return F.conv2d(x(1, operand.shape[1], *operand.shape[2:]), operand), operand.movedim(1, -1)
    if operand.dim() == 3:
        return torch.bmm(x(operand.shape[0], 2, operand.shape[1]), operand), operand.movedim(1, -1)
    if way:
        return x(2, operand.shape[0]) @ operand, operand.movedim(0, -1)
    return F.linear(x(2, operand.shape[1]), operand), operand


class Chain(nn.Module):
    """A weight that goes through the chain into a product."""

    def __init__(self, shape: list[int], steps: list[Step], way: int) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.kernel = nn.Parameter(torch.randn(shape))
        self.steps, self.way = steps, way

    def forward(self, x: Tensor) -> Tensor:
        kernel: Any = self.inner.kernel
        make = lambda *shape: x.new_ones(shape) * x.sum()  # noqa: E731
        return product(apply(self.steps, kernel), make, self.way)[0]


def rows_of(rows: tuple[int, int, int]) -> Tensor:
    """Entries of each row of a weight, (rows, length), from 1."""
    numel = math.prod(rows)
    return Grouping(rows, 1).as_lines(torch.arange(1, numel + 1)).movedim(1, 2).reshape(-1, rows[1])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shapes, st.lists(step, max_size=5), st.integers(0, 1))
def test_rows_are_runs_of_what_is_contracted(shape: list[int], steps: list[Step], way: int) -> None:
    model = Chain(shape, steps, way)
    numel = math.prod(shape)
    entries = torch.arange(1, numel + 1, dtype=torch.float32).view(shape)
    fibres = product(apply(steps, entries), torch.ones, way)[1]
    fibres = fibres.reshape(-1, fibres.shape[-1]).round().long()
    read = set(fibres.flatten().tolist()) - {0}
    sites = find_sites(model, torch.ones(1))
    if not len(sites):
        reason = sites.skipped[0].reason
        assert ("only a part" in reason) == (len(read) < numel), reason
        assert "only a part" in reason or "even steps" in reason
        return
    assert len(read) == numel
    rows = rows_of(sites["inner.kernel"].rows)
    at: dict[int, list[tuple[int, int]]] = {}
    for line, fibre in enumerate(fibres.tolist()):
        kept = [entry for entry in fibre if entry]
        for position, entry in enumerate(kept):
            at.setdefault(entry, []).append((line, position))
    for row in rows.tolist():
        for start in at[row[0]]:  # wherever the row begins, the rest of it lies in the same fibre, at even distances
            runs = [{p for line, p in at[entry] if line == start[0]} for entry in row]
            steps_found = {p - start[1] for p in runs[1]} if len(row) > 1 else {1}
            assert any(all(start[1] + i * d in run for i, run in enumerate(runs)) for d in steps_found), (row, steps)


def test_the_oracle_sees_a_wrong_row() -> None:
    assert rows_of((1, 2, 2)).tolist() == [[1, 3], [2, 4]]
    assert rows_of((2, 2, 1)).tolist() == [[1, 2], [3, 4]]


class Fn(nn.Module):
    """A function of parameters (and buffers) and an input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], *shapes: tuple[int, ...], buffer: Any = None) -> None:
        super().__init__()
        self.inner, self.function = nn.Module(), function
        for name, shape in zip("abc", shapes, strict=False):
            self.inner.register_parameter(name, nn.Parameter(torch.randn(shape)))
        if buffer is not None:
            self.inner.register_buffer("buffer", buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner, x)


def modulated(m: Any, x: Tensor) -> Tensor:
    style = x.mean((2, 3))
    weight = m.a * style[:, None, :, None, None]
    weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    return F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.reshape(-1, *m.a.shape[1:]), groups=len(x))


def rotated(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, torch.stack([m.a.rot90(k, (2, 3)) for k in range(4)], 1).flatten(0, 1))


def pieces(m: Any, x: Tensor) -> Tensor:
    kernel = torch.zeros(16, 24, device=x.device)
    kernel[:8, :12], kernel[8:, 12:] = m.a, m.b
    return F.conv2d(x, kernel[:, :, None, None])


def split_features(m: Any, x: Tensor) -> Tensor:
    parts = zip(torch.cat([x, x], 1).split([4, 12], 1), m.a.split([4, 12], 1), strict=True)
    return sum((F.linear(x, weight) for x, weight in parts), torch.zeros(()))


def grouped(m: Any, x: Tensor) -> Tensor:
    return torch._grouped_mm(x.bfloat16(), m.a.bfloat16(), offs=torch.tensor([1, 2], dtype=torch.int32, device=x.device))


ROWS: dict[str, tuple[Fn, tuple[int, ...], dict[str, tuple[int, int, int]]]] = {
    "complex": (
        Fn(lambda m, x: F.linear(torch.complex(x, x), torch.view_as_complex(m.a)).abs(), (16, 8, 2)),
        (2, 8),
        {"a": (16, 8, 2)},
    ),
    "chunks": (Fn(lambda m, x: sum(F.linear(x, w) for w in m.a.chunk(3)), (24, 8)), (2, 8), {"a": (24, 8, 1)}),  # type: ignore[arg-type,return-value]
    "unbound": (Fn(lambda m, x: sum(F.linear(x, w) for w in m.a.unbind(1)), (16, 3, 8)), (2, 8), {"a": (48, 8, 1)}),  # type: ignore[arg-type,return-value]
    "split features": (Fn(split_features, (24, 16)), (2, 8), {"a": (96, 4, 1)}),
    "stacked": (
        Fn(lambda m, x: torch.einsum("bi,eoi->beo", x, torch.stack([m.a, m.b])), (16, 8), (16, 8)),
        (2, 8),
        {"a": (16, 8, 1), "b": (16, 8, 1)},
    ),
    "expanded": (Fn(lambda m, x: torch.bmm(x.expand(4, 2, 8), m.a.expand(4, 8, 5)), (8, 5)), (2, 8), {"a": (1, 8, 5)}),
    "modulated": (Fn(modulated, (6, 24, 3, 3)), (2, 24, 5, 5), {"a": (6, 24, 9)}),
    "rotated": (Fn(rotated, (6, 24, 3, 3)), (2, 24, 5, 5), {"a": (6, 24, 9)}),
    "pieces": (Fn(pieces, (8, 12), (8, 12)), (2, 24, 5, 5), {"a": (8, 12, 1), "b": (8, 12, 1)}),
    "unfolded": (Fn(lambda m, x: m.a.flatten(1) @ F.unfold(x, 3), (6, 24, 3, 3)), (2, 24, 5, 5), {"a": (6, 216, 1)}),
    "grouped_mm": (Fn(grouped, (2, 8, 16)), (2, 8), {"a": (2, 8, 16)}),
    "chosen experts": (
        Fn(lambda m, x: torch.bmm(x[:, None], m.a[(x[:, 0] > 0).long()]), (4, 8, 16)),
        (2, 8),
        {"a": (4, 8, 16)},
    ),
    "pruned": (Fn(lambda m, x: F.linear(x, m.buffer * m.a), (16, 8), buffer=torch.ones(16, 8)), (2, 8), {"a": (16, 8, 1)}),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_by_hand(name: str) -> None:
    model, shape, rows = ROWS[name]
    sites = find_sites(model, torch.randn(shape))
    assert {site.name.removeprefix("inner."): site.rows for site in sites} == rows


LOST = "zeros do not reach the operation: "
REASONS: dict[str, tuple[Fn, tuple[int, ...], dict[str, str]]] = {
    "kernel corner": (
        Fn(lambda m, x: F.conv2d(x, m.a[:24, :24]), (36, 36, 3, 3)),
        (2, 24, 5, 5),
        {"a": "only a part of it, [:24, :24], is read by a product"},
    ),
    "first rows": (
        Fn(lambda m, x: F.linear(x, m.a[:48]), (64, 8)),
        (2, 8),
        {"a": "only a part of it, [:48], is read by a product"},
    ),
    "every other": (
        Fn(lambda m, x: F.linear(x, m.a[:, ::2]), (16, 16)),
        (2, 8),
        {"a": "only a part of it, 128 of 256 weights, is read by a product"},
    ),
    "low rank": (
        Fn(lambda m, x: F.linear(x, m.a + 0.5 * (m.b @ m.c)), (16, 8), (16, 2), (2, 8)),
        (2, 8),
        dict.fromkeys("abc", f"{LOST}add makes another weight of it first"),
    ),
    "sigmoid": (
        Fn(lambda m, x: F.linear(x, m.a.sigmoid()), (16, 8)),
        (2, 8),
        {"a": f"{LOST}sigmoid makes another weight of it first"},
    ),
    "basis": (
        Fn(lambda m, x: F.conv2d(x, (m.a @ m.buffer).view(8, 24, 3, 3)), (192, 4), buffer=torch.randn(4, 9)),
        (2, 24, 5, 5),
        {"a": f"{LOST}a product makes another weight of it first"},
    ),
    "both ways": (
        Fn(lambda m, x: F.linear(F.linear(x, m.a), m.a.t()), (16, 8)),
        (2, 8),
        {"a": "products sum over different dimensions of it"},
    ),
    "shuffled": (
        Fn(lambda m, x: x @ m.a[torch.tensor([3, 0, 5, 1, 7, 6, 2, 4])], (8, 16)),
        (2, 8),
        {"a": "what a product sums over does not lie in even steps in it"},
    ),
    "two factors": (
        Fn(lambda m, x: F.linear(x, m.a @ m.b), (16, 8), (8, 8)),
        (2, 8),
        dict.fromkeys("ab", f"{LOST}a product makes another weight of it first"),
    ),
    "singular values": (
        Fn(lambda m, x: x @ (m.a @ torch.diag(m.b) @ m.c), (8, 4), (4,), (4, 16)),
        (2, 8),
        dict.fromkeys("ac", f"{LOST}a product makes another weight of it first"),
    ),
    "singular values, and what follows": (
        Fn(lambda m, x: F.linear(x, ((m.a * m.b) @ m.c).tanh().t().contiguous() + 1), (8, 4), (4,), (4, 16)),
        (2, 8),
        dict.fromkeys("ac", f"{LOST}add makes another weight of it first"),
    ),
    "Hadamard": (
        Fn(lambda m, x: F.linear(x, m.a @ m.buffer), (16, 8), buffer=torch.ones(8, 8)),
        (2, 8),
        {"a": f"{LOST}a product makes another weight of it first"},
    ),
    "einsum": (
        Fn(lambda m, x: torch.einsum("ni,oi->no", x, torch.einsum("or,ri->oi", m.a, m.b)), (16, 4), (4, 8)),
        (2, 8),
        dict.fromkeys("ab", f"{LOST}a product makes another weight of it first"),
    ),
    "central differences": (
        Fn(lambda m, x: F.conv2d(x, m.a, padding=1) - F.conv2d(x, m.a.sum((2, 3), keepdim=True)), (8, 8, 3, 3)),
        (2, 8, 5, 5),
        {"a": f"{LOST}sum makes another weight of it first"},
    ),
    "its own square": (
        Fn(lambda m, x: F.linear(F.linear(x, m.a), m.a @ m.a.t()), (16, 8)),
        (2, 8),
        {"a": f"{LOST}a product makes another weight of it first"},
    ),
    "softmax too": (
        Fn(lambda m, x: F.linear(F.linear(x, m.a), m.a.softmax(1)), (8, 8)),
        (2, 8),
        {"a": f"{LOST}_softmax makes another weight of it first"},
    ),
    "sign of the larger": (
        Fn(lambda m, x: F.linear(x, (m.a > 0.1).float()) + F.linear(x, m.a), (8, 8)),
        (2, 8),
        {"a": f"{LOST}gt makes another weight of it first"},
    ),
    "kernel made by a layer": (
        Fn(lambda m, x: F.conv2d(x, F.linear(m.a, m.b).view(4, 8, 3, 3)), (4, 5), (72, 5)),
        (2, 8, 5, 5),
        dict.fromkeys("ab", f"{LOST}a product makes another weight of it first"),
    ),
    "in training": (
        Fn(lambda m, x: F.linear(x, m.a.sigmoid() if m.training else m.a), (8, 8)),
        (2, 8),
        {"a": f"{LOST}sigmoid makes another weight of it first"},
    ),
    "buffer": (
        Fn(lambda m, x: F.linear(x, m.buffer), buffer=torch.randn(4, 8)),
        (2, 8),
        {"buffer": "a buffer, not a parameter"},
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_are_true(name: str) -> None:
    model, shape, reasons = REASONS[name]
    sites = find_sites(model, torch.randn(shape))
    assert {skip.name.removeprefix("inner."): skip.reason for skip in sites.skipped} == reasons
    assert not len(sites)


KEPT: dict[str, tuple[Fn, tuple[int, ...], set[str]]] = {
    "a penalty that is returned": (Fn(lambda m, x: (F.linear(x, m.a), m.a.t() @ m.a), (16, 8)), (2, 8), {"a"}),
    "a norm beside": (Fn(lambda m, x: (F.linear(x, m.a), m.a.square().sum()), (16, 8)), (2, 8), {"a"}),
    "divided by its norm": (Fn(lambda m, x: F.linear(x, m.a / m.a.norm(dim=1, keepdim=True)), (16, 8)), (2, 8), {"a"}),
    "times its softmax": (Fn(lambda m, x: F.linear(x, m.a * m.a.softmax(1)), (16, 8)), (2, 8), {"a"}),
    "times two factors": (Fn(lambda m, x: F.linear(x, m.a * (m.b @ m.c)), (16, 8), (16, 2), (2, 8)), (2, 8), {"a"}),
    "outputs scaled by its mean": (Fn(lambda m, x: F.linear(x, m.a) * m.a.abs().mean(1), (16, 8)), (2, 8), {"a"}),
    "a query by a layer": (
        Fn(lambda m, x: (F.layer_norm(F.linear(m.a, m.b), (8,)) @ F.linear(x, m.c).t()).softmax(1), (4, 8), (8, 8), (8, 8)),
        (2, 8),
        {"b", "c"},
    ),
    "a bias by two layers": (
        Fn(
            lambda m, x: F.linear(x, m.a) + F.linear(F.linear(m.buffer, m.b).relu(), m.c),
            (4, 8), (6, 3), (4, 6),
            buffer=torch.ones(1, 3),
        ),
        (2, 8),
        {"a", "b", "c"},
    ),
    "attention of learned queries": (
        Fn(
            lambda m, x: F.multi_head_attention_forward(
                m.a, x, x, 8, 2, m.b, None, None, None, False, 0.0, m.c, None, need_weights=False
            )[0],
            (3, 8), (24, 8), (8, 8),
        ),
        (2, 8),
        {"b", "c"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_loses_no_zeros_stays_a_site(name: str) -> None:
    model, shape, names = KEPT[name]
    found = {site.name.removeprefix("inner.") for site in find_sites(model, torch.randn(shape))}
    assert found == names


@pytest.mark.parametrize("kind", ["orthogonal", "weight_norm", "spectral_norm"])
def test_parametrisations(kind: str) -> None:
    layer = getattr(nn.utils.parametrizations, kind)(nn.Linear(8, 8))
    sites = find_sites(nn.Sequential(layer), torch.randn(2, 8))
    assert len(sites) == (kind != "orthogonal")
    assert kind != "orthogonal" or all(LOST in skip.reason for skip in sites.skipped)
    assert all((site.rows, site.macs) == ((8, 8, 1), 64) for site in sites)


def test_a_frozen_constant_stays_and_frozen_weights_do_not() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), torch.randn(1, 8, 9, 9)
    model.requires_grad_(False)
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(0, 4, (8, 8, 3, 3)))
    sites = find_sites(model, x)
    assert [site.name for site in sites] == ["1.weight"]
    assert [(skip.name, skip.reason) for skip in sites.skipped] == [("0.weight", "a frozen constant")]
    assert len(find_sites(model.requires_grad_(True), x)) == 2


def test_adapters_are_not_masked() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.lora_A, self.lora_B = nn.Linear(16, 16), nn.Linear(16, 4, False), nn.Linear(4, 16, False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.lora_B(self.lora_A(x))

    sites = find_sites(Adapted(), torch.randn(2, 16))
    assert [site.name for site in sites] == ["base.weight"]
    assert all("an adapter" in skip.reason for skip in sites.skipped)
