"""A lowered graph in bytes: its convolutions, poolings and residuals by int8 operators, and its linear layers over tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from nmfx.runtime.layers import Fused, KernelLayer
from nmfx.runtime.layout.blocks import MOST_COLUMNS, Blocks, block
from nmfx.runtime.layout.lanes import Window
from nmfx.runtime.lowering.fusion import Sites
from nmfx.runtime.quantized.ranges import Step, observe

FEW_TOKENS = 16  # fewer than these leave most of a vector empty
kernel = torch.ops.nmfx


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``(out, ...)`` as int8, and what one of each row stands for, float64 ``(out,)``: symmetric, by the largest."""
    largest = weight.detach().double().flatten(1).abs().amax(1)
    scales = torch.where(largest > 0, largest, 127.0) / 127
    return (weight.double() / scales.reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8), scales


def _in_reach(weight: Tensor, factors: Tensor, shifts: Tensor) -> bool:
    """Whether what a row's sum can be at most becomes an integer of 32 bits (kernel/quantized.h)."""
    largest = (weight[0].numel() + 3) * 255 * 127 * float(factors.abs().max())
    return largest < 1 << 30 and float(shifts.abs().max()) < 1 << 29


def _layer(operator: str, blocks: Blocks, factors: Tensor, shifts: Tensor, options: dict[str, Any]) -> KernelLayer:
    tensors = {"values": blocks.values, "columns": blocks.columns, "blocks": blocks.blocks}
    tensors |= {"scales": factors.float(), "shifts": shifts.float()}
    return KernelLayer(operator, tensors, options | {"height": blocks.height})


class Quantizer:
    """Puts int8 operators in the place of sites, in a graph whose sites are all dense layers.

    Args:
        graph: lowered, changed in place.
        sites: of the graph.
        batches: that ranges are chosen by.
        keep: names of sites that stay float32.
        method: see `Values.step`.

    Attributes:
        reasons: why a site stays float32, by the node's target.
    """

    def __init__(
        self, graph: fx.GraphModule, sites: Sites, batches: Sequence[Tensor], *, keep: Collection[str] = (), method: str = "mse"
    ) -> None:
        self.graph, self.sites, self.method = graph, dict(sites), method
        self.reasons = {str(node.target): self._reason(node, fused, keep) for node, fused in sites}
        wanted = set(self.sites) | {each for node in self.sites for each in node.all_input_nodes}
        self.seen = observe(graph, wanted, batches)
        self.steps: dict[fx.Node, Step] = {}
        self.bytes: dict[fx.Node, fx.Node] = {}  # what stands for a node in bytes

    def run(self) -> None:
        """Rewrite the graph."""
        for node in list(self.graph.graph.nodes):
            if node in self.sites and not self.reasons[str(node.target)]:
                fused = self.sites[node]
                self.reasons[str(node.target)] = self._conv(node, fused) if fused.is_conv else self._linear(node, fused)
            elif node.target == kernel.max_pool2d.default:
                self._max_pool(node)
            elif node.target == kernel.average.default:
                self._average(node)
        self._finish()

    def _reason(self, node: fx.Node, fused: Fused, keep: Collection[str]) -> str:
        if fused.name in keep:
            return "asked for"
        values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
        if not all(isinstance(one, Tensor) for one in values):
            return "its sizes are not known"
        if not fused.is_conv:
            tokens = [size for size in values[0].shape[:-1] if isinstance(size, int)]  # type: ignore[union-attr]
            return "few tokens" if math.prod(tokens) < FEW_TOKENS else ""
        shapes = [tuple(one.shape[2:]) for one in values]  # type: ignore[union-attr]
        if not all(isinstance(size, int) for shape in shapes for size in shape):
            return "its sizes are free"
        channels, taps = values[1].shape[1], math.prod(fused.weight.shape[2:])  # type: ignore[union-attr]
        stride, padding, dilation = fused.geometry
        window = Window.of(shapes[1], shapes[0], tuple(fused.weight.shape[2:]), stride, padding, dilation)  # type: ignore[arg-type]
        if window is None:
            return "a window that planes cannot compute"
        return "more columns than 16 bits can count" if channels * taps > MOST_COLUMNS else ""

    def _step(self, node: fx.Node) -> Step:
        if node not in self.steps:
            self.steps[node] = self.seen[node].step(self.method)
        return self.steps[node]

    def _source(self, node: fx.Node) -> fx.Node:
        """A node in bytes; quantised where it is not."""
        if node not in self.bytes:
            step = self._step(node)
            with self.graph.graph.inserting_after(node):
                made = self.graph.graph.call_function(kernel.quantize.default, (node, 1 / step.scale, step.zero))
            made.meta["val"] = node.meta["val"].to(torch.uint8)
            self.bytes[node] = made
        return self.bytes[node]

    def _conv(self, node: fx.Node, fused: Fused) -> str:
        source, *rest = node.args
        read, made = self._step(source), self._step(node)  # type: ignore[arg-type]
        weight, scales = quantize_weight(fused.weight)
        factors = scales * read.scale / made.scale
        shifts = made.zero - read.zero * weight.double().flatten(1).sum(1) * factors
        if fused.bias is not None:
            shifts += fused.bias.double() / made.scale
        options: dict[str, Any] = dict(zip(("stride", "padding", "dilation"), map(list, fused.geometry), strict=True))
        options |= {
            "out_channels": len(weight),
            "kernel": list(weight.shape[2:]),
            "groups": fused.groups,
            "zero": read.zero,
            "zero_out": made.zero,
            "residual_scale": 0.0,
        }
        options |= {"low": made.byte(fused.low), "high": made.byte(fused.high)}
        if rest:
            added = self._step(rest[0])  # type: ignore[arg-type]
            options["residual_scale"] = added.scale / made.scale
            shifts -= added.zero * added.scale / made.scale
        if not _in_reach(weight, factors, shifts) or options["residual_scale"] >= 1 << 20:
            return "its outputs are small beside its inputs"
        layer = _layer("int8_conv2d", block(weight, fused.groups), factors, shifts, options)
        inputs = tuple(self._source(each) for each in (source, *rest))  # type: ignore[arg-type]
        self._put(node, layer, inputs)
        return ""

    def _linear(self, node: fx.Node, fused: Fused) -> str:
        source = node.all_input_nodes[0]
        read = self._step(source)
        weight, scales = quantize_weight(fused.weight)
        factors = scales * read.scale
        shifts = -read.zero * weight.double().sum(1) * factors
        if fused.bias is not None:
            shifts += fused.bias.double()
        if not _in_reach(weight, factors, shifts):
            return "its inputs are too large"
        options = {"inverse": 1 / read.scale, "zero": read.zero, "low": fused.low, "high": fused.high}
        options |= {"out_features": len(weight), "width": weight.shape[1]}
        self.graph.add_submodule(str(node.target), _layer("int8_linear", block(weight), factors, shifts, options))
        return ""

    def _put(self, node: fx.Node, layer: KernelLayer, inputs: tuple[fx.Node, ...]) -> None:
        name = str(node.target)
        self.graph.add_submodule(name, layer)
        with self.graph.graph.inserting_after(node):
            made = self.graph.graph.call_module(name, inputs)
        made.meta["val"] = node.meta["val"].to(torch.uint8)
        self.bytes[node] = made

    def _max_pool(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        if source not in self.bytes or self.steps[source].zero or self.bytes[source].target == kernel.quantize.default:
            return  # zeros around a picture are no pixels: nothing may be below them
        size, stride, padding = (tuple(each) for each in node.args[1:4])  # type: ignore[union-attr, arg-type]
        shapes = [tuple(each.meta["val"].shape[2:]) for each in (source, node)]
        if Window.of(shapes[0], shapes[1], size, stride, padding, (1, 1)) is None:  # type: ignore[arg-type]
            return
        with self.graph.graph.inserting_after(node):
            made = self.graph.graph.call_function(
                kernel.int8_max_pool2d.default, (self.bytes[source], *map(list, (size, stride, padding)))
            )
        made.meta["val"] = node.meta["val"].to(torch.uint8)
        self.bytes[node], self.steps[node] = made, self.steps[source]

    def _average(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        if source not in self.bytes or self.bytes[source].target == kernel.quantize.default:
            return
        step, (height, width) = self.steps[source], source.meta["val"].shape[2:]
        with self.graph.graph.inserting_after(node):
            made = self.graph.graph.call_function(
                kernel.int8_average.default, (self.bytes[source], step.scale / (height * width), step.zero)
            )
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        self.graph.graph.erase_node(node)

    def _finish(self) -> None:
        """Numbers again where what is in bytes is read by others; then nodes that nobody reads go."""
        for node, made in self.bytes.items():
            if made.target == kernel.quantize.default:
                continue
            others = [
                user for user in node.users if user not in self.bytes or self.bytes[user].target == kernel.quantize.default
            ]
            if others:
                step = self.steps[node]
                with self.graph.graph.inserting_after(made):
                    plain = self.graph.graph.call_function(kernel.dequantize.default, (made, step.scale, step.zero))
                plain.meta = dict(node.meta)
                for user in others:
                    user.replace_input_with(node, plain)
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()
