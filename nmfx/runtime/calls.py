"""What the nodes of a lowered graph call of the kernel, and which of them work on pictures as lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from nmfx.runtime.kernel.library import loaded
from nmfx.runtime.layers import KernelLayer
from nmfx.runtime.layout.lanes import Window
from nmfx.runtime.layout.plan import Step
from nmfx.runtime.layout.tiles import Tile
from nmfx.runtime.operators import OPERATORS, Operator

FLATTENING = (torch.ops.aten.view.default, torch.ops.aten.flatten.using_ints, torch.ops.aten.reshape.default)
CALLED = {getattr(torch.ops.nmfx, name).default: one for name, one in OPERATORS.items() if one.sizes}


@dataclass(frozen=True)
class Call:
    """An operator of the kernel as a node of a lowered graph calls it; `lanes` as its layer has it, true where it has none."""

    operator: Operator
    arguments: Sequence[Any]  # nodes for what the graph makes
    lanes: Tile | bool | None = True

    @property
    def named(self) -> dict[str, Any]:
        """The arguments by name."""
        return self.operator.named(self.arguments)


def call_of(graph: fx.GraphModule, node: fx.Node) -> Call | None:
    """What a node calls of the kernel; None where that is nothing."""
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        return (
            Call(OPERATORS[layer.operator], layer.arguments(*node.args), layer.lanes)
            if isinstance(layer, KernelLayer)
            else None
        )
    if node.target in FLATTENING:  # (batch, ...) to (batch, features)
        shapes = [each.meta["val"].shape for each in (node.args[0], node) if isinstance(each, fx.Node) and "val" in each.meta]
        fits = len(shapes) == 2 and len(shapes[1]) == 2 and len(shapes[0]) > 1 and str(shapes[0][0]) == str(shapes[1][0])
        return Call(OPERATORS["flatten"], node.args[:1]) if fits else None
    return Call(CALLED[node.target], node.args) if node.target in CALLED else None  # type: ignore[index]


def steps_by_lanes(graph: fx.GraphModule, *, alone: bool = False) -> dict[Any, Step]:
    """The operators of a part that work on lanes, by node: those that can, and have a neighbour that does.

    Args:
        alone: also those without such a neighbour, for measuring.
    """
    calls = {node: call for node in graph.graph.nodes if (call := call_of(graph, node)) and call.operator.lanes and call.lanes}
    found: dict[Any, Step] = {}
    for node, call in calls.items():
        window = _window(node, call.named)
        if window is not None:
            source, *residual = [each for each in node.args if isinstance(each, fx.Node)]
            by_channel = call.operator.lanes == "lanes_by_channel"
            found[node] = Step(window, source, residual[0] if residual else None, by_channel)

    def fits(node: fx.Node) -> bool:
        """Whether an operator should work on lanes, if those found do."""
        if calls[node].operator.name == "max_pool2d":  # which takes the zeros around pictures for pixels: none may be smaller
            source: Any = node.args[0]
            return source in found and calls[source].named.get("low", 0.0) >= 0  # pooled ones have been looked at
        return alone or any(other in found for other in (*node.all_input_nodes, *node.users))

    while unfit := [node for node in found if not fits(node)]:
        for node in unfit:
            del found[node]
    for node, call in calls.items():
        if call.operator.name == "average" and node.args[0] in found:
            found[node] = Step(None, node.args[0])
    return found


def _window(node: fx.Node, named: dict[str, Any]) -> Window | None:
    """The window of an operator that has one, if its shapes are for lanes, else None."""
    if "stride" not in named:
        return None
    values = [each.meta.get("val") for each in (node.args[0], node) if isinstance(each, fx.Node)]
    shapes: list[Any] = [tuple(value.shape[2:]) for value in values if isinstance(value, Tensor) and value.dim() == 4]
    if len(shapes) != 2 or not all(isinstance(size, int) and size > 0 for shape in shapes for size in shape):
        return None
    kernel = named["kernel"] if "kernel" in named else named["weight"].shape[2:]
    return window_of(shapes[0], shapes[1], kernel, named["stride"], named["padding"], named.get("dilation", (1, 1)))


def window_of(shape: Any, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Window | None:
    """A window that lanes can compute (see `Window.of`, which takes tuples).

    Args:
        shape, out: height and width of the picture that is read, and of the one that is made.
        kernel, stride, padding, dilation: of the operator.

    Returns:
        The window; None where lanes cannot compute it, as for large pictures, which are beyond columns of 16 bits.
    """
    if shape[0] * shape[1] > 4096 * loaded().vector_length:
        return None
    return Window.of(tuple(shape), tuple(out), tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
