"""load_compiled(path): the model of a compiled file, without the code it was made of, timm, or anything to build or measure.

Nothing in the file is run on its word: operators are those of `nmfx.runtime.saved.allowed`, their arguments of the kinds that
they take, layers are those of `nmfx.runtime.layers` and within what the kernel takes, and every tensor, node and layer that is
named is there. What PyTorch and the kernel refuse all the same, when it is called, is an NmfxError that names the file.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import tree_leaves, tree_structure

from nmfx.errors import CheckpointError, NmfxError
from nmfx.files import parsing
from nmfx.files.sealed import Tensors, read_sealed
from nmfx.runtime.chain import link
from nmfx.runtime.checks import expect
from nmfx.runtime.compiled import CompiledModel, Lowered
from nmfx.runtime.kernel.library import load_kernel
from nmfx.runtime.layers import DenseConv2d, DenseLinear, Fused, KernelLayer, SparseConv2d, SparseLinear
from nmfx.runtime.layout.tiles import Tile
from nmfx.runtime.lowering.exporting import Domain
from nmfx.runtime.operators import OPERATORS
from nmfx.runtime.saved import form
from nmfx.runtime.saved.allowed import operator_named
from nmfx.runtime.saved.checking import check_arguments, check_extent, check_site, fits
from nmfx.runtime.saved.form import DTYPES, ENUMERATIONS, KIND, MOST_NUMBERS, VERSION, Compiled
from nmfx.runtime.saved.machine import this_machine

log = logging.getLogger(__name__)
REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)  # of PyTorch and the kernel
STANDING = 1 << 20  # a size that hangs on the batch, and the number of the expression that gives it


def load_compiled(path: str | Path) -> CompiledModel:
    """The compiled model of a file that `CompiledModel.save` or ``nmfx export --compiled`` wrote.

    It computes what the one that was saved computes, each site in the same way, to the last bit on the same kernel and number
    of threads. It has no original to lower for other sizes: those that it was compiled for are taken, and the batches, up to
    4,096, that its graph is known to be for. On another processor than the one where ways to compute were chosen it runs too,
    and a warning of the logger ``nmfx.runtime.saved`` says so.

    Raises:
        CheckpointError: no such file; truncated, altered, foreign, of another version; or it holds what no compiled model of
            nmfx does.
    """
    path = Path(path)
    header, tensors = read_compiled(path)
    kernel = load_kernel()
    try:
        graph = Reader(header, tensors).read()
        if not kernel:
            link(graph, header.images)
    except (NmfxError, *REFUSALS, AssertionError) as error:
        raise CheckpointError(f"{path}: no compiled model of nmfx: {parsing.printable(str(error))}") from error
    said = header.inputs
    spans = tuple(said.batches)
    several = None if len(spans) == 1 else Batches(spans)
    batches = (min(least for least, _ in spans), max(most for _, most in spans))
    domain = Domain(said.shape, DTYPES[said.dtype], batches, several, said.apart)
    if not (here := this_machine()).chooses_as(header.machine):
        log.warning(
            "%s: what is fastest was chosen on %s, this is %s; its outputs are right, but compiled here it may be faster",
            path,
            parsing.printable(header.machine.name),
            parsing.printable(here.name),
        )
    lowered = Loaded(graph, domain, tuple(header.choices), header.batch, header.images, str(path))
    return CompiledModel(lowered, kernel=kernel, shapes=0, machine=header.machine)


def read_compiled(path: Path) -> tuple[Compiled, Tensors]:
    """Header and tensors of a compiled file, after checking that not a bit has changed since it was written.

    Raises:
        CheckpointError: no such file; truncated, altered, foreign, of another version, or with a header that is damaged.
    """
    content, tensors = read_sealed(path, "a compiled model", VERSION)
    if content.get("kind") != KIND:
        raise CheckpointError(f"{path}: not a compiled model, but another file of nmfx; nmfx.load_checkpoint loads checkpoints")
    return parsing.convert(content, Compiled, f"{path}: its header is damaged", CheckpointError), tensors


@dataclass(frozen=True)
class Batches:
    """The guards of a graph that is for some batches: spans from the least to the largest of each."""

    spans: tuple[tuple[int, int], ...]

    def __call__(self, x: Tensor) -> None:
        """Raise an AssertionError for another batch."""
        if not any(least <= len(x) <= most for least, most in self.spans):
            raise AssertionError(f"a batch of {len(x)}")


@dataclass(frozen=True, eq=False)
class Loaded(Lowered):
    """A lowered model from a file, whose errors name it."""

    path: str = ""

    def __call__(self, x: Tensor) -> Any:
        """The outputs for `x` (see `Lowered`)."""
        try:
            return super().__call__(x)
        except REFUSALS as error:
            said = parsing.printable(str(error))
            raise NmfxError(f"{self.path}: cannot compute {tuple(x.shape)}: {said}; save it anew") from error


class Reader:
    """Nodes of a file as those of a graph; errors say which node is wrong, and not of which file."""

    def __init__(self, header: Compiled, tensors: Tensors) -> None:
        self.header, self.tensors = header, tensors
        self.graph, self.root = fx.Graph(), dict[str, Any]()
        self.nodes: list[fx.Node] = []
        self.layers: dict[int, nn.Module] = {}

    def read(self) -> fx.GraphModule:
        """The lowered graph, without chains."""
        # Copies begin where vectors do, as those in a file need not: libraries may add up in another order elsewhere.
        self.tensors = {name: value.clone() for name, value in self.tensors.items()}
        for name, order in self.header.orders.items():
            value = self._tensor(name)
            if sorted(order) != list(range(value.dim())):
                raise CheckpointError(f"{name}: dimensions {order} of {value.dim()}")
            self.tensors[name] = value.permute([order.index(dim) for dim in range(value.dim())])
        for number, node in enumerate(self.header.nodes):
            try:
                self.nodes.append(self._node(node))
            except (NmfxError, RuntimeError, LookupError, TypeError) as error:
                raise CheckpointError(f"node {number}: {error}") from error
        if sum(isinstance(node, form.Given) for node in self.header.nodes) != 1:
            raise CheckpointError("expected one input")
        self._output()
        return fx.GraphModule(self.root, self.graph)

    def _output(self) -> None:
        outputs = self._tree(self.header.outputs)
        if isinstance(outputs, fx.Node):
            self.graph.output(outputs)
            return
        leaves = tree_leaves(outputs, is_leaf=lambda one: one is None)
        if not any(isinstance(one, fx.Node) for one in leaves):
            raise CheckpointError("no outputs")
        self.graph.output(tuple(leaves))
        given, made = tree_structure(((0,), {})), tree_structure(outputs)
        self.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(["x"], given, made)))

    def _tree(self, said: Any) -> Any:
        if said is None or isinstance(said, form.Node):
            return None if said is None else self._earlier(said)
        items = [self._tree(each) for each in said.items]
        if "ict" not in said.kind:
            return items if said.kind == "list" else tuple(items)
        if said.keys is None or len(set(said.keys)) != len(items) or len(said.keys) != len(items):
            raise CheckpointError("outputs: expected a key for each")
        both = zip(said.keys, items, strict=True)
        return OrderedDict(both) if said.kind == "OrderedDict" else dict(both)

    def _node(self, said: Any) -> fx.Node:
        if isinstance(said, form.Constant):
            name = f"tensor{len(self.nodes)}"
            self.root[name] = self._tensor(said.name)
            node = self.graph.get_attr(name)
            node.meta["val"] = self.root[name].to("meta")
            return node
        if isinstance(said, form.Given):
            node = self.graph.placeholder("x")
        elif isinstance(said, form.Site):
            inputs = [self._earlier(each) for each in said.inputs]
            name = f"site{said.layer}"
            self.root[name] = layer = self._layer(said.layer)
            node = self.graph.call_module(name, tuple(inputs))
            check_site(layer, inputs)
        else:
            target, schema = operator_named(said.operator)
            args = [self._argument(each) for each in said.args]
            kwargs = {key: self._argument(each) for key, each in said.kwargs.items()}
            check_arguments(said.operator, schema, args, kwargs)
            node = self.graph.call_function(target, tuple(args), kwargs)
            if said.operator.startswith("nmfx."):
                named = OPERATORS[said.operator.split(".")[1]].named(args)
                if isinstance(value := named["input"].meta.get("val"), Tensor) and "stride" in named:
                    check_extent(value, named["kernel"], named["padding"], (1, 1))
        if said.shape is not None:
            node.meta["val"] = torch.empty(self._sizes(said.shape), dtype=self._dtype(node), device="meta")
        return node

    def _dtype(self, node: fx.Node) -> torch.dtype:
        """The type of what a node gives, as far as operators of the kernel ask for it: bytes, else float32."""
        layer = self.root[str(node.target)] if node.op == "call_module" else None
        name = (
            layer.operator
            if isinstance(layer, KernelLayer)
            else str(node.target).removeprefix("nmfx.").removesuffix(".default")
        )
        operator = OPERATORS.get(name)
        if operator is None or not operator.planes:
            return torch.float32
        value = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
        return operator.gives or (value.dtype if isinstance(value, Tensor) else torch.float32)

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        """Sizes of a tensor for the example's batch; others that hang on the batch are large, and equal where they were."""
        if any(size < 0 for size in shape[1:]):
            raise CheckpointError(f"shape {shape}: only the first may hang on the batch")
        found = [self.header.inputs.shape[0] if size == -1 else STANDING - size if size < 0 else size for size in shape]
        if math.prod(found) > MOST_NUMBERS:
            raise CheckpointError(f"shape {shape}: too large")
        return found

    def _earlier(self, said: form.Node) -> fx.Node:
        if said.of >= len(self.nodes):
            raise CheckpointError(f"reads node {said.of}, which is none before it")
        return self.nodes[said.of]

    def _argument(self, said: Any) -> Any:
        if isinstance(said, list):
            return [self._argument(each) for each in said]
        if isinstance(said, form.Node):
            return self._earlier(said)
        if isinstance(said, form.NotFinite):
            return float(said.of)
        if isinstance(said, form.Enumerated):
            if said.of not in ENUMERATIONS[said.kind]:
                raise CheckpointError(f"unknown {said.kind} {said.of}")
            return ENUMERATIONS[said.kind][said.of]
        return said

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"tensor {name} is missing")
        return self.tensors[name]

    def _layer(self, number: int) -> nn.Module:
        if number >= len(self.header.layers):
            raise CheckpointError(f"layer {number} is missing")
        if number not in self.layers:
            said = self.header.layers[number]
            self.layers[number] = self._kernel_layer(said) if isinstance(said, form.KernelSite) else self._dense_layer(said)
        return self.layers[number]

    def _kernel_layer(self, said: form.KernelSite) -> KernelLayer:
        operator = OPERATORS.get(said.operator)
        if operator is None or operator.sizes is None:
            raise CheckpointError(f"{said.operator} is no operator of the kernel")
        tensors = {key: None if name is None else self._tensor(name) for key, name in said.tensors.items()}
        options = {key: self._argument(value) for key, value in said.options.items()}
        if any(isinstance(each, fx.Node) for each in tree_leaves(options)):
            raise CheckpointError(f"{said.operator}: its options are numbers")
        wanted = operator.arguments.keys() - {"input", "residual"}
        if wanted != tensors.keys() | options.keys() or len(wanted) != len(tensors) + len(options):
            raise CheckpointError(f"{said.operator}: expected arguments {', '.join(sorted(wanted))}")
        schema = {one.name: one for one in getattr(torch.ops.nmfx, said.operator).default._schema.arguments}
        for key, value in (*options.items(), *tensors.items()):
            if not fits(value, str(schema[key].real_type)):
                raise CheckpointError(f"{said.operator}: {key}: expected {schema[key].real_type}")
        sparse = "values" in tensors
        lanes: Tile | bool | None
        if isinstance(said.lanes, tuple):
            chunk, vectors, zeros = said.lanes
            lanes = Tile(chunk, vectors, lanes=True, zeros=zeros)
            expect(1 <= vectors <= 8 and 1 <= chunk <= 1 << 16, f"a tile within 65536x8, got {lanes}")
        else:
            lanes = said.lanes
        if lanes and (isinstance(lanes, Tile) != sparse or not operator.lanes):
            raise CheckpointError(f"{said.operator}: cannot be computed on lanes so")
        kind = {"sparse_conv2d": SparseConv2d, "sparse_linear": SparseLinear}.get(said.operator, KernelLayer)
        return kind(said.operator, tensors, options, lanes)

    def _dense_layer(self, said: form.DenseSite) -> nn.Module:
        weight, bias = self._tensor(said.weight), None if said.bias is None else self._tensor(said.bias)
        low, high = self._argument(said.low), self._argument(said.high)
        expect(weight.dtype == torch.float32 and weight.dim() == (2 if said.geometry is None else 4), "a float32 weight")
        if said.geometry is None:
            return DenseLinear(Fused("", weight, bias, low=low, high=high))
        expect(len(weight) % said.groups == 0, "output channels that divide by the groups")
        fused = Fused("", weight, bias, said.geometry, said.groups, low=low, high=high)
        return DenseConv2d(fused, channels_last=said.channels_last)
