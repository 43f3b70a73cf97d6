"""What a chain tells the kernel: its operators as numbers and constants, and where lanes are used, how pictures get there."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from nmfx.runtime.lanes import Copy, Plan, Step, Window, between, from_plain, lay_out, sources, to_plain
from nmfx.runtime.layers import Depthwise, SparseConv2d, SparseLinear
from nmfx.runtime.packed import pack_for_lanes, unpack

CONV, LINEAR, DEPTHWISE, MAX_POOL, AVERAGE, FLATTEN = range(6)  # these numbers are the kernel's: kernel/kernel.cpp
REARRANGE, LANES_CONV, LANES_DEPTHWISE, LANES_MAX_POOL, LANES_AVERAGE = range(6, 11)
FLATTENING = (torch.ops.aten.view.default, torch.ops.aten.flatten.using_ints, torch.ops.aten.reshape.default)
MAX_POOLING, AVERAGING = torch.ops.nmfx.max_pool2d.default, torch.ops.nmfx.average.default


@dataclass
class _Step:
    numbers: list[int]
    reads: list[int]
    leaves: bool


class Program:
    """A part of a lowered graph as the kernel runs it: steps that each fill a slot, after the slots of the inputs.

    Args:
        threads: how many share an operator.
        as_lanes: inputs and outputs of operators by lanes are lanes, as they are within a chain; for measuring.

    Attributes:
        constants: tensors that the steps name by their position in this list.
        plan: how pictures are laid out.
        given: with `as_lanes`, what takes the place of the inputs.
    """

    def __init__(self, graph: fx.GraphModule, *, threads: int, as_lanes: bool = False) -> None:
        self.graph, self.as_lanes = graph, as_lanes
        self.constants: list[Tensor] = []
        self.steps: list[_Step] = []
        self.inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.results = next(node for node in graph.graph.nodes if node.op == "output").all_input_nodes
        self.plain: dict[fx.Node, int] = {node: place for place, node in enumerate(self.inputs)}
        self.laid: dict[Copy, int] = {}
        self.given: dict[fx.Node, Copy] = {}
        self.leaving = set(self.results)
        for node in self.results:
            while node.target in FLATTENING:  # which shares the memory of what it flattens
                node = node.all_input_nodes[0]
                self.leaving.add(node)
        self.by_lanes = steps_by_lanes(graph, alone=as_lanes)
        self.plan = lay_out(self.by_lanes, torch.ops.nmfx.vector_length(), threads) if self.by_lanes else Plan()
        for node in graph.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._write(node)
        self.outputs = [self._result(node) for node in self.results]

    def numbers(self) -> Tensor:
        """The program as int64 ``(numbers,)``: the inputs' sizes; the number of steps; for each step whether its result leaves
        the chain, its own numbers, and the slots that no later step reads; the slots of the outputs.
        """
        first = len(self.inputs)
        last = {slot: number for number, step in enumerate(self.steps) for slot in (first + number, *step.reads)}
        written = [first, *_lists(map(self._sizes, self.inputs)), len(self.steps)]
        for number, step in enumerate(self.steps):
            done = (slot for slot, reader in last.items() if reader == number and slot not in self.outputs)
            written += [int(step.leaves), *step.numbers, *_list(done)]
        return torch.tensor([*written, *_list(self.outputs)], dtype=torch.int64)

    def _sizes(self, node: fx.Node) -> list[int]:
        """Sizes of an input, -1 for the batch and what is not fixed; empty where lanes stand in for it or nothing is known."""
        value = node.meta.get("val")
        if node in self.given or not isinstance(value, Tensor):
            return []
        return [-1 if dim == 0 or not isinstance(size, int) else size for dim, size in enumerate(value.shape)]

    def stand_ins(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        """Random inputs as lanes in the place of those that the program reads so, for measuring."""
        found = []
        for node, one in zip(self.inputs, inputs, strict=True):
            if node in self.given:
                copy = self.given[node]
                lanes, planes = self.plan.lanes[copy], max(1, len(copy.phases))
                one = torch.rand(lanes.strips, one.shape[0], one.shape[1] * planes, lanes.vectors, lanes.size)
            found.append(one)
        return found

    def _write(self, node: fx.Node) -> None:
        if node in self.by_lanes:
            self._write_by_lanes(node)
            return
        inputs = [self._plain(each) for each in node.args if isinstance(each, fx.Node)]  # a residual can be the input itself
        over = node not in self.leaving and _alone(node)
        self.plain[node] = self._add(self._step(node, inputs, over=over), inputs, leaves=node in self.leaving)

    def _add(self, numbers: list[int], reads: list[int], *, leaves: bool = False) -> int:
        self.steps.append(_Step(numbers, reads, leaves))
        return len(self.inputs) + len(self.steps) - 1

    def _constant(self, value: Tensor | None) -> int:
        if value is None:
            return -1
        self.constants.append(value)
        return len(self.constants) - 1

    def _step(self, node: fx.Node, inputs: list[int], *, over: bool) -> list[int]:
        x, residual = inputs[0], inputs[1] if len(inputs) > 1 else -1
        if node.target == MAX_POOLING:
            return [MAX_POOL, x, *_lists(node.args[1:4])]
        if node.target == AVERAGING:
            return [AVERAGE, x]
        if node.op == "call_function":
            return [FLATTEN, x]
        layer: Any = self.graph.get_submodule(str(node.target))
        if isinstance(layer, Depthwise):
            layer = cast(Any, layer)
            *geometry, low, high = layer.options
            weights = [self._constant(layer.weight), self._constant(layer.bias), residual]
            return [DEPTHWISE, x, *weights, *_lists(geometry), _real(low), _real(high)]
        packed = [self._constant(each) for each in (layer.values, layer.columns, layer.pointers, layer.bias)]
        if isinstance(layer, SparseLinear):
            out, width, low, high, *tile = layer.options
            return [LINEAR, x, *packed, out, width, _real(low), _real(high), *tile]
        out, width, *geometry, groups, low, high = layer.options
        limits = (_real(low), _real(high))
        return [CONV, x, *packed, residual, out, width, *_lists(geometry), groups, *limits, *layer.tile, int(over)]

    # --- by lanes

    def _write_by_lanes(self, node: fx.Node) -> None:
        step, source = self.by_lanes[node], self.plan.source[node]
        x = self._laid(source)
        picture = [x, *self.plan.lanes[source].numbers]
        if step.window is None:
            lanes = self.plan.lanes[source]
            pixels = lanes.picture[0] * lanes.picture[1]
            numbers = [LANES_AVERAGE, *picture, self._constant(lanes.mask()), pixels]
            self.plain[node] = self._add(numbers, [x], leaves=node in self.leaving)
            return
        layer: Any = None if node.target == MAX_POOLING else self.graph.get_submodule(str(node.target))
        low, high = (-math.inf, math.inf) if layer is None else layer.options[-2:]
        out, residual = self.plan.out[node], self.plan.residual.get(node)
        lanes, reads, after = self.plan.lanes[out], [x], [0]
        over = False
        if residual is not None:
            reads.append(self._laid(residual))
            after = [1, reads[1], *self.plan.lanes[residual].numbers]
            over = residual.node in self.by_lanes and _alone(node) and self.plan.lanes[residual] == lanes
        after += [self._constant(lanes.mask() if out in self.plan.edged else None), _real(low), _real(high), int(over)]
        offsets = self.plan.offsets(node, step.window)
        steps = [self.plan.down[node], self.plan.step(node, step.window), *_list(self.plan.late(node, step.window))]
        if isinstance(layer, SparseConv2d):
            numbers = [LANES_CONV, *picture, *self._conv(layer, node, offsets), *steps, *lanes.numbers, *after]
        else:
            layer = cast(Any, layer)
            weights = [None, None] if layer is None else [layer.weight, layer.bias]
            constants = [self._constant(each) for each in (torch.tensor(offsets, dtype=torch.int32), *weights)]
            kind, local = LANES_MAX_POOL if layer is None else LANES_DEPTHWISE, self.plan.local.get(node)
            halo = [0, -1, -1]
            if local is not None:
                read = self.plan.lanes[source]
                halo = [1, *local.numbers, self._constant(read.mask()), self._constant(sources(local, read))]
            numbers = [kind, *picture, *halo, *constants, self.plan.planes(node), *steps, *lanes.numbers, *after]
        self.laid[out] = self._add(numbers, reads, leaves=self.as_lanes and node in self.leaving)

    def _conv(self, layer: Any, node: fx.Node, offsets: list[int]) -> list[int]:
        """The numbers of a convolution by lanes that say where its weights are, and their sizes."""
        groups, tile = layer.options[-3], layer.lanes
        weight = unpack(layer.values, layer.columns, layer.pointers, layer.shape, groups, layer.tile[0])
        pitch = self.plan.planes(node) * self.plan.lanes[self.plan.source[node]].vectors
        packed, starts = pack_for_lanes(weight, groups, offsets, pitch, chunk=tile.chunk, zeros=tile.zeros)
        constants = (packed.values, packed.columns, packed.pointers, starts, layer.bias)
        channels = weight.shape[1] * groups * self.plan.planes(node)
        sizes = [channels, layer.shape[0], packed.width, groups, packed.chunk, tile.vectors]
        return [*map(self._constant, constants), *sizes]

    def _laid(self, copy: Copy) -> int:
        """The slot of a picture as lanes; a step that makes it is added if there is none."""
        node = cast(fx.Node, copy.node)
        if copy not in self.laid:
            if self.as_lanes and node in self.inputs:
                self.given[node] = copy
                return self.plain[node]
            lanes, own = self.plan.lanes[copy], self.plan.out.get(node)
            window = next((self.by_lanes[each].window for each, seen in self.plan.source.items() if seen == copy), None)
            index = from_plain(lanes, window if copy.phases else None)
            if own is not None:
                index = between(self.plan.lanes[own], index)
            slot = self._plain(node) if own is None else self.laid[own]
            numbers = [REARRANGE, slot, self._constant(index), 0, *_list((lanes.vectors, lanes.size))]
            self.laid[copy] = self._add(numbers, [slot])
        return self.laid[copy]

    def _plain(self, node: fx.Node) -> int:
        """The slot of a plain picture; a step that makes it of lanes is added if there is none."""
        if node not in self.plain:
            own = self.plan.out[node]
            lanes, slot = self.plan.lanes[own], self.laid[own]
            numbers = [REARRANGE, slot, self._constant(to_plain(lanes)), 1, *_list(lanes.picture)]
            self.plain[node] = self._add(numbers, [slot], leaves=node in self.leaving)
        return self.plain[node]

    def _result(self, node: fx.Node) -> int:
        if self.as_lanes and node in self.plan.out:
            return self.laid[self.plan.out[node]]
        return self._plain(node)


def steps_by_lanes(graph: fx.GraphModule, *, alone: bool = False) -> dict[Any, Step]:
    """The operators of a part that work on lanes, by node: those that can, and have a neighbour that does.

    Args:
        alone: also those without such a neighbour, for measuring.
    """
    found: dict[Any, Step] = {}
    for node in graph.graph.nodes:
        window = _window(graph, node)
        if window is not None:
            source, *residual = [each for each in node.args if isinstance(each, fx.Node)]
            layer = None if node.target == MAX_POOLING else graph.get_submodule(str(node.target))
            found[node] = Step(window, source, residual[0] if residual else None, not isinstance(layer, SparseConv2d))
    while unfit := [node for node in found if not _fits(graph, node, found, alone=alone)]:
        for node in unfit:
            del found[node]
    for node in graph.graph.nodes:
        if node.target == AVERAGING and node.args[0] in found:
            found[node] = Step(None, node.args[0])
    return found


def _fits(graph: fx.GraphModule, node: fx.Node, steps: dict[Any, Step], *, alone: bool) -> bool:
    """Whether an operator should work on lanes, if those of `steps` do."""
    if node.target == MAX_POOLING:  # which takes the zeros around pictures for pixels: they must not be larger than any
        source: Any = node.args[0]
        return source in steps and (source.target == MAX_POOLING or _low(graph, source) >= 0)
    return alone or any(other in steps for other in (*node.all_input_nodes, *node.users))


def _low(graph: fx.GraphModule, node: fx.Node) -> float:
    layer: Any = graph.get_submodule(str(node.target))
    return float(layer.options[-2])


def _window(graph: fx.GraphModule, node: fx.Node) -> Window | None:
    """The window of a convolution or pooling whose layer and shapes are for lanes, else None."""
    layer: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if node.target == MAX_POOLING:
        options: Any = [None, *node.args[1:4], (1, 1)]
    elif isinstance(layer, SparseConv2d) and layer.lanes:
        options = layer.options[1:]
    elif isinstance(layer, Depthwise) and layer.lanes:
        options = [None, cast(Any, layer).weight.shape[2:], *layer.options]
    else:
        return None
    values = [each.meta.get("val") for each in (node.args[0], node) if isinstance(each, fx.Node)]
    shapes: list[Any] = [tuple(value.shape[2:]) for value in values if isinstance(value, Tensor) and value.dim() == 4]
    if len(shapes) != 2 or not all(isinstance(size, int) and size > 0 for shape in shapes for size in shape):
        return None
    return window_of(*shapes, *options[1:5])


def window_of(shape: Any, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Window | None:
    """A window that lanes can compute, or None (see `Window.of`); large pictures are beyond columns of 16 bits."""
    if shape[0] * shape[1] > 4096 * torch.ops.nmfx.vector_length():
        return None
    return Window.of(tuple(shape), tuple(out), tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))


def _alone(node: fx.Node) -> bool:
    """Whether a residual is made in this part and read by this node alone, which may then write where it is."""
    inputs = node.all_input_nodes  # only one if the residual is the input itself
    return len(inputs) > 1 and inputs[1].op != "placeholder" and list(inputs[1].users) == [node]


def _list(numbers: Iterable[int]) -> list[int]:
    """The numbers with their count before them."""
    return [len(found := list(numbers)), *found]


def _lists(several: Iterable[Any]) -> list[int]:
    return [number for numbers in several for number in _list(numbers)]


def _real(number: float) -> int:
    """A double as the integer of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
