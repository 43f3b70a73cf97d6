"""Operators of the kernel that follow one another, by a single call: neither Python nor the dispatcher between them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from nmfx.runtime.building import load_kernel
from nmfx.runtime.layers import Depthwise, SparseConv2d, SparseLinear

CONV, LINEAR, DEPTHWISE, MAX_POOL, AVERAGE, FLATTEN = range(6)  # as in kernel/kernel.cpp
FLATTENING = (torch.ops.aten.view.default, torch.ops.aten.flatten.using_ints, torch.ops.aten.reshape.default)


class Chain(nn.Module):
    """A part of a lowered graph: its inputs in, its outputs out.

    Attributes:
        graph: the same, operator by operator: what torch.compile sees.
        images: samples of a pass that stays on one thread; 0 is all at once, with the threads inside the operators.
    """

    def __init__(self, graph: fx.GraphModule, images: int) -> None:
        super().__init__()
        self.graph, self.images = graph, images
        self.program, self.constants = _write(graph)

    def forward(self, *inputs: Tensor) -> Any:
        """Each with the batch first."""
        seen = torch.compiler.is_compiling() or any(type(one) is not Tensor for one in inputs)  # they want to see operators
        if seen or load_kernel():
            return self.graph(*inputs)
        outputs = torch.ops.nmfx.chain.default(inputs, self.constants, self.program, self.images)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def link(graph: fx.GraphModule, images: int = 0) -> None:
    """Put a `Chain` in the place of every run of operators of the kernel, in place.

    A node in between that needs none of them does not end a run: it comes before.
    """
    runs: list[list[fx.Node]] = [[]]
    after: set[fx.Node] = set()  # what depends on the current run, and on nothing that ended it
    for node in graph.graph.nodes:
        depends = any(each in after for each in node.all_input_nodes)
        if _is_step(graph, node):
            runs[-1].append(node)
            after.add(node)
        elif depends:
            runs.append([])
            after.clear()
    runs = [run for run in runs if len(run) > 1]
    for number, run in enumerate(runs):
        _replace(graph, run, f"chain{number}", images)
    graph.delete_all_unused_submodules()
    graph.recompile()


def repeated(layer: nn.Module, inputs: int, times: int) -> Chain:
    """A chain that does the same several times, to measure it."""
    graph = fx.Graph()
    given = tuple(graph.placeholder(f"x{number}") for number in range(inputs))
    calls = [graph.call_module("layer", given) for _ in range(times)]
    graph.output(calls[-1])
    return Chain(fx.GraphModule({"layer": layer}, graph), 0)


def _is_step(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), SparseConv2d | SparseLinear | Depthwise)
    if node.target in FLATTENING:  # (batch, ...) to (batch, features)
        shapes = [each.meta["val"].shape for each in (node.args[0], node) if isinstance(each, fx.Node) and "val" in each.meta]
        return len(shapes) == 2 and len(shapes[1]) == 2 and len(shapes[0]) > 1 and str(shapes[0][0]) == str(shapes[1][0])
    return node.target in (torch.ops.nmfx.max_pool2d.default, torch.ops.nmfx.average.default)


def _replace(graph: fx.GraphModule, run: list[fx.Node], name: str, images: int) -> None:
    inside, inputs = set(run), list[fx.Node]()
    for node in run:
        tensors = node.all_input_nodes[:1] if node.target in FLATTENING else node.all_input_nodes
        inputs += [each for each in tensors if each not in inside and each not in inputs]
    outputs = [node for node in run if any(user not in inside for user in node.users)]
    part = fx.Graph()
    known = {node: part.placeholder(node.name) for node in inputs}
    for node in run:
        if node.target in FLATTENING:
            known[node] = part.call_function(torch.ops.aten.flatten.using_ints, (known[node.all_input_nodes[0]], 1))
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
                values[node] = graph.graph.call_function(_item, (call, number))
            values[node].meta = dict(node.meta)
    for node, value in values.items():
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        graph.graph.erase_node(node)


def _item(values: Any, number: int) -> Any:
    return values[number]


def _write(graph: fx.GraphModule) -> tuple[Tensor, list[Tensor]]:
    """The program of a part: the number of steps; each step, and the slots that nobody reads after it; the outputs' slots."""
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    places = {node: place for place, node in enumerate(node for node in graph.graph.nodes if node.op != "output")}
    results = next(node for node in graph.graph.nodes if node.op == "output").all_input_nodes
    leaving = set(results)
    for node in results:
        while node.target in FLATTENING:  # which shares the memory of what it flattens
            node = node.all_input_nodes[0]
            leaving.add(node)
    last = {used: node for node in nodes for used in (node, *node.all_input_nodes) if used not in results}
    constants: list[Tensor] = []
    numbers = [len(nodes)]
    for node in nodes:
        inputs = [places[each] for each in node.args if isinstance(each, fx.Node)]  # a residual can be the input itself
        numbers.append(int(node in leaving))
        numbers += _step(graph, node, inputs, constants, node not in leaving and _alone(node))
        numbers += _list(places[used] for used, reader in last.items() if reader is node)
    numbers += _list(places[node] for node in results)
    return torch.tensor(numbers, dtype=torch.int64), constants


def _step(graph: fx.GraphModule, node: fx.Node, inputs: list[int], constants: list[Tensor], over: bool) -> list[int]:
    def constant(value: Tensor | None) -> int:
        if value is None:
            return -1
        constants.append(value)
        return len(constants) - 1

    x, residual = inputs[0], inputs[1] if len(inputs) > 1 else -1
    if node.target == torch.ops.nmfx.max_pool2d.default:
        return [MAX_POOL, x, *_lists(node.args[1:4])]
    if node.target == torch.ops.nmfx.average.default:
        return [AVERAGE, x]
    if node.op == "call_function":
        return [FLATTEN, x]
    layer: Any = graph.get_submodule(str(node.target))
    if isinstance(layer, Depthwise):
        layer = cast(Any, layer)
        *geometry, low, high = layer.options
        weights = [constant(layer.weight), constant(layer.bias), residual]
        return [DEPTHWISE, x, *weights, *_lists(geometry), _real(low), _real(high)]
    packed = [constant(each) for each in (layer.values, layer.columns, layer.pointers, layer.bias)]
    if isinstance(layer, SparseLinear):
        out, low, high, *tile = layer.options
        return [LINEAR, x, *packed, out, _real(low), _real(high), *tile]
    out, *geometry, groups, low, high = layer.options
    return [CONV, x, *packed, residual, out, *_lists(geometry), groups, _real(low), _real(high), *layer.tile, int(over)]


def _alone(node: fx.Node) -> bool:
    """Whether a residual is made in this part and read by this node alone, which may then write where it is."""
    inputs = node.all_input_nodes  # only one if the residual is the input itself
    return len(inputs) > 1 and inputs[1].op != "placeholder" and list(inputs[1].users) == [node]


def _list(numbers: Iterable[int]) -> list[int]:
    """Its length, then the numbers."""
    return [len(found := list(numbers)), *found]


def _lists(several: Iterable[Any]) -> list[int]:
    return [number for numbers in several for number in _list(numbers)]


def _real(number: float) -> int:
    """The bits of a double."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
