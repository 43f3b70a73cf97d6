"""What a chain tells the kernel: its operators as numbers and constants, and where lanes are used, how pictures get there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from nmfx.runtime.calls import FLATTENING, Call, call_of, steps_by_lanes
from nmfx.runtime.kernel.library import NativeProgram, loaded
from nmfx.runtime.layout.lanes import Lanes, between, from_plain, sources, to_plain
from nmfx.runtime.layout.packed import pack_for_lanes, unpack
from nmfx.runtime.layout.plan import Copy, Plan, lay_out
from nmfx.runtime.layout.tiles import Tile
from nmfx.runtime.operators import OPERATORS, Operator, bits_of
from nmfx.runtime.planes import PlanesWriter


@dataclass
class _Written:
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
        self.as_lanes = as_lanes
        self.constants: list[Tensor] = []
        self.steps: list[_Written] = []
        self.inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.results = next(node for node in graph.graph.nodes if node.op == "output").all_input_nodes
        self.plain: dict[fx.Node, int] = {node: place for place, node in enumerate(self.inputs)}
        self.laid: dict[Copy, int] = {}
        self.packed: dict[tuple[int, ...], list[int]] = {}  # weights by lanes: the numbers of a convolution's arguments
        self.given: dict[fx.Node, Copy] = {}
        self.leaving = set(self.results)
        for node in self.results:
            while node.target in FLATTENING:  # which shares the memory of what it flattens
                node = node.all_input_nodes[0]
                self.leaving.add(node)
        self.by_lanes = steps_by_lanes(graph, alone=as_lanes)
        self.plan = lay_out(self.by_lanes, loaded().vector_length, threads) if self.by_lanes else Plan()
        calls = {node: call for node in graph.graph.nodes if (call := call_of(graph, node))}
        self.by_planes = PlanesWriter(self, {node: call for node, call in calls.items() if call.operator.planes})
        for node in graph.graph.nodes:
            if node.op not in ("placeholder", "output"):
                call = calls[node]
                if call.operator.planes:
                    self.by_planes.write(node)
                elif node in self.by_lanes:
                    self._write_by_lanes(node, call)
                else:
                    over = node not in self.leaving and _alone(node)
                    arguments = [self._plain(each) if isinstance(each, fx.Node) else each for each in call.arguments]
                    self.plain[node] = self._add(call.operator, arguments, over=over, leaves=node in self.leaving)
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

    def native(self) -> NativeProgram:
        """The program as the kernel holds it."""
        return NativeProgram(self.numbers(), self.constants, len(self.results))

    def _sizes(self, node: fx.Node) -> list[int]:
        """Sizes of an input, -1 for the batch and what is not fixed; empty where lanes stand in for it or nothing is known."""
        value = node.meta.get("val")
        if node in self.given or not isinstance(value, Tensor):
            return []
        return [-1 if dim == 0 or not isinstance(size, int) else size for dim, size in enumerate(value.shape)]

    def stand_ins(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        """Inputs as lanes in the place of those that the program reads so, for measuring."""
        found = []
        for node, one in zip(self.inputs, inputs, strict=True):
            if node in self.given:
                copy = self.given[node]
                lanes, planes = self.plan.lanes[copy], max(1, len(copy.phases))
                one = torch.full((lanes.strips, one.shape[0], one.shape[1] * planes, lanes.vectors, lanes.size), 0.5)
            found.append(one)
        return found

    def _add(self, operator: Operator, arguments: Sequence[Any], *, over: bool = False, leaves: bool = False) -> int:
        """The slot of a step with arguments as the operator's schema has them: slots for tensors that the graph makes.

        Args:
            over: the output may be written where the residual is.
            leaves: the result leaves the chain.
        """
        numbers = operator.encode(arguments, lambda value: value if type(value) is int else self._constant(value), over=over)
        kinds = zip(operator.arguments.values(), arguments, strict=True)
        reads = [value for kind, value in kinds if kind.startswith("Tensor") and type(value) is int]
        return self._append(numbers, reads, leaves=leaves)

    def _append(self, numbers: list[int], reads: list[int], *, leaves: bool = False) -> int:
        self.steps.append(_Written(numbers, reads, leaves))
        return len(self.inputs) + len(self.steps) - 1

    def _constant(self, value: Tensor | None) -> int:
        """A number for a constant that is no slot's; -1 for none."""
        if value is None:
            return -1
        self.constants.append(value)
        return -1 - len(self.constants)

    # --- by lanes: arguments as the C++ operator has them (kernel/lanes_operators.h, read by kernel/program.h)

    def _write_by_lanes(self, node: fx.Node, call: Call) -> None:
        plan, named, window, source = self.plan, call.named, self.by_lanes[node].window, self.plan.source[node]
        operator, x, read = OPERATORS[call.operator.lanes], self._laid(source), plan.lanes[source]
        picture = [x, *read.numbers]
        if window is None:
            numbers = [operator.code, *picture, self._constant(read.mask()), read.picture[0] * read.picture[1]]
            self.plain[node] = self._append(numbers, [x], leaves=node in self.leaving)
            return
        out, residual = plan.out[node], plan.residual.get(node)
        lanes, reads, after = plan.lanes[out], [x], [0]
        over = False
        if residual is not None:
            reads.append(self._laid(residual))
            after = [1, reads[1], *plan.lanes[residual].numbers]
            over = residual.node in self.by_lanes and _alone(node) and plan.lanes[residual] == lanes
        mask = self._constant(lanes.mask() if out in plan.edged else None)
        after += [mask, bits_of(named.get("low", -math.inf)), bits_of(named.get("high", math.inf)), int(over)]
        steps = [plan.down[node], plan.step(node, window), *_list(plan.late(node, window))]
        offsets = plan.offsets(node, window)
        own = self._by_channel(node, named, offsets) if self.by_lanes[node].by_channel else self._conv(node, call, offsets)
        numbers = [operator.code, *picture, *own, *steps, *lanes.numbers, *after]
        self.laid[out] = self._append(numbers, reads, leaves=self.as_lanes and node in self.leaving)

    def _by_channel(self, node: fx.Node, named: dict[str, Any], offsets: list[int]) -> list[int]:
        """Halo, offsets, weight and planes of an operator that computes channels by themselves."""
        local, halo = self.plan.local.get(node), [0, -1, -1]
        if local is not None:
            read = self.plan.lanes[self.plan.source[node]]
            halo = [1, *local.numbers, self._constant(read.mask()), self._constant(sources(local, read))]
        constants = (torch.tensor(offsets, dtype=torch.int32), named.get("weight"), named.get("bias"))
        return [*halo, *map(self._constant, constants), self.plan.planes(node)]

    def _conv(self, node: fx.Node, call: Call, offsets: list[int]) -> list[int]:
        """Where the weights of a convolution are, and their sizes."""
        named, tile = call.named, cast(Tile, call.lanes)
        groups, out = named["groups"], named["out_channels"]
        shape = (out, named["width"] // math.prod(named["kernel"]), *named["kernel"])
        pitch = self.plan.planes(node) * self.plan.lanes[self.plan.source[node]].vectors
        key = (id(named["values"]), pitch, *offsets)
        if key not in self.packed:  # a layer that is called several times is packed once
            weight = unpack(named["values"], named["columns"], named["pointers"], shape, groups, named["chunk"])
            packed, starts = pack_for_lanes(weight, groups, offsets, pitch, chunk=tile.chunk, zeros=tile.zeros)
            constants = (packed.values, packed.columns, packed.pointers, starts, named["bias"])
            channels = shape[1] * groups * self.plan.planes(node)
            sizes = [channels, out, packed.width, groups, packed.chunk, tile.vectors]
            self.packed[key] = [*map(self._constant, constants), *sizes]
        return self.packed[key]

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
            self.laid[copy] = self._add(OPERATORS["rearrange"], (slot, index, (lanes.vectors, lanes.size), False))
        return self.laid[copy]

    def _plain(self, node: fx.Node) -> int:
        """The slot of a plain picture; a step that makes it of lanes is added if there is none."""
        if node not in self.plain and (slot := self.by_planes.plain(node)) is not None:
            self.plain[node] = slot
        if node not in self.plain:
            own = self.plan.out[node]
            lanes: Lanes = self.plan.lanes[own]
            arguments = (self.laid[own], to_plain(lanes), lanes.picture, True)
            self.plain[node] = self._add(OPERATORS["rearrange"], arguments, leaves=node in self.leaving)
        return self.plain[node]

    def _result(self, node: fx.Node) -> int:
        if self.as_lanes and node in self.plan.out:
            return self.laid[self.plan.out[node]]
        return self._plain(node)


def _alone(node: fx.Node) -> bool:
    """Whether a residual is made in this part and read by this node alone, which may then write where it is."""
    inputs = node.all_input_nodes  # only one if the residual is the input itself
    return len(inputs) > 1 and inputs[1].op != "placeholder" and list(inputs[1].users) == [node]


def _list(numbers: Iterable[int]) -> list[int]:
    """The numbers with their count before them."""
    return [len(found := list(numbers)), *found]


def _lists(several: Iterable[Any]) -> list[int]:
    return [number for numbers in several for number in _list(numbers)]
