"""Operators of the kernel that follow one another, by a single call: neither Python nor the dispatcher between them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmfx.runtime.calls import FLATTENING, call_of
from nmfx.runtime.kernel.library import load_kernel
from nmfx.runtime.program import Program


class Chain(nn.Module):
    """A part of a lowered graph as one call of the kernel.

    Attributes:
        graph: the part operator by operator, on plain pictures: what torch.compile sees, and what runs without the kernel.
        images: samples of a pass that stays on one thread; 0 is all at once, with the threads inside the operators.
    """

    def __init__(self, graph: fx.GraphModule, images: int) -> None:
        super().__init__()
        self.graph, self.images = graph, images
        threads = 1 if images else torch.get_num_threads()
        self.program = None if load_kernel() else Program(graph, threads=threads).native()

    def forward(self, *inputs: Tensor) -> Any:
        """Outputs of the part for its inputs, each ``(batch, ...)``."""
        seen = torch.compiler.is_compiling() or any(type(one) is not Tensor for one in inputs)  # they want to see operators
        if seen or self.program is None:
            return self.graph(*inputs)
        outputs = self.program(inputs, self.images)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def link(graph: fx.GraphModule, images: int = 0) -> None:
    """Put a `Chain` in the place of every run of operators of the kernel, in place.

    A node in between that needs none of them does not end a run: it comes before.
    """
    runs: list[list[fx.Node]] = [[]]
    after: set[fx.Node] = set()  # what depends on the current run, and on nothing that ended it
    for node in graph.graph.nodes:
        depends = any(each in after for each in node.all_input_nodes)
        if call_of(graph, node):
            runs[-1].append(node)
            after.add(node)
        elif depends:
            runs.append([])
            after.clear()
    runs = [run for run in runs if len(run) > 1 or any(_in_bytes(graph, node) for node in run)]
    for number, run in enumerate(runs):
        _replace(graph, run, f"chain{number}", images)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _in_bytes(graph: fx.GraphModule, node: fx.Node) -> bool:
    call = call_of(graph, node)
    return call is not None and bool(call.operator.planes)


def repeated(layer: nn.Module, inputs: Sequence[Tensor], times: int) -> Callable[[], Any]:
    """A call of the kernel that computes a layer several times, to measure it; what it reads by lanes stays as lanes."""
    graph = fx.Graph()
    given = tuple(graph.placeholder(f"x{number}") for number in range(len(inputs)))
    calls = [graph.call_module("layer", given) for _ in range(times)]
    graph.output(calls[-1])
    for node, value in [*zip(given, inputs, strict=True), *((call, layer(*inputs)) for call in calls[:1])]:
        node.meta["val"] = value.to("meta")
    for call in calls:
        call.meta = calls[0].meta
    program = Program(fx.GraphModule({"layer": layer}, graph), threads=torch.get_num_threads(), as_lanes=True)
    return partial(program.native(), program.stand_ins(inputs))


def _replace(graph: fx.GraphModule, run: list[fx.Node], name: str, images: int) -> None:
    inside, inputs = set(run), list[fx.Node]()
    for node in run:
        tensors = node.all_input_nodes[:1] if node.target in FLATTENING else node.all_input_nodes
        inputs += [each for each in tensors if each not in inside and each not in inputs]
    outputs = [node for node in run if any(user not in inside for user in node.users)]
    part = fx.Graph()
    known = {node: part.placeholder(node.name) for node in inputs}
    for node, given in known.items():
        given.meta = dict(node.meta)
    for node in run:
        if node.target in FLATTENING:
            known[node] = part.call_function(torch.ops.aten.flatten.using_ints, (known[node.all_input_nodes[0]], 1))
            known[node].meta = dict(node.meta)
        else:
            known[node] = part.node_copy(node, lambda each: known[each])
    part.output(tuple(known[node] for node in outputs) if len(outputs) > 1 else known[outputs[0]])
    graph.add_submodule(name, Chain(fx.GraphModule(graph, part), images))
    with graph.graph.inserting_after(run[-1]):
        call = graph.graph.call_module(name, tuple(inputs))
    values = {outputs[0]: call}
    call.meta = dict(outputs[0].meta)
    if len(outputs) > 1:
        call.meta = {}
        for number, node in reversed(list(enumerate(outputs))):
            with graph.graph.inserting_after(call):
                values[node] = graph.graph.call_function(operator.getitem, (call, number))
            values[node].meta = dict(node.meta)
    for node, value in values.items():
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        graph.graph.erase_node(node)
