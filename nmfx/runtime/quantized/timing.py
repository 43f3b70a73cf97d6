"""Seconds of a site in int8, as a chain computes it: for a search under a latency budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmfx.runtime.layers import Fused, KernelLayer
from nmfx.runtime.measuring.timing import Times
from nmfx.runtime.program import Program
from nmfx.runtime.quantized.layers import conv_layer, linear_layer, unfit
from nmfx.runtime.quantized.ranges import Step

ONCE, OFTEN = 1, 9  # times that a site is computed in a program: the difference is its own, without getting pictures there
ANY = Step(1 / 64, 128)  # bytes: what they stand for costs no time


def int8_seconds(node: fx.Node, fused: Fused, inputs: tuple[Tensor, ...], times: Times) -> float | None:
    """Seconds of one pass of a site in int8; None where it stays float32.

    Args:
        node: of a lowered graph, whose sizes it knows.
        inputs: of the site.
    """
    if unfit(node, fused):
        return None
    layer = conv_layer(fused, ANY, ANY, ANY if fused.residual else None) if fused.is_conv else linear_layer(fused, ANY)
    if isinstance(layer, str):
        return None
    blocks: Tensor = layer.blocks  # type: ignore[assignment]
    shape, geometry = tuple(fused.weight.shape), (fused.geometry, fused.groups, fused.residual)
    work = (layer.options["height"], len(blocks), int(blocks[:, 2].sum()))
    what = ("int8 site", shape, work, geometry, [(tuple(one.shape), one.stride()) for one in inputs])

    def candidates() -> dict[str, Callable[[], Any]]:
        return {str(count): repeated(layer, inputs, count) for count in (ONCE, OFTEN)}

    took = times.get(what, [str(ONCE), str(OFTEN)], candidates)
    return max(0.0, took[str(OFTEN)] - took[str(ONCE)]) / (OFTEN - ONCE)


def repeated(layer: KernelLayer, inputs: tuple[Tensor, ...], count: int) -> Callable[[], Any]:
    """A program that computes an int8 layer several times, of inputs that it brings to bytes once."""
    graph, root, kernel = fx.Graph(), nn.Module(), torch.ops.nmfx
    root.layer = layer
    nodes = [graph.placeholder(f"x{number}") for number in range(len(inputs))]
    for node, value in zip(nodes, inputs, strict=True):
        node.meta["val"] = value.to("meta")
    in_bytes = layer.operator == "int8_conv2d"
    if in_bytes:
        for place, node in enumerate(nodes):
            nodes[place] = graph.call_function(kernel.quantize.default, (node, 1 / ANY.scale, ANY.zero))
            nodes[place].meta["val"] = node.meta["val"].to(torch.uint8)
    shape = torch.ops.nmfx.__getattr__(layer.operator).default(*layer.arguments(*(node.meta["val"] for node in nodes)))
    for _ in range(count):
        made = graph.call_module("layer", tuple(nodes))
        made.meta["val"] = shape
    if in_bytes:
        made = graph.call_function(kernel.int8_average.default, (made, 1.0, ANY.zero))
    graph.output(made)
    program = Program(fx.GraphModule(root, graph), threads=torch.get_num_threads())
    return partial(program.native(), list(inputs))
