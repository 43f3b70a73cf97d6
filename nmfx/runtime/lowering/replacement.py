"""Operators of an exported graph, other than sites, that an operator of the kernel replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from nmfx.runtime.lowering.nodes import arguments, fits_kernel, is_float, pair

aten, kernel = torch.ops.aten, torch.ops.nmfx
Replacement = tuple[Any, ...]  # an operator of the kernel and its arguments


def _max_pool(named: dict[str, Any]) -> Replacement | None:
    size, stride, padding, dilation = (pair(named[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
    if dilation != (1, 1) or named["ceil_mode"] or not fits_kernel(size, stride or size, padding, dilation):
        return None
    return kernel.max_pool2d.default, named["self"], size, stride or size, padding


def _mean(named: dict[str, Any]) -> Replacement | None:
    planes = sorted(dim % 4 for dim in named["dim"] or ()) == [2, 3] and named["dtype"] is None
    return (kernel.average.default, named["self"]) if planes else None


def _adaptive(named: dict[str, Any]) -> Replacement | None:
    return (kernel.average.default, named["self"]) if pair(named["output_size"]) == (1, 1) else None


REPLACED: dict[Any, Callable[[dict[str, Any]], Replacement | None]] = {
    aten.max_pool2d.default: _max_pool,
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _adaptive,
}


def replace(graph: fx.GraphModule, node: fx.Node) -> None:
    """Put the kernel's operator in the place of a node that has one, if the node reads pictures that the kernel takes."""
    if node.target not in REPLACED:
        return
    named = arguments(node)
    value = named["self"].meta.get("val")
    if not is_float(value) or value.dim() != 4 or any(isinstance(size, int) and not size for size in value.shape[1:]):
        return
    found = REPLACED[node.target](named)
    if found is None:
        return
    with graph.graph.inserting_after(node):
        new = graph.graph.call_function(found[0], found[1:])
    new.meta = dict(node.meta)
    if not named.get("keepdim", True):
        with graph.graph.inserting_after(new):
            flattened = graph.graph.call_function(aten.flatten.using_ints, (new, 1))
        flattened.meta = dict(node.meta)
        new.meta = {"val": node.meta["val"][:, :, None, None]}
        new = flattened
    node.replace_all_uses_with(new)
