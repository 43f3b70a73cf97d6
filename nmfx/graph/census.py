"""Which parameters are used as weights: every one is followed through a forward pass into matmul-like operations.

A dispatch mode sees each aten operation of one eval and one train forward. Storage identity says which parameter an operand
is a view of; an operation on parameters alone (weight standardisation, a cast, a concatenation of projections) passes its
origin on. The stride of the contracted dimension gives the group axis. No module type is asked for anything, so functional
calls, attention projections, LSTMs and weights inside fx leaves are found alike.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmfx.errors import TraceError
from nmfx.graph.masked import throw_away_copy
from nmfx.graph.site import Site, Sites, Skipped
from nmfx.sparsity.layout import Rows
from nmfx.zoo.example import Example, example_for

log = logging.getLogger(__name__)

# Parameters that take part in a matmul as data, by the name of their attribute: position tables, tokens, learned queries.
POSITION_TABLE = re.compile(r"(^|_)(rel|pos|relative|position|tokens?|latents?)(_|\d*$)|pos_?emb|rel_?pos|bias_table")


@dataclass(frozen=True)
class Operand:
    """One operand of a matmul-like operation that may be a weight; `dim` is contracted with the activations."""

    tensor: Tensor
    dim: int
    macs: int
    kind: str = "matmul"
    conv_groups: int = 1


def _product(a: Tensor, b: Tensor, out: Tensor) -> list[Operand]:
    macs = out.numel() * a.shape[-1]
    return [Operand(b, -2 if b.dim() > 1 else -1, macs), Operand(a, -1, macs)]


def _convolution(args: tuple[Any, ...], out: Tensor) -> list[Operand]:
    x, weight, transposed, conv_groups = args[0], args[1], args[6], args[8]
    moved = x if transposed else out  # every position of it meets each weight once
    macs = moved.numel() // weight.shape[0] * weight.numel()
    kind = f"conv{'_transpose' if transposed else ''}{weight.dim() - 2}d"
    return [Operand(weight, 0 if transposed else 1, macs, kind, conv_groups)]


def _deform_convolution(args: tuple[Any, ...], out: Tensor) -> list[Operand]:
    weight = args[1]
    macs = out.numel() // len(weight) * weight.numel()
    return [Operand(weight, 1, macs, "conv2d")]


OPERATIONS: dict[str, Callable[[tuple[Any, ...], Tensor], list[Operand]]] = {
    "aten::mm": lambda args, out: _product(args[0], args[1], out),
    "aten::mv": lambda args, out: _product(args[0], args[1], out),
    "aten::bmm": lambda args, out: _product(args[0], args[1], out),
    "aten::addmm": lambda args, out: _product(args[1], args[2], out),
    "aten::addmv": lambda args, out: _product(args[1], args[2], out),
    "aten::baddbmm": lambda args, out: _product(args[1], args[2], out),
    "aten::linear": lambda args, out: [Operand(args[1], -1, out.numel() * args[1].shape[-1])],
    "aten::convolution": _convolution,
    "aten::_trilinear": lambda args, out: [Operand(args[1], -1, args[0].shape[0] * args[1].numel(), "bilinear")],
    "torchvision::deform_conv2d": _deform_convolution,
}

READ_AS = {  # why a parameter that no matmul reads as a weight is left out, by the first operation that names it
    "embedding": "looked up as a table (embedding)",
    "index": "a table, read by index",
    "gather": "a table, read by index",
    "upsample": "a table, interpolated",
    "add": "added to activations (position, token or bias)",
    "mul": "multiplied elementwise (a scale)",
    "cat": "joined to activations (a token)",
    "expand": "joined to activations (a token)",
    "copy": "joined to activations (a token)",
    "norm": "scale of a normalisation",
}


@dataclass
class _Use:
    """What one parameter was seen doing."""

    kind: str = ""
    rows: Rows | None = None
    macs: int = 0
    calls: int = 0
    conv_groups: int = 1
    operations: list[str] = field(default_factory=list)


def storage_of(tensor: Tensor) -> int:
    """What tells memory apart: views of one storage agree, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


class Census(TorchDispatchMode):
    """Records how a forward pass uses the parameters of a model.

    Attributes:
        uses: what was seen, by the id of the parameter.
        sources: storage -> the parameters whose weights it holds, as they are or transformed.
        orders: storage -> index in the parameter of each of its entries, where a copy has laid them out anew.
        tainted: storages of activations.
    """

    def __init__(self, parameters: list[nn.Parameter], inputs: Any) -> None:
        super().__init__()
        self.uses = {id(p): _Use() for p in parameters}
        self.sources: dict[int, tuple[nn.Parameter, ...]] = {storage_of(p): (p,) for p in parameters}
        self.orders: dict[int, Tensor] = {}
        self.own = set(self.sources)
        self.tainted = {storage_of(t) for t in _tensors(inputs)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, inputs, outputs = func._schema.name, _tensors((args, kwargs)), _tensors(out)
        operands = OPERATIONS[name](args, outputs[0]) if name in OPERATIONS else []
        weight = next((operand for operand in operands if storage_of(operand.tensor) in self.sources), None)
        if weight is not None:  # the other operand of a product of two parameters is data (a learned query)
            self._record_weight(weight)
        self._record_reads(name, [t for t in inputs if weight is None or t is not weight.tensor], outputs)
        self._follow(inputs, outputs, is_matmul=bool(operands))
        return out

    def _record_weight(self, operand: Operand) -> None:
        sources = self.sources[storage_of(operand.tensor)]
        total = sum(p.numel() for p in sources)
        length, stride = self._run(operand)
        for parameter in sources:
            use, numel = self.uses[id(parameter)], parameter.numel()
            if use.rows is None and length * stride and numel % (length * stride) == 0:
                use.rows = (numel // (length * stride), length, stride)
                linear = operand.kind == "matmul" and parameter.dim() == 2 and stride == 1
                use.kind, use.conv_groups = "linear" if linear else operand.kind, operand.conv_groups
            use.macs += operand.macs * numel // total
            use.calls += 1

    def _run(self, operand: Operand) -> tuple[int, int]:
        """Length of the group axis, and how far apart its entries lie in the parameter (0: not evenly)."""
        tensor, dim, length = operand.tensor, operand.dim, operand.tensor.shape[operand.dim]
        if "transpose" in operand.kind:  # (in, out / g, *kernel): in / g consecutive channels feed one group of outputs
            length //= operand.conv_groups
        if length == 1:
            return 1, math.prod(tensor.shape[dim:][1:]) if "conv" in operand.kind else 1
        if (order := self.orders.get(storage_of(tensor))) is None:
            return length, tensor.stride(dim)
        lines = order.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).movedim(dim, -1).flatten(0, -2)
        steps = lines.diff(dim=1)  # (lines, length - 1)
        stride, jumps = int(steps[0, 0]), (steps[0] != steps[0, 0]).nonzero()
        run = int(jumps[0]) + 1 if len(jumps) else length
        within = steps[:, [i for i in range(length - 1) if (i + 1) % run]]
        if length % run or not bool((within == stride).all()):
            return length, 0
        outer = lines[:, ::run].diff(dim=1)  # einsum may sum over two dimensions: groups run along the longer one
        if length > run * run and bool((outer == outer[0, 0]).all()):
            return length // run, int(outer[0, 0])
        return run, stride

    def _record_reads(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if any(storage_of(out) in map(storage_of, inputs) for out in outputs):
            return  # a view or an in-place write reads nothing by itself
        for tensor in inputs:
            for parameter in self.sources.get(storage_of(tensor), ()):
                self.uses[id(parameter)].operations.append(name.removeprefix("aten::"))

    def _follow(self, inputs: list[Tensor], outputs: list[Tensor], *, is_matmul: bool) -> None:
        """Mark what the outputs are: activations, values derived from parameters alone, or neither."""
        ids = [storage_of(tensor) for tensor in inputs]
        activation = any(i in self.tainted for i in ids)
        for out in outputs:
            key = storage_of(out)
            if key in ids or key in self.own:
                if activation and key not in self.own:
                    self.tainted.add(key)
                    self._forget(key)
                continue
            self._forget(key)  # new memory: whatever stood at this address before is gone
            self.tainted.discard(key)
            if activation:
                self.tainted.add(key)
            elif not is_matmul:
                self._derive(inputs, out)

    def _forget(self, key: int) -> None:
        self.sources.pop(key, None)
        self.orders.pop(key, None)

    def _derive(self, inputs: list[Tensor], out: Tensor) -> None:
        """An operation on parameters alone: note whose weights `out` still holds, and in which order.

        One parameter that was standardised, cast, permuted or expanded keeps its number of entries; several that were joined
        add theirs up.
        """
        key, held = storage_of(out), [t for t in inputs if any(p.dim() > 1 for p in self.sources.get(storage_of(t), ()))]
        for tensor in held:
            sources = self.sources[storage_of(tensor)]
            if tensor.numel() == out.numel() >= sum(p.numel() for p in sources):
                self.sources[key] = sources
                self._reorder(tensor, out)
                return
        sources = tuple(dict.fromkeys(p for t in held for p in self.sources[storage_of(t)] if p.dim() > 1))
        if sources and out.numel() == sum(p.numel() for p in sources) and all(t.is_contiguous() for t in held):
            self.sources[key] = sources

    def _reorder(self, tensor: Tensor, out: Tensor) -> None:
        """Carry the order of entries from `tensor` to its copy `out`, unless both are simply in order."""
        order = self.orders.get(storage_of(tensor))
        if order is None and tensor.is_contiguous() and out.is_contiguous():
            return
        if order is None:
            order = torch.arange(sum(p.numel() for p in self.sources[storage_of(tensor)]), device="cpu")
        entries = order.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(out.shape)
        laid = torch.empty(out.numel(), dtype=torch.int64, device="cpu")
        laid.as_strided(out.shape, out.stride()).copy_(entries)
        self.orders[storage_of(out)] = laid


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """The fused attention path of eval mode hides its projections in one operation."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _run(model: nn.Module, example: Example, *, train: bool) -> Census:
    model.train(train)
    census = Census(list(model.parameters()), (example.args, example.kwargs))
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _plain_attention(), census:
        model(*example.args, **example.kwargs)
    return census


def _with_values(model: nn.Module) -> nn.Module:
    """The model on the CPU; weights that were on the meta device become small random numbers."""
    values = [t for t in (*model.parameters(), *model.buffers()) if t.device.type == "meta"]
    if not values:
        model.cpu()
        for parameter in model.parameters():  # strides are read as positions in the parameter
            parameter.data = parameter.data.contiguous()
        return model
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
    return model


def take_census(model: nn.Module, example: Example) -> tuple[nn.Module, Census, Census | None]:
    """Follow all parameters of a throw-away copy of `model` through one eval and one train forward.

    Runs on the meta device; a model that asks for values on the way (detectors) runs on the CPU.

    Returns:
        The copy, the eval census, and the train census (None when the model cannot run in train mode on this input).

    Raises:
        TraceError: the forward fails on the CPU too.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for device in ("meta", "cpu"):
        try:
            copy = throw_away_copy(model, "meta") if device == "meta" else _with_values(throw_away_copy(model, None))
            placed = example.to(device, dtype)
            with torch.device(device):
                census = _run(copy, placed, train=False)
            break
        except Exception as error:
            if device == "cpu":
                raise TraceError(
                    f"{type(model).__name__}: the forward pass fails on {example}: {type(error).__name__}: {error}. "
                    f"Give example_input= (--input-size) as the model expects it"
                ) from error
            log.debug("census on the meta device failed, running on the CPU: %r", error)
    try:
        with torch.device(device):
            return copy, census, _run(copy, placed.doubled(), train=True)
    except Exception as error:
        log.debug("no train-mode census: %r", error)
        return copy, census, None


def find_sites(model: nn.Module, example_input: Any = None) -> Sites:
    """Every weight of `model` that can take a pattern, by use, and every other parameter with the reason.

    Args:
        example_input: a tensor, a tuple of positional or a dict of keyword arguments of the forward pass; only shapes and
            dtypes matter. None: from the model's own configuration, else 1x3x224x224.

    Returns:
        Sites in module order. MACs are per sample, of the eval forward. Depthwise convolutions are sites with a group axis of
        length 1: they count in every total, and stay dense by the policy of the scheme.

    Raises:
        TraceError: the forward pass fails on the example input.

    The model is not changed: a copy runs on the meta device (CPU memory is used only by models that need values).
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"expected an nn.Module, got {type(model).__name__}; build_model(name).model makes one of a name")
    if isinstance(model, torch.jit.ScriptModule):
        name = getattr(model, "original_name", type(model).__name__)
        raise TraceError(f"{name} is a TorchScript module: its classes cannot be swapped; give the module it was scripted from")
    example = Example.of(example_input) if example_input is not None else example_for(model)
    copied, census, training = take_census(model, example)
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, module in copied.named_modules():
        for attr, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, attr))
    sites: list[Site] = []
    skipped: list[Skipped] = []
    for name, parameter in copied.named_parameters():
        if id(parameter) not in census.uses:
            raise TraceError(f"{name}: the forward pass puts another parameter in its place; nmfx masks parameters that stay")
        use = census.uses[id(parameter)]
        late = training.uses[id(parameter)] if training is not None else _Use()
        if reason := _reason(copied, name, parameter, use, late, owners[id(parameter)]):
            if parameter.dim() > 1:
                skipped.append(Skipped(name, tuple(parameter.shape), reason))
            continue
        train_only = use.rows is None
        seen = late if train_only else use
        owner = copied.get_submodule(name.rpartition(".")[0])
        rows, kind = _expert_rows(owner, parameter, seen)
        sites.append(
            Site(
                name,
                kind,
                tuple(parameter.shape),
                rows,
                macs=use.macs // example.batch,
                calls=seen.calls,
                bytes=parameter.numel() * parameter.element_size(),
                owners=tuple(owners[id(parameter)]),
                conv_groups=seen.conv_groups,
                train_only=train_only,
            )
        )
    notes = () if training is not None else ("train mode does not run on the example input: auxiliary heads were not seen",)
    return Sites(tuple(sites), tuple(skipped), notes, type(model).__name__)


def _reason(
    model: nn.Module, name: str, parameter: nn.Parameter, use: _Use, late: _Use, owners: list[tuple[str, str]]
) -> str | None:
    """Why a parameter is not a site; None when it is one."""
    if any(isinstance(model.get_submodule(path), torch.jit.ScriptModule) for path, _ in owners):
        return "inside a TorchScript module: its class cannot be swapped"
    if parameter.is_complex():
        return "complex numbers: N:M keeps the largest of real ones"
    if use.rows is None and late.rows is None:
        operations = use.operations + late.operations
        if not operations:
            return "never read by the forward pass"
        if any(f"aten::{operation}" in OPERATIONS for operation in operations):
            return "data in a matmul (a learned query, or one factor of a weight)"
        for operation in operations:
            for word, reason in READ_AS.items():
                if word in operation:
                    return reason
        if POSITION_TABLE.search(name.rpartition(".")[2]):
            return "a position table, expanded"
        return f"read by {', '.join(sorted(set(operations)))} only, not as a weight"
    if parameter.dim() < 2:
        return "a vector"
    if POSITION_TABLE.search(name.rpartition(".")[2]):
        return "a position table or token inside a matmul"
    return None


def _expert_rows(owner: nn.Module, parameter: nn.Parameter, use: _Use) -> tuple[Rows, str]:
    """CondConv mixes a bank of flattened kernels (experts, out * in * k * k): its rows run along `in` of each kernel."""
    shape = getattr(owner, "weight_shape", None)
    if parameter.dim() == 2 and shape is not None and math.prod(shape) == parameter.shape[1]:
        return (parameter.shape[0] * shape[0], shape[1], math.prod(shape[2:])), f"conv{len(shape) - 2}d"
    assert use.rows is not None  # _reason has ruled this out
    return use.rows, use.kind
