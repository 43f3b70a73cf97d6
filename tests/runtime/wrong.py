"""Calls of the kernel with tensors and numbers changed at random: they must raise, or give what plain PyTorch gives.

tests/runtime/test_refusals.py runs them in a process of their own, since a fault would end it, and with the address sanitiser.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from nmfx.runtime.chain import Chain, link
from nmfx.runtime.kernel import library
from nmfx.runtime.kernel.library import NativeProgram, load_kernel
from nmfx.runtime.layers import Depthwise, sparse_layer
from nmfx.runtime.layout.packed import pack
from nmfx.runtime.layout.tiles import Tile
from nmfx.runtime.lowering.exporting import export
from nmfx.runtime.lowering.fusion import lower
from nmfx.runtime.operators import OPERATORS
from nmfx.runtime.program import Program

INF = float("inf")
NUMBERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 5, 8, 9, 16, 17, 64, 257, 1000, 2**31 - 1, 2**31, 2**40, 2**62)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int16, torch.int32, torch.int64, torch.bool)
WAYS = ["input", "swapped", "cut", "longer", "gone", "images"]  # to change a chain, besides a number or a constant
COUNTS: Counter[str] = Counter()
quietly = settings(
    max_examples=int(os.environ.get("NMFX_EXAMPLES", "400")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def draw_sparse(seed: int, *shape: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make) * (torch.rand(shape, generator=make) < 0.4)


def right_calls() -> dict[str, tuple[str, list[Any]]]:
    """One call or more of every operator, all of which are right."""
    conv, point, line = draw_sparse(0, 6, 4, 3, 2), draw_sparse(1, 8, 6, 1, 1), draw_sparse(2, 9, 21)
    calls: dict[str, tuple[str, list[Any]]] = {}
    for name, weight, groups, chunk, padding in (
        ("conv", conv, 2, 7, [1, 0]),
        ("conv, four sides", conv, 2, 64, [0, 1, 2, 0]),
        ("point", point, 1, 4, [0, 0]),
    ):
        p = pack(weight, groups, chunk=chunk)
        x = draw_sparse(3, 2, weight.shape[1] * groups, 7, 9)
        geometry = [list(weight.shape[2:]), [1, 2], padding, [1, 1], groups, 0.0, 6.0, chunk, 3]
        weights = [p.values, p.columns, p.pointers, torch.ones(p.shape[0])]
        calls[name] = ("sparse_conv2d", [x, *weights, None, p.shape[0], p.width, *geometry])
    residual = draw_sparse(4, 2, 8, 7, 5)
    calls["residual"] = ("sparse_conv2d", [*calls["point"][1][:5], residual, *calls["point"][1][6:]])
    p = pack(line, chunk=8)
    weights = [p.values, p.columns, p.pointers, None, 9, 21]
    calls["linear"] = ("sparse_linear", [draw_sparse(5, 3, 4, 21), *weights, -INF, INF, 8, 2])
    depthwise = [draw_sparse(6, 2, 5, 8, 9), draw_sparse(7, 5, 1, 3, 3), torch.ones(5), None, [2, 1], [1, 1], [1, 1], -1.0, 6.0]
    calls["depthwise"] = ("depthwise_conv2d", depthwise)
    calls["pool"] = ("max_pool2d", [draw_sparse(8, 2, 3, 9, 20), [3, 3], [2, 2], [1, 1]])
    calls["average"] = ("average", [draw_sparse(9, 2, 3, 5, 20)])
    return calls


class Net(nn.Module):
    """All that a program can say: lanes with halos in memory and on the way, strides, poolings, residuals, tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.wide, self.back = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, 1, 1, groups=2)
        self.down, self.head = nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        y = self.back(self.wide(self.deep(x)).relu())
        return self.head(self.down((y + x).relu()).relu().mean((2, 3)))


def right_programs() -> list[tuple[list[Tensor], list[Tensor], Tensor, int]]:
    """The network on several threads and in passes, by lanes and without."""
    found, before = [], torch.get_num_threads()
    for threads, images, lanes in ((1, 0, True), (2, 0, True), (2, 1, True), (1, 0, False)):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        x = torch.randn(2, 3, 24, 32)
        graph, _ = export(Net().eval(), x)
        for node, fused in lower(graph):
            by_channel = fused.depthwise
            layer = Depthwise(fused, lanes=lanes) if by_channel else sparse_layer(fused, Tile(16, 4, lanes=lanes))
            graph.add_submodule(str(node.target), layer)
        link(graph, images)
        chain = next(module for module in graph.modules() if isinstance(module, Chain))
        written = Program(chain.graph, threads=1 if images else threads)
        found.append(([x], written.constants, written.numbers(), images))
    torch.set_num_threads(before)
    return found


def run_program(inputs: list[Tensor], constants: list[Tensor], numbers: Tensor, images: int) -> list[Tensor]:
    return NativeProgram(numbers, constants, 1)(inputs, images)


def changed_tensor(pick: st.DataObject, t: Tensor) -> Tensor:
    """A tensor that is another: in its sizes, its type, its memory, or in what it says."""
    if _last(t) > t.untyped_storage().nbytes():
        return t  # its memory is gone already: PyTorch itself, asked for another of it, would read it
    kinds = ["type", "slice", "expand", "more", "fewer", "empty", "apart", "turned", "gone"]
    way = pick.draw(st.sampled_from(kinds + ["values"] * 4 if t.dtype in (torch.int16, torch.int32) else kinds))
    dim = pick.draw(st.integers(0, max(0, t.dim() - 1)))
    if way == "type":
        return t.to(pick.draw(st.sampled_from(DTYPES)))
    if way == "values":
        t = t.clone()
        places = pick.draw(st.lists(st.integers(0, max(0, t.numel() - 1)), min_size=1, max_size=3))
        least, most = torch.iinfo(t.dtype).min, torch.iinfo(t.dtype).max
        for place in places if t.numel() else ():
            t.view(-1)[place] = pick.draw(st.one_of(st.integers(least, most), st.integers(-2, 40)))
        return t
    if way == "gone":  # the tensor says that it is as large as before
        t = t.clone()
        t.untyped_storage().resize_(pick.draw(st.integers(0, t.untyped_storage().nbytes())))
        return t
    if not t.dim() or way == "more":
        return t[None]
    if way == "slice":
        return t.narrow(dim, 0, pick.draw(st.integers(0, t.shape[dim])))
    if way == "expand":
        sizes = [pick.draw(st.integers(1, 40)) if i == dim and n else n for i, n in enumerate(t.shape)]
        return t.narrow(dim, 0, min(1, t.shape[dim])).expand(sizes)
    if way == "fewer":
        return t.flatten(0, min(1, t.dim() - 1))
    if way == "empty":
        return t.new_empty([0 if i == dim else n for i, n in enumerate(t.shape)])
    if way == "apart":
        return torch.stack([t, t], -1)[..., 0]
    return t.transpose(0, dim)


def changed(pick: st.DataObject, value: Any) -> Any:
    """Another argument in the place of one."""
    if isinstance(value, Tensor):
        return changed_tensor(pick, value)
    if isinstance(value, list):
        value = list(value)
        way = pick.draw(st.sampled_from(["number", "number", "longer", "shorter"]))
        if way == "longer":
            return [*value, 1]
        if way == "shorter" or not value:
            return value[:-1]
        value[pick.draw(st.integers(0, len(value) - 1))] = pick.draw(st.sampled_from(NUMBERS))
        return value
    if isinstance(value, float):
        return pick.draw(st.sampled_from([-INF, -1.0, 0.0, 2.5, INF]))
    if isinstance(value, int):
        return pick.draw(st.sampled_from(NUMBERS))
    return pick.draw(st.sampled_from([None, torch.zeros(3), torch.zeros(2, 6, 7, 5)]))


def outcome(call: Any, *arguments: Any) -> Any:
    """What comes back, or the RuntimeError."""
    try:
        return call(*arguments)
    except RuntimeError as error:
        return error


CALLS = right_calls()


@quietly
@given(st.sampled_from(sorted(CALLS)), st.data())
def wrong_calls(name: str, pick: st.DataObject) -> None:
    """The kernel, plain PyTorch and the shapes refuse the same calls, and give the same otherwise."""
    kind, arguments = CALLS[name]
    arguments = list(arguments)
    for place in pick.draw(st.lists(st.integers(0, len(arguments) - 1), min_size=1, max_size=2, unique=True)):
        arguments[place] = changed(pick, arguments[place])
    found = outcome(getattr(torch.ops.nmfx, kind), *arguments)
    COUNTS[f"{kind} {'refused' if isinstance(found, Exception) else 'given'}"] += 1
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    if any(_last(each) > each.untyped_storage().nbytes() for each in tensors):
        assert isinstance(found, RuntimeError)  # memory that is not there: plain PyTorch would read it
        return
    plain = outcome(OPERATORS[kind].without_kernel, *arguments)
    assert isinstance(found, Exception) == isinstance(plain, Exception), (kind, arguments, found, plain)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments]
        shape = outcome(getattr(torch.ops.nmfx, kind), *fake)
    if isinstance(found, Tensor):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        assert shape.shape == found.shape
    elif not isinstance(shape, Exception):
        assert "columns" in str(found) or "pointers" in str(found), (kind, arguments, found)  # which only values show


def _last(t: Tensor) -> int:
    """Bytes that a tensor needs of its storage."""
    if not t.numel():
        return 0
    last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return int(last + 1) * t.element_size()


PROGRAMS: list[tuple[list[Tensor], list[Tensor], Tensor, int]] = []


@quietly
@given(st.integers(0, 3), st.data())
def wrong_programs(which: int, pick: st.DataObject) -> None:
    """A chain whose numbers, constants or inputs have been changed raises or gives tensors."""
    inputs, constants, program, images = PROGRAMS[which]
    inputs, constants, numbers = list(inputs), list(constants), program.tolist()
    for _ in range(pick.draw(st.integers(1, 2))):
        way = pick.draw(st.sampled_from(["number"] * 6 + ["constant"] * 4 + WAYS))
        place = pick.draw(st.integers(0, len(numbers) - 1))
        if way == "number":
            near = [numbers[place] - 1, numbers[place] + 1, 2 * numbers[place]]
            new = pick.draw(st.sampled_from([near, NUMBERS, numbers]).flatmap(st.sampled_from))
            numbers[place] = max(-(2**63), min(2**63 - 1, new))
        elif way == "constant":
            index = pick.draw(st.integers(0, len(constants) - 1))
            constants[index] = changed_tensor(pick, constants[index])
        elif way == "swapped":
            one, other = (pick.draw(st.integers(0, len(constants) - 1)) for _ in range(2))
            constants[one], constants[other] = constants[other], constants[one]
        elif way == "input":
            inputs[0] = changed_tensor(pick, inputs[0])
        elif way == "images":
            images = pick.draw(st.sampled_from(NUMBERS))
        else:
            after = {"cut": [], "longer": [1, *numbers[place:]], "gone": numbers[place + 1 :]}
            numbers = [*numbers[:place], *after[way]] or [0]
    found = outcome(run_program, inputs, constants, torch.tensor(numbers), images)
    COUNTS[f"chain {'refused' if isinstance(found, Exception) else 'given'}"] += 1
    assert isinstance(found, RuntimeError) or all(isinstance(float(each.sum()), float) for each in found)


def main(arguments: Sequence[str] = ()) -> None:
    """Both, in a process that ends well only if nothing is wrong."""
    if folder := os.environ.get("NMFX_TEST_KERNEL"):
        library.FOLDER, library.VARIANTS = Path(folder), ("test",)
    assert load_kernel() == ""
    PROGRAMS.extend(right_programs())
    for inputs, constants, program, images in PROGRAMS:
        assert run_program(inputs, constants, program, images)[0].shape == (2, 5)
    for kind, call in CALLS.values():
        torch.testing.assert_close(getattr(torch.ops.nmfx, kind)(*call), OPERATORS[kind].without_kernel(*call))
    wrong_calls()
    wrong_programs()
    print(dict(sorted(COUNTS.items())))


if __name__ == "__main__":
    main(sys.argv[1:])
