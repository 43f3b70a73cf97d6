"""Whether the samples of a batch see each other: a batch may be cut into passes only where they are shown not to.

Every node that depends on the input must keep the batch as its first dimension, sample by sample. What is not known here to do
that counts as seeing others.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
Batched = set[fx.Node]  # nodes whose first dimension is the batch, sample by sample
Rule = Callable[[fx.Node, Batched], bool]


def samples_apart(graph: fx.GraphModule) -> bool:
    """Whether each sample's outputs depend on that sample alone, by the graph of an export whose batch size is free."""
    batched, dependent = Batched(), set[fx.Node]()
    moved: dict[fx.Node, int] = {}  # nodes that have the batch elsewhere, and where
    batch = ""
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            batch = str(node.meta["val"].shape[0])
            batched.add(node)
            dependent.add(node)
        elif node.op == "output":
            leaves = [leaf for leaf in tree_leaves(node.args) if leaf is not None]
            return all(isinstance(leaf, fx.Node) and leaf in batched and _batch_first(leaf, batch) for leaf in leaves)
        elif any(each in dependent for each in node.all_input_nodes):
            dependent.add(node)
            place = _moved(node, batched, moved)
            if place:
                moved[node] = place
            elif place == 0:
                batched.add(node)
            elif not _is_size(node):
                if not _keeps(node, batched, dependent, batch):
                    return False
                batched.add(node)
    return False


def _keeps(node: fx.Node, batched: Batched, dependent: set[fx.Node], batch: str) -> bool:
    """Whether a node has the batch first again, sample by sample."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem and node.args[0] in batched and _batch_first(node, batch)
    sized = node.target in SIZED
    for each in node.all_input_nodes:
        if each in dependent and each not in batched and not (sized and _is_size(each)):
            return False  # how many samples there are, as a number
    if node.target not in RULES and torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    rule = RULES.get(node.target, _pointwise if torch.Tag.pointwise in node.target.tags else None)
    several = isinstance(node.meta.get("val"), tuple | list)  # of which each is looked at when it is taken
    return rule is not None and (several or _batch_first(node, batch)) and rule(node, batched)


def _moved(node: fx.Node, batched: Batched, moved: dict[fx.Node, int]) -> int | None:
    """Where the batch goes when dimensions are permuted, and when one of them is taken apart after that, as queries, keys and
    values are; None for other nodes.
    """
    source: Any = node.args[0] if node.args else None
    if node.target is operator.getitem:
        return moved.get(source)
    if node.target == aten.permute.default and (source in batched or source in moved):
        dims: Any = node.args[1]
        return [dim % len(dims) for dim in dims].index(moved.get(source, 0))
    if node.target in (aten.unbind.int, aten.select.int) and source in moved:
        along = _dims(node, 1)
        return None if along is None or along[0] == moved[source] else moved[source] - (along[0] < moved[source])
    return None


def _batch_first(node: fx.Node, batch: str) -> bool:
    """Whether a tensor has the batch as the first of its sizes, and no other size depends on it."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dim():
        return False
    return str(value.shape[0]) == batch and all(isinstance(size, int) for size in value.shape[1:])


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a number, or only looks at a tensor's kind."""
    return isinstance(node.meta.get("val"), int | torch.SymInt) or node.target == aten._assert_tensor_metadata.default


def _rank(node: Any) -> int:
    return int(node.meta["val"].dim())


def _dims(node: fx.Node, place: int, name: str = "dim") -> list[int] | None:
    """Dimensions that an operator names, counted from the first; None where it names none."""
    value: Any = node.args[place] if len(node.args) > place else node.kwargs.get(name)
    if value is None:
        schema: Any = node.target._schema.arguments[place]  # type: ignore[union-attr]
        value = schema.default_value
    several = value if isinstance(value, list | tuple) else [value]
    if not several or not all(isinstance(dim, int) for dim in several):
        return None
    rank = _rank(node.args[0]) if isinstance(node.args[0], fx.Node) else _rank(node)
    return [dim % rank for dim in several]


def _aligned(node: fx.Node, batched: Batched, rank: int) -> bool:
    """Whether tensors that meet dimension by dimension do so sample by sample."""
    for each in node.all_input_nodes:
        value = each.meta.get("val")
        if each in batched:
            if not isinstance(value, Tensor) or value.dim() != rank:
                return False
        elif isinstance(value, Tensor) and value.dim() >= rank and value.shape[value.dim() - rank] != 1:
            return False
    return True


def _pointwise(node: fx.Node, batched: Batched) -> bool:
    return isinstance(node.meta["val"], Tensor) and _aligned(node, batched, _rank(node))


def _only(node: fx.Node, batched: Batched) -> bool:
    """Whether the first argument has samples and the others are the model's own."""
    return node.args[0] in batched and not any(each in batched for each in node.all_input_nodes[1:])


def _pictures(node: fx.Node, batched: Batched) -> bool:
    return _only(node, batched) and _rank(node.args[0]) >= 3 and _rank(node) == _rank(node.args[0])


def _convolution(node: fx.Node, batched: Batched) -> bool:
    return _only(node, batched) and _rank(node.args[0]) == _rank(node.args[1])


def _along(place: int, name: str = "dim") -> Rule:
    """A rule for operators along dimensions that they name: none of these may be the first."""

    def rule(node: fx.Node, batched: Batched) -> bool:
        dims = _dims(node, place, name)
        return _only(node, batched) and dims is not None and 0 not in dims

    return rule


def _joined(node: fx.Node, batched: Batched) -> bool:
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    return all(each in batched for each in parts) and dim % _rank(node) != 0


def _normalised(node: fx.Node, batched: Batched) -> bool:
    shape: Any = node.args[1]
    return _only(node, batched) and len(shape) < _rank(node.args[0])


def _transposed(node: fx.Node, batched: Batched) -> bool:
    rank, dims = _rank(node), node.args[1:3]
    return _only(node, batched) and all(isinstance(dim, int) and dim % rank != 0 for dim in dims)


def _expanded(node: fx.Node, batched: Batched) -> bool:
    return _aligned(node, batched, _rank(node))


def _padded(node: fx.Node, batched: Batched) -> bool:
    sides: Any = node.args[1]
    return _only(node, batched) and len(sides) // 2 < _rank(node)


def _product(node: fx.Node, batched: Batched) -> bool:
    one, other = node.args[:2]
    if one in batched and other in batched:
        return _rank(one) == _rank(other) >= 3
    return one in batched and _rank(one) >= 2 and _rank(other) <= 2


def _attention(node: fx.Node, batched: Batched) -> bool:
    dropped = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    if dropped != 0.0:
        return False
    return all(each in batched for each in node.args[:3]) and _aligned(node, batched, _rank(node)) and _rank(node) >= 3


def _sliced(node: fx.Node, batched: Batched) -> bool:
    whole = len(node.args) < 3 or (node.args[2] in (None, 0) and tuple(node.args[3:]) in ((), (None,), (sys.maxsize,)))
    return _only(node, batched) and (whole or _along(1)(node, batched))


def _made(node: fx.Node, batched: Batched) -> bool:
    return not any(isinstance(each, fx.Node) for each in node.args[1:])


SIZED = {  # which may be told the batch size
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
    *(aten.full.default, aten.zeros.default, aten.ones.default),
}
RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _convolution),
    aten.linear.default: lambda node, batched: _only(node, batched) and _rank(node) >= 2,
    aten._native_batch_norm_legit_no_training.default: _only,
    aten.layer_norm.default: _normalised,
    aten.native_layer_norm.default: _normalised,
    aten.group_norm.default: _only,
    **dict.fromkeys((aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default), _pictures),
    **dict.fromkeys((aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec), _pictures),
    **dict.fromkeys((aten.pixel_shuffle.default, aten.pixel_unshuffle.default), _pictures),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default), _along(1)),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.var.correction), _along(1)),
    **dict.fromkeys((aten.select.int, aten.unbind.int, aten.squeeze.dim, aten.index_select.default), _along(1)),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.roll.default), _along(2)),
    **dict.fromkeys((aten.flip.default,), _along(1, "dims")),
    aten.linalg_vector_norm.default: _along(2),
    aten.slice.Tensor: _sliced,
    **dict.fromkeys((aten.cat.default, aten.stack.default), _joined),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints), _only),
    **dict.fromkeys((aten.squeeze.dims, aten.unsqueeze.default, aten.clone.default, aten.contiguous.default), _only),
    **dict.fromkeys((aten._to_copy.default, aten.to.dtype, aten.alias.default, aten.detach.default), _only),
    **dict.fromkeys((aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default, aten.relu6.default), _only),
    **dict.fromkeys((aten.gelu.default, aten.silu.default, aten.mish.default, aten.leaky_relu.default), _only),
    aten.dropout.default: lambda node, batched: _only(node, batched) and node.args[2] is False,
    aten.transpose.int: _transposed,
    aten.expand.default: _expanded,
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), _padded),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _product),
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys((aten.full.default, aten.zeros.default, aten.ones.default), _made),
}
