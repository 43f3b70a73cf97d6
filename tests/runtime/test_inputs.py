"""A compiled model gives the masked model's outputs for every input, or raises an NmfxError."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from outputs import right_or_refused, same
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

import nmfx
from nmfx.errors import ModelError, NmfxError
from nmfx.runtime.layers import LAYERS


@pytest.fixture(autouse=True)
def quick(quick_times: None) -> None:
    """Nothing here hangs on a clock."""


Forward = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Layers for a forward that is given."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)
        self.norm, self.run = nn.BatchNorm2d(16, track_running_stats=False), forward
        self.tokens = nn.LSTM(16, 4)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def usual(net: Net, x: Tensor) -> Tensor:
    return net.head(net.b(net.a(x).relu()).mean((2, 3)))


FORWARDS: dict[str, tuple[Forward, bool]] = {  # and whether samples are shown not to see each other
    "usual": (usual, True),
    "a branch on a batch of one": (lambda m, x: usual(m, x) * (2 if x.shape[0] == 1 else 1), True),
    "a branch on a large batch": (lambda m, x: usual(m, x) * (2 if x.shape[0] > 4 else 1), True),
    "a branch on the batch modulo three": (lambda m, x: usual(m, x) * (2 if x.shape[0] % 3 == 0 else 1), True),
    "the batch as a number": (lambda m, x: m.a(x) * x.shape[0], False),
    "statistics of the batch": (lambda m, x: m.head(m.norm(m.a(x)).relu().mean((2, 3))), False),
    "less the mean of the batch": (lambda m, x: m.a(x) - m.a(x).mean(0), False),
    "softmax over the batch": (lambda m, x: m.a(x).softmax(0), False),
    "tokens first": (lambda m, x: m.a(x).flatten(2).permute(2, 0, 1), False),
    "a scalar": (lambda m, x: m.a(x).mean(), False),
    "and a number": (lambda m, x: (m.a(x), x.shape[0], None), False),
    "recurrent states": (lambda m, x: m.tokens(F.adaptive_avg_pool2d(m.a(x), 2).flatten(2).permute(2, 0, 1)), False),
    "a bool is added": (lambda m, x: m.a(x) + (m.b(m.a(x)) > 0), True),
    "a double is added": (lambda m, x: m.a(x) + m.b(m.a(x)).double(), True),
    "twice something is added": (lambda m, x: torch.add(m.b(m.a(x)), m.a(x), alpha=2), True),
    "a mean is added": (lambda m, x: m.b(m.a(x)) + m.a(x).mean((2, 3), keepdim=True), True),
    "in place": (lambda m, x: m.b(m.a(x)).add_(m.a(x)).relu_(), True),
    "a picture without a batch": (lambda m, x: m.b(m.a(x[0])) + m.b(m.a(x)), False),
    "pixels counted": (lambda m, x: m.a(x).sum((2, 3)) / (x.shape[2] * x.shape[3]), True),
    "pooling": (lambda m, x: m.b(F.max_pool2d(m.a(x).relu(), 2)), True),
    "pooling, rounded up": (lambda m, x: m.b(F.max_pool2d(m.a(x).relu(), 3, ceil_mode=True)), True),
    "pooling, dilated": (lambda m, x: m.b(F.max_pool2d(m.a(x).relu(), 3, dilation=2)), True),
    "a large stride": (lambda m, x: F.conv2d(x, m.a.weight, stride=300, padding=1), True),
}
SHAPES = [(4, 3, 16, 16), (0, 3, 16, 16), (1, 3, 16, 16), (7, 3, 16, 16), (6, 3, 16, 16), (2, 3, 9, 20), (1, 3, 33, 33)]
SHAPES += [(2, 1, 16, 16), (2, 4, 16, 16), (2, 3, 16, 0), (3, 16, 16)]


@pytest.mark.parametrize("name", FORWARDS)
def test_every_batch_and_size_is_right_or_refused(name: str) -> None:
    forward, apart = FORWARDS[name]
    model = Net(forward).eval()
    with torch.no_grad():  # masked, baked: transform refuses what some of these forwards do not read
        for layer in (model.a, model.b):
            layer.weight[:, ::2] = 0
    compiled = nmfx.compile(model, torch.randn(4, 3, 16, 16), batch=2)
    assert compiled._first.domain.apart is apart
    right = [shape for shape in SHAPES if right_or_refused(compiled, model, torch.randn(shape))]
    assert {shape for shape in SHAPES if shape[0] and shape[1:] in ((3, 16, 16), (3, 9, 20), (3, 33, 33))} <= set(right)


def test_an_example_of_one_picture_is_for_one_picture() -> None:
    model = Net(FORWARDS["a branch on a batch of one"][0]).eval()
    compiled = nmfx.compile(model, torch.randn(1, 3, 16, 16))
    for count in (1, 2, 5, 1):
        assert right_or_refused(compiled, model, torch.randn(count, 3, 16, 16))
    assert len(compiled.others) == 1


def test_kinds_of_input_are_refused() -> None:
    model, x = Net(usual).eval(), torch.randn(2, 3, 16, 16)
    compiled = nmfx.compile(model, x)
    expected = r"compiled for float32 of sizes \(3, 16, 16\) in batches of 2 or more, on cpu, got"
    for wrong in (x.double(), x.to(torch.uint8), x.to("meta"), x.to_sparse(), x[0], x[None], [x], None):
        with pytest.raises(NmfxError, match=expected):
            compiled(wrong)
    with torch.autocast("cpu"):
        with pytest.raises(NmfxError, match="under autocast"):
            compiled(x)
        with pytest.raises(ModelError, match="autocast"):
            nmfx.compile(model, x)
    same(compiled(x.to(memory_format=torch.channels_last)), model(x))
    same(compiled(x.transpose(2, 3)), model(x.transpose(2, 3)))
    for wrong in (x[:0], x[:, :, :0], torch.tensor(1.0)):
        with pytest.raises(ModelError, match="expected a batch of pictures"):
            nmfx.compile(model, wrong)


def test_lowerings_are_kept_up_to_a_number() -> None:
    model = Net(usual).eval()
    compiled = nmfx.compile(model, torch.randn(2, 3, 8, 8), shapes=2)
    for size in (9, 10, 11, 9, 11):
        assert right_or_refused(compiled, model, torch.randn(2, 3, size, 8))
    assert [one.domain.shape[2] for one in compiled.others] == [11, 9]
    graphs = (compiled.graph, *(each.graph for each in compiled.others))
    first, *others = ({id(one) for one in graph.modules() if isinstance(one, LAYERS)} for graph in graphs)
    assert all(other == first for other in others)  # they share their layers
    none = nmfx.compile(model, torch.randn(2, 3, 8, 8), shapes=0)
    assert right_or_refused(none, model, torch.randn(3, 3, 8, 8))
    with pytest.raises(NmfxError, match=r"got float32 \(2, 3, 9, 8\): compile with an example of that size"):
        none(torch.randn(2, 3, 9, 8))


def test_threads_may_call_at_new_sizes() -> None:
    model, failures = Net(usual).eval(), list[BaseException]()
    compiled = nmfx.compile(model, torch.randn(2, 3, 8, 8))

    def call(size: int) -> None:
        try:
            assert right_or_refused(compiled, model, torch.randn(2, 3, size, 8))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(size,)) for size in (8, 9, 9, 10, 10, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(compiled.others) == 2


def test_it_is_copied_and_not_saved() -> None:
    model, x = Net(usual).eval(), torch.randn(2, 3, 16, 16)
    compiled = nmfx.compile(model, x)
    for other in (copy.deepcopy(compiled), copy.copy(compiled)):
        same(other(x), compiled(x))
        assert right_or_refused(other, model, torch.randn(3, 3, 9, 9))
    assert not compiled.others
    for save in (lambda: torch.save(compiled, io.BytesIO()), lambda: pickle.dumps(compiled)):
        with pytest.raises(NmfxError, match="cannot be saved"):
            save()
    for convert in (compiled.half, compiled.double, lambda: compiled.to("meta")):
        with pytest.raises(NmfxError, match="stays float32 on the CPU"):
            convert()
    assert compiled.float() is compiled.cpu()
    with pytest.raises(NmfxError, match="takes no other weights"):
        compiled.load_state_dict({})
    same(compiled(x), model(x))


def test_padding_that_follows_the_size() -> None:
    """timm's Conv2dSame pads by what the picture's size leaves over."""
    layers = [Conv2dSame(3, 8, 3, stride=2), Conv2dSame(8, 8, 5, stride=2, groups=8), nn.ReLU(), Conv2dSame(8, 16, 3, stride=3)]
    model = nn.Sequential(*layers).eval()
    compiled = nmfx.compile(model, torch.randn(1, 3, 64, 64), batch=1)
    for size in ((33, 34), (35, 72), (36, 37), (5, 6)):
        assert right_or_refused(compiled, model, torch.randn(1, 3, *size))
