"""Sites of an exported graph, each with all that can be fused into it, as one node."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmfx.runtime.layers import Fused
from nmfx.runtime.lowering.nodes import arguments, constant, fits_kernel, is_float, pair, parameter_name
from nmfx.runtime.lowering.replacement import replace

aten = torch.ops.aten
CONV, LINEAR = aten.conv2d.default, aten.linear.default
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
CLAMPS: dict[Any, Callable[..., tuple[float, float]]] = {
    aten.relu.default: lambda: (0.0, math.inf),
    aten.hardtanh.default: lambda low=-1.0, high=1.0: (float(low), float(high)),
    aten.relu6.default: lambda: (0.0, 6.0),
    aten.clamp.default: lambda low=None, high=None: (-math.inf if low is None else low, math.inf if high is None else high),
}
Sites = list[tuple[fx.Node, Fused]]  # with the nodes of a lowered graph that call them


def lower(graph: fx.GraphModule) -> Sites:
    """Fuse in place: the nodes that compute sites, each a call of a module that is still to be chosen, and what it computes."""
    found: Sites = []
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
        replace(graph, node)
        if node.target == aten.view.default:  # layers give plain pictures where the model's may be channels last
            node.target = aten.reshape.default
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return found


def _padded(node: fx.Node) -> tuple[int, int, int, int] | None:
    """Zeros that a node puts around pictures for its only user: left, right, top, bottom."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default) or len(node.users) != 1:
        return None
    named = arguments(node)
    sides = named["pad"]
    zeros = named.get("mode", "constant") == "constant" and not named["value"]
    if not zeros or len(sides) != 4 or any(not isinstance(side, int) or side < 0 for side in sides):
        return None
    return tuple(sides)  # type: ignore[return-value]


def _fuse(
    graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Tensor | None]
) -> tuple[fx.Node, tuple[fx.Node, ...], Fused] | None:
    """The last node that a site takes in, its inputs, and what it computes; None when its weight is no constant."""
    named = arguments(node)
    if not is_float(node.meta.get("val")) or not is_float(named["input"].meta.get("val")):
        return None
    if node.meta["val"].dim() != (4 if node.target == CONV else max(2, node.meta["val"].dim())):  # a picture without a batch
        return None
    weight = constant(graph, named["weight"], known)
    bias = constant(graph, named["bias"], known) if named["bias"] is not None else None
    if weight is None or weight.dtype != torch.float32 or (named["bias"] is not None and bias is None):
        return None
    geometry: tuple[tuple[int, ...], ...] = ()
    last, inputs = node, [named["input"]]
    if node.target == CONV:
        stride, padding, dilation = (pair(named[name]) for name in ("stride", "padding", "dilation"))
        if (sides := _padded(inputs[0])) is not None:
            left, right, top, bottom = sides
            (ph, pw), inputs = padding, [inputs[0].args[0]]
            padding = (ph + top, pw + left, ph + bottom, pw + right)
            padding = padding[:2] if padding[:2] == padding[2:] else padding
        geometry = (stride, padding, dilation)
        if not fits_kernel(tuple(weight.shape[2:]), *geometry):
            return None
    if not weight.numel() or (bias is not None and bias.dtype != torch.float32):
        return None
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
        if len(others) == 1 and isinstance(others[0], fx.Node) and _alike(others[0], last):
            inputs, last = [*inputs, others[0]], after
            after = _only_user(last)
    if (
        after is not None
        and after.target in CLAMPS
        and not after.kwargs
        and all(not isinstance(a, fx.Node) for a in after.args[1:])
    ):
        limits = CLAMPS[after.target](*after.args[1:])
        if limits[0] <= limits[1]:  # not NaN, nor the wrong way round: PyTorch says what those give
            (low, high), last = limits, after
    name = parameter_name(named["weight"])
    return last, tuple(inputs), Fused(name, weight, bias, geometry, named.get("groups", 1), len(inputs) == 2, low, high)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes give float32 of one shape."""
    values = [node.meta.get("val") for node in (one, other)]
    return all(map(is_float, values)) and len({tuple(map(str, value.shape)) for value in values if value is not None}) == 1


def _fold(
    graph: fx.GraphModule, norm: fx.Node, weight: Tensor, bias: Tensor | None, known: dict[fx.Node, Tensor | None]
) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a convolution with the batch norm after it."""
    _, gamma, beta, mean, var, _, eps = norm.args
    found = [None if one is None else constant(graph, one, known) for one in (gamma, beta, mean, var)]  # type: ignore[arg-type]
    if any(one is not None and value is None for one, value in zip((gamma, beta, mean, var), found, strict=True)):
        return None
    gamma_, beta_, mean_, var_ = found
    assert mean_ is not None
    assert var_ is not None
    scale = (var_.double() + float(eps)).rsqrt() * (1.0 if gamma_ is None else gamma_.double())  # type: ignore[arg-type]
    shift = (0.0 if bias is None else bias.double()) - mean_.double()
    folded = weight.double() * scale.reshape(-1, 1, 1, 1)
    return folded.to(weight.dtype), (shift * scale + (0.0 if beta_ is None else beta_.double())).to(weight.dtype)
