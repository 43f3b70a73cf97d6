"""A lowered graph in bytes: its convolutions, poolings and residuals by int8 operators, and its linear layers over tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from nmfx.runtime.layers import Fused, KernelLayer
from nmfx.runtime.layout.lanes import Window
from nmfx.runtime.lowering.fusion import Sites
from nmfx.runtime.quantized.layers import conv_layer, linear_layer, unfit
from nmfx.runtime.quantized.ranges import Step, observe

kernel = torch.ops.nmfx


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
        self.reasons = {str(node.target): "asked for" if fused.name in keep else unfit(node, fused) for node, fused in sites}
        wanted = set(self.sites) | {each for node in self.sites for each in node.all_input_nodes}
        self.seen = observe(graph, wanted, batches)
        self.steps: dict[fx.Node, Step] = {}
        self.bytes: dict[fx.Node, fx.Node] = {}  # what stands for a node in bytes

    def run(self) -> None:
        """Rewrite the graph."""
        for node in list(self.graph.graph.nodes):
            if node in self.sites and not self.reasons[str(node.target)]:
                self.reasons[str(node.target)] = self._site(node, self.sites[node])
            elif node.target == kernel.max_pool2d.default:
                self._max_pool(node)
            elif node.target == kernel.average.default:
                self._average(node)
        self._finish()

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

    def _site(self, node: fx.Node, fused: Fused) -> str:
        """Why a site stays float32 after all; empty where it has become int8."""
        nodes: Any = node.args
        source, *rest = nodes
        read = self._step(source)
        added = self._step(rest[0]) if rest else None
        layer = conv_layer(fused, read, self._step(node), added) if fused.is_conv else linear_layer(fused, read)
        if isinstance(layer, str):
            return layer
        if fused.is_conv:
            self._put(node, layer, tuple(map(self._source, nodes)))
        else:
            self.graph.add_submodule(str(node.target), layer)
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
