"""What nodes of an exported graph say: arguments by name, constants, and what the kernel takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from nmfx.runtime.checks import LONGEST, WIDEST_STEP


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    named = {a.name: a.default_value for a in schema.arguments}
    named |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    return named | dict(node.kwargs)


def pair(numbers: Any) -> tuple[int, ...]:
    """Numbers for height and width: one stands for both; an empty list stays empty."""
    several = list(numbers) if isinstance(numbers, list | tuple) else [numbers]
    return tuple((several * 2)[:2])


def is_float(value: Any) -> bool:
    """Whether a value is of the kind that sites read and give: a strided float32 tensor."""
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.layout == torch.strided


def fits_kernel(kernel: Any, stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether the kernel takes such a window (`nmfx.runtime.checks`); what it does not take stays PyTorch's."""
    steps = all(1 <= step <= WIDEST_STEP for step in stride)
    return steps and all(0 <= size <= LONGEST for size in (*kernel, *padding, *dilation))


def parameter_name(node: fx.Node) -> str:
    """The name of the parameter that a weight comes from."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def constant(graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Tensor | None]) -> Tensor | None:
    """The value of a node that depends on parameters only, such as a standardised weight."""
    if node not in known:
        known[node] = None
        if node.op == "get_attr":
            value = graph
            for part in str(node.target).split("."):
                value = getattr(value, part)
            known[node] = value.detach() if isinstance(value, Tensor) else None
        elif node.op == "call_function" and node.all_input_nodes:
            values = {each: constant(graph, each, known) for each in node.all_input_nodes}
            if all(isinstance(value, Tensor | tuple) for value in values.values()):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                with torch.no_grad():
                    known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]
