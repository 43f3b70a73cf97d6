"""A model as a graph of PyTorch's operators in which every site is one node, with all that can be fused into it."""

from __future__ import annotations

import math
import operator
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmfx.errors import ModelError
from nmfx.runtime.building import quiet
from nmfx.runtime.checks import LONGEST, WIDEST_STEP
from nmfx.runtime.layers import Fused
from nmfx.runtime.samples import samples_apart

EXPORTING = threading.RLock()  # torch.export, and copies of what it made, are for one thread at a time
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


@dataclass(frozen=True, eq=False)
class Domain:
    """The inputs for which a graph gives what the model does: what torch.export assumed.

    Attributes:
        shape: of the example.
        dtype: of the example.
        batches: the least and the largest batch; None where there is no largest.
        guards: refuses other batches, with an AssertionError.
        apart: whether samples are shown not to see each other (`nmfx.runtime.samples`).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    batches: tuple[int, int | None]
    guards: nn.Module | None = None
    apart: bool = False

    def takes(self, x: Tensor) -> bool:
        """Whether the graph is for such an input; its kind is the example's."""
        least, most = self.batches
        if tuple(x.shape[1:]) != self.shape[1:] or len(x) < least or (most is not None and len(x) > most):
            return False
        if self.guards is None or len(x) == self.shape[0]:
            return True
        try:
            self.guards(x)
        except AssertionError:
            return False
        return True


def export(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, Domain]:
    """The graph of a model in eval mode, and for which inputs it is.

    It is for all batches from 2 on as far as torch.export can keep them free and says what it assumed of them; for the
    example's alone where it cannot. Batches of 0 and 1 are taken as they are: models may do something else with them.

    Raises:
        ModelError: torch.export cannot follow the model.
    """
    with EXPORTING, quiet("torch.fx.experimental.symbolic_shapes"), quiet("torch._subclasses.fake_tensor"):
        return _export(model, example)


def _export(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, Domain]:
    errors: list[str] = []
    for dynamic in (True, False) if len(example) > 1 else (False,):
        shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(model, (example,), strict=False, dynamic_shapes=shapes).run_decompositions({})
                graph = program.module()
            if written := list(program.graph_signature.buffers_to_mutate.values()):
                raise ModelError(f"its forward pass writes to {written[0]}, and would have another state in every lowering")
        except Exception as error:  # whatever a model's code and the exporter raise
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        assert isinstance(graph, fx.GraphModule)
        guards = getattr(graph, "_guards_fn", None)
        for node in list(graph.graph.nodes):
            if node.op == "call_module" and node.target == "_guards_fn":
                graph.graph.erase_node(node)
        first = next(node for node in graph.graph.nodes if node.op == "placeholder")
        batches = _batches(program, first.meta["val"].shape[0]) if guards is not None else None
        if dynamic and batches is None:
            continue
        kind = (tuple(example.shape), example.dtype)
        plain = fx.GraphModule(graph, graph.graph)  # the exporter's refuses train() and eval()
        if not dynamic or batches is None:
            return plain, Domain(*kind, (len(example), len(example)))
        return plain, Domain(*kind, batches, guards, samples_apart(plain))
    raise ModelError(f"{type(model).__name__} cannot be compiled: torch.export does not follow it ({errors[-1]})")


def _batches(program: torch.export.ExportedProgram, size: Any) -> tuple[int, int | None] | None:
    """The range of a batch size that torch.export kept free; None where it did not."""
    if not isinstance(size, torch.SymInt):
        return None
    span = program.range_constraints.get(size.node.expr)
    if span is None:  # of an expression of something else
        return None
    return max(2, int(span.lower)), int(span.upper) if str(span.upper).isdecimal() else None


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
        if node.target == aten.view.default:  # layers give plain pictures where the model's may be channels last
            node.target = aten.reshape.default
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
    if not _is_float(value) or value.dim() != 4 or any(isinstance(size, int) and not size for size in value.shape[1:]):
        return
    pooled: tuple[Any, tuple[Any, ...]] = (torch.ops.nmfx.average.default, (source,))
    flat = False
    if node.target == MAX_POOL:
        kernel, stride, padding, dilation = (_pair(named[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
        if dilation != (1, 1) or named["ceil_mode"] or not _fits_kernel(kernel, stride or kernel, padding, dilation):
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
    """Numbers for height and width: one stands for both; an empty list stays empty."""
    several = list(numbers) if isinstance(numbers, list | tuple) else [numbers]
    return tuple((several * 2)[:2])


def _fuse(
    graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Tensor | None]
) -> tuple[fx.Node, tuple[fx.Node, ...], Fused] | None:
    """The last node that a site takes in, its inputs, and what it computes; None when its weight is no constant."""
    arguments = _arguments(node)
    if not _is_float(node.meta.get("val")) or not _is_float(arguments["input"].meta.get("val")):
        return None
    if node.meta["val"].dim() != (4 if node.target == CONV else max(2, node.meta["val"].dim())):  # a picture without a batch
        return None
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
        if not _fits_kernel(tuple(weight.shape[2:]), *geometry):
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


def _is_float(value: Any) -> bool:
    """Whether a value is of the kind that sites read and give: a strided float32 tensor."""
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.layout == torch.strided


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes give float32 of one shape."""
    values = [node.meta.get("val") for node in (one, other)]
    return all(map(_is_float, values)) and len({tuple(map(str, value.shape)) for value in values if value is not None}) == 1


def _fits_kernel(kernel: Any, stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether the kernel takes such a window (`nmfx.runtime.checks`); what it does not take stays PyTorch's."""
    steps = all(1 <= step <= WIDEST_STEP for step in stride)
    return steps and all(0 <= size <= LONGEST for size in (*kernel, *padding, *dilation))


def _name(node: fx.Node) -> str:
    """The name of the parameter that a weight comes from."""
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
