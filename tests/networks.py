"""Random little networks of what the kernel computes by lanes, against float64."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from nmfx.runtime.calls import steps_by_lanes
from nmfx.runtime.chain import Chain, link
from nmfx.runtime.layers import Depthwise, sparse_layer
from nmfx.runtime.layout.tiles import Tile
from nmfx.runtime.lowering.exporting import copy_of, export
from nmfx.runtime.lowering.fusion import lower


class Branch(nn.Module):
    """A residual, or a way round it with a stride."""

    def __init__(self, body: nn.Module, around: nn.Module) -> None:
        super().__init__()
        self.body, self.around = body, around

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def convolution(pick: random.Random, width: int, out: int, stride: int = 1) -> nn.Conv2d:
    """Any kernel and dilation that keep the size, but for the stride; now and then by groups, or each channel by itself."""
    kernel, dilation = (pick.choice([1, 3, 5]), pick.choice([1, 1, 3, 7])), (pick.randint(1, 2), pick.randint(1, 2))
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    groups = pick.choice([1, 1, 2, width if width == out else 1])
    return nn.Conv2d(width, out, kernel, stride, padding, dilation, groups, bias=pick.random() < 0.7)


def network(pick: random.Random) -> nn.Module:
    """A chain of convolutions, blocks with residuals, poolings and a mean at its end, of widths that are even."""
    width = pick.choice([2, 4, 8])
    layers: list[nn.Module] = [convolution(pick, 4, width, pick.randint(1, 2)), nn.ReLU()]
    for _ in range(pick.randint(2, 5)):
        stride, out = pick.choice([1, 1, 2]), pick.choice([width, 2 * pick.randint(1, 9)])
        body = nn.Sequential(convolution(pick, width, out, stride), nn.ReLU6(), convolution(pick, out, out))
        if pick.random() < 0.3:
            layers.append(nn.MaxPool2d(3, pick.randint(1, 2), 1))
        around = nn.Identity() if (stride, out) == (1, width) else nn.Conv2d(width, out, 1, stride)
        layers.append(Branch(body, around) if pick.random() < 0.6 else body)
        width = out
    if pick.random() < 0.5:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers).eval()


def lanes_case(seed: int, threads: tuple[int, ...] = (1, 2, 3)) -> int:
    """One network by lanes on several numbers of threads, and an image a thread; how many operators worked on lanes."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    net, before, done = network(pick), torch.get_num_threads(), 0
    x = torch.randn(pick.randint(1, 3), 4, pick.choice([5, 7, 14, 16, 28, 33]), pick.choice([6, 7, 14, 20, 28, 33]))
    tile = Tile(pick.choice([1, 16, 64, 4096]), pick.randint(1, 8), lanes=True, zeros=pick.random() < 0.3)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.rand_like(module.weight) < pick.choice([0.1, 0.3, 1.0])
    found = []
    try:
        exported, _ = export(net, x)
        sites = lower(exported)
        for count in threads:
            torch.set_num_threads(count)
            graph = copy_of(exported)
            for node, fused in sites:
                layer = Depthwise(fused, lanes=True) if fused.depthwise else sparse_layer(fused, tile)
                graph.add_submodule(str(node.target), layer)
            link(graph, pick.randint(0, 1))
            done += sum(len(steps_by_lanes(module.graph)) for module in graph.modules() if isinstance(module, Chain))
            with torch.no_grad():
                found.append(graph(x))
                again = graph(x)  # in memory that has been used
            assert torch.equal(again, found[-1])
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        wanted = net.double()(x.double())
    scale = float(wanted.abs().max()) + 1e-3
    assert all(float((one - found[0]).abs().max()) <= 1e-6 * scale for one in found[1:])  # means add strips up in another order
    assert float((found[0] - wanted).abs().max()) <= 1e-5 * scale, seed
    return done
