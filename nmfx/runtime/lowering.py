"""A model as a graph of PyTorch's operators in which every site is one node, with all that can be fused into it."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmfx.errors import ModelError
from nmfx.runtime.layers import Fused

aten = torch.ops.aten
CONV, LINEAR = aten.conv2d.default, aten.linear.default
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
MAX_POOL, MEAN, ADAPTIVE = aten.max_pool2d.default, aten.mean.dim, aten.adaptive_avg_pool2d.default
CLAMPS: dict[Any, Callable[..., tuple[float, float]]] = {
    aten.relu.default: lambda: (0.0, math.inf),
    aten.hardtanh.default: lambda low=-1.0, high=1.0: (float(low), float(high)),
    aten.relu6.default: lambda: (0.0, 6.0),
    aten.clamp.default: lambda low=None, high=None: (-math.inf if low is None else low, math.inf if high is None else high),
}


def export(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, bool]:
    """The graph of a model in eval mode, and whether it takes any batch size (or only that of `example`).

    Raises:
        ModelError: torch.export cannot follow the model.
    """
    errors: list[str] = []
    for dynamic in (True, False):
        shown = example.expand(2, *example.shape[1:]) if dynamic and len(example) == 1 else example
        shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(model, (shown,), strict=False, dynamic_shapes=shapes).run_decompositions({})
                graph = program.module()
        except Exception as error:  # whatever a model's code and the exporter raise
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        assert isinstance(graph, fx.GraphModule)
        for node in list(graph.graph.nodes):
            if node.op == "call_module" and node.target == "_guards_fn":  # of the example's shape; the runtime has its own
                graph.graph.erase_node(node)
        first = next(node for node in graph.graph.nodes if node.op == "placeholder")
        free = isinstance(first.meta["val"].shape[0], torch.SymInt)
        if free or not dynamic:
            return fx.GraphModule(graph, graph.graph), free  # a plain one: the exporter's refuses train() and eval()
    raise ModelError(f"{type(model).__name__} cannot be compiled: torch.export does not follow it ({errors[-1]})")


def lower(graph: fx.GraphModule) -> list[tuple[fx.Node, Fused]]:
    """Fuse in place: the nodes that compute sites, each a call of a module that is still to be chosen, and what it computes."""
    found: list[tuple[fx.Node, Fused]] = []
    known: dict[fx.Node, Tensor | None] = {}
    for node in list(graph.graph.nodes):
        if node.target not in (CONV, LINEAR) or node.op != "call_function":
            continue
        one = _fuse(graph, node, known)
        if one is not None:
            last, inputs, fused = one
            name = f"site{len(found)}"
            with graph.graph.inserting_after(last):
                call = graph.graph.create_node("call_module", name, inputs)
            call.meta = dict(last.meta)
            last.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)  # type: ignore[misc]
            graph.add_submodule(name, nn.Identity())
            found.append((call, fused))
    for node in list(graph.graph.nodes):
        _replace_pool(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return found


def _replace_pool(graph: fx.GraphModule, node: fx.Node) -> None:
    """Max pooling of the plain kind, and means of whole planes, by the kernel."""
    if node.target not in (MAX_POOL, MEAN, ADAPTIVE):
        return
    named = _arguments(node)
    source = named["self"]
    value = source.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4 or value.dtype != torch.float32:
        return
    pooled: tuple[Any, tuple[Any, ...]] = (torch.ops.nmfx.average.default, (source,))
    flat = False
    if node.target == MAX_POOL:
        kernel, stride, padding, dilation = (_pair(named[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
        if dilation != (1, 1) or named["ceil_mode"]:
            return
        pooled = (torch.ops.nmfx.max_pool2d.default, (source, kernel, stride or kernel, padding))
    elif node.target == MEAN:
        if sorted(dim % 4 for dim in named["dim"] or ()) != [2, 3] or named["dtype"] is not None:
            return
        flat = not named["keepdim"]
    elif _pair(named["output_size"]) != (1, 1):
        return
    with graph.graph.inserting_after(node):
        new = graph.graph.call_function(*pooled)
    new.meta = dict(node.meta)
    if flat:
        with graph.graph.inserting_after(new):
            flattened = graph.graph.call_function(aten.flatten.using_ints, (new, 1))
        flattened.meta = dict(node.meta)
        new.meta = {"val": node.meta["val"][:, :, None, None]}
        new = flattened
    node.replace_all_uses_with(new)


def _padded(node: fx.Node) -> tuple[int, int, int, int] | None:
    """Zeros that a node puts around pictures for its only user: left, right, top, bottom."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default) or len(node.users) != 1:
        return None
    named = _arguments(node)
    sides = named["pad"]
    zeros = named.get("mode", "constant") == "constant" and not named["value"]
    if not zeros or len(sides) != 4 or any(not isinstance(side, int) or side < 0 for side in sides):
        return None
    return tuple(sides)  # type: ignore[return-value]


def _pair(numbers: Any) -> tuple[int, ...]:
    """One number is for both; none is none."""
    several = list(numbers) if isinstance(numbers, list | tuple) else [numbers]
    return tuple((several * 2)[:2])


def _fuse(
    graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Tensor | None]
) -> tuple[fx.Node, tuple[fx.Node, ...], Fused] | None:
    """The last node that a site takes in, its inputs, and what it computes; None when its weight is no constant."""
    arguments = _arguments(node)
    weight = _constant(graph, arguments["weight"], known)
    bias = _constant(graph, arguments["bias"], known) if arguments["bias"] is not None else None
    if weight is None or weight.dtype != torch.float32 or (arguments["bias"] is not None and bias is None):
        return None
    geometry: tuple[tuple[int, ...], ...] = ()
    last, inputs = node, [arguments["input"]]
    if node.target == CONV:
        stride, padding, dilation = (_pair(arguments[name]) for name in ("stride", "padding", "dilation"))
        if (sides := _padded(inputs[0])) is not None:
            left, right, top, bottom = sides
            (ph, pw), inputs = padding, [inputs[0].args[0]]
            padding = (ph + top, pw + left, ph + bottom, pw + right)
            padding = padding[:2] if padding[:2] == padding[2:] else padding
        geometry = (stride, padding, dilation)
    low, high = -math.inf, math.inf
    after = _only_user(last)
    if geometry and after is not None and after.target == BATCH_NORM:
        folded = _fold(graph, after, weight, bias, known)
        item = _only_user(after)
        if folded is not None and item is not None and item.target is operator.getitem and item.args[1] == 0:
            (weight, bias), last = folded, item
            after = _only_user(last)
    if geometry and after is not None and after.target == aten.add.Tensor and not after.kwargs:
        others = [arg for arg in after.args if arg is not last]
        if len(others) == 1 and isinstance(others[0], fx.Node) and _shape(others[0]) == _shape(last):
            inputs, last = [*inputs, others[0]], after
            after = _only_user(last)
    if (
        after is not None
        and after.target in CLAMPS
        and not after.kwargs
        and all(not isinstance(a, fx.Node) for a in after.args[1:])
    ):
        low, high = CLAMPS[after.target](*after.args[1:])
        last = after
    name = _name(arguments["weight"])
    return last, tuple(inputs), Fused(name, weight, bias, geometry, arguments.get("groups", 1), len(inputs) == 2, low, high)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    named = {a.name: a.default_value for a in schema.arguments}
    named |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    return named | dict(node.kwargs)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else None


def _name(node: fx.Node) -> str:
    """Of the parameter a weight comes from."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _constant(graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Tensor | None]) -> Tensor | None:
    """The value of a node that depends on parameters only, such as a standardised weight."""
    if node not in known:
        known[node] = None
        if node.op == "get_attr":
            value = graph
            for part in str(node.target).split("."):
                value = getattr(value, part)
            known[node] = value.detach() if isinstance(value, Tensor) else None
        elif node.op == "call_function" and node.all_input_nodes:
            values = {each: _constant(graph, each, known) for each in node.all_input_nodes}
            if all(isinstance(value, Tensor | tuple) for value in values.values()):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                with torch.no_grad():
                    known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]


def _fold(
    graph: fx.GraphModule, norm: fx.Node, weight: Tensor, bias: Tensor | None, known: dict[fx.Node, Tensor | None]
) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a convolution with the batch norm after it."""
    _, gamma, beta, mean, var, _, eps = norm.args
    found = [None if one is None else _constant(graph, one, known) for one in (gamma, beta, mean, var)]  # type: ignore[arg-type]
    if any(one is not None and value is None for one, value in zip((gamma, beta, mean, var), found, strict=True)):
        return None
    gamma_, beta_, mean_, var_ = found
    assert mean_ is not None
    assert var_ is not None
    scale = (var_.double() + float(eps)).rsqrt() * (1.0 if gamma_ is None else gamma_.double())  # type: ignore[arg-type]
    shift = (0.0 if bias is None else bias.double()) - mean_.double()
    folded = weight.double() * scale.reshape(-1, 1, 1, 1)
    return folded.to(weight.dtype), (shift * scale + (0.0 if beta_ is None else beta_.double())).to(weight.dtype)
