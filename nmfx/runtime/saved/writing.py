"""save(compiled, path): a compiled model as one file."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from nmfx.errors import CheckpointError
from nmfx.files.sealed import write_sealed
from nmfx.progress import Progress, silent
from nmfx.runtime.chain import Chain
from nmfx.runtime.layers import DenseConv2d, DenseLinear, KernelLayer
from nmfx.runtime.layout.tiles import Tile
from nmfx.runtime.lowering.exporting import Domain
from nmfx.runtime.saved import form
from nmfx.runtime.saved.allowed import name_of
from nmfx.runtime.saved.form import DTYPES, ENUMERATIONS, KIND, VERSION, Compiled, Enumerated, Inputs, NotFinite, Several

if TYPE_CHECKING:
    from nmfx.models.example import Example
    from nmfx.runtime.compiled import CompiledModel

MOST_BATCH = 4096  # the largest batch that is asked for whether the graph is for it


def save(compiled: CompiledModel, path: Path, *, force: bool) -> None:
    """Write a compiled model (see `CompiledModel.save`)."""
    from nmfx.runtime.saved.reading import REFUSALS, Reader  # which makes compiled models

    lowered, writer = compiled._first, _Writer()
    try:
        outputs = writer.write(lowered.graph)
        domain = lowered.domain
        shape, dtype = domain.shape, str(domain.dtype).removeprefix("torch.")
        header = Compiled(
            version=VERSION,
            kind=KIND,  # type: ignore[arg-type]
            inputs=Inputs(shape, dtype, _spans(domain), domain.apart),
            batch=lowered.batch,
            images=lowered.images,
            choices=list(lowered.choices),
            machine=compiled.machine,
            orders=writer.orders,
            layers=writer.layers,
            nodes=writer.nodes,
            outputs=outputs,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: cannot be saved: {error}") from error
    content = msgspec.to_builtins(header)
    try:  # what is written can be read
        Reader(msgspec.convert(content, Compiled), dict(writer.tensors)).read()
    except (msgspec.ValidationError, *REFUSALS, CheckpointError) as error:
        raise CheckpointError(f"{path}: cannot be saved: {error}") from error
    write_sealed(path, content, writer.tensors, force=force)


def save_compiled(
    model: nn.Module,
    path: Path,
    example: Example,
    *,
    batch: int = 1,
    calibration: Tensor | None = None,
    progress: Progress = silent,
) -> list[str]:
    """A baked model compiled for a batch of an example's first picture, and saved.

    Args:
        batch: pictures at a time.
        calibration: pictures to compile for int8 by; None: float32.
        progress: as `nmfx.compile` has it.

    Returns:
        How near int8 outputs come to float32, in a line; nothing for float32.

    Raises:
        CheckpointError: the model takes more than one tensor, or its graph has an operator that no file may call.
        ModelError: torch.export cannot follow it.
    """
    from nmfx.runtime.compiler import compile

    if len(example.args) != 1 or example.kwargs or not isinstance(example.args[0], Tensor):
        raise CheckpointError(f"{path}: {type(model).__name__} takes several inputs, and only models of one can be compiled")
    first = example.args[0][:1]
    example_input = first.expand(batch, *first.shape[1:])
    precision = "float32" if calibration is None else "int8"
    made = compile(model, example_input, shapes=0, precision=precision, calibration=calibration, progress=progress)
    made.save(path)
    return [] if made.agreement is None else [str(made.agreement)]


def _spans(domain: Domain) -> list[tuple[int, int]]:
    """The batches that a graph is for, up to `MOST_BATCH`: what torch.export assumed of them is code, and is asked for each."""
    least, most = domain.batches
    asked = range(least, 1 + (MOST_BATCH if most is None else min(most, MOST_BATCH)))
    empty = torch.empty(domain.shape, dtype=domain.dtype, device="meta")[:1]
    spans: list[tuple[int, int]] = []
    for size in sorted({*asked, domain.shape[0]}):
        if domain.takes(empty.expand(size, *domain.shape[1:])):
            joined = spans and spans[-1][1] == size - 1
            spans[-1:] = [(spans[-1][0], size)] if joined else [*spans[-1:], (size, size)]
    return spans


@dataclass
class _Writer:
    """Nodes of a graph as those of a file, with the layers and tensors that they name.

    Attributes:
        orders: by tensor that is no row-major one, its dimensions from the outermost.
        known: what stands for each tensor, and each layer, that was written.
        sizes: what stands for each size that hangs on the batch, by its expression.
    """

    nodes: list[Any] = field(default_factory=list)
    layers: list[Any] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    orders: dict[str, tuple[int, ...]] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def write(self, graph: fx.GraphModule) -> Any:
        """The outputs of a lowered graph whose nodes are written, those of its chains among them."""
        numbers: dict[fx.Node, form.Node] = {}
        parts: dict[fx.Node, list[form.Node]] = {}  # outputs of chains that have several
        needed = _needed(graph.graph)
        for node in graph.graph.nodes:
            chain = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if node.op == "output":
                return self._outputs(graph.graph, node, numbers)
            if node not in needed:
                continue
            if isinstance(chain, Chain):
                inside = chain.graph.graph
                known = dict(zip(inside.find_nodes(op="placeholder"), (numbers[each] for each in node.args), strict=True))  # type: ignore[index]
                for each in inside.nodes:
                    if each.op not in ("placeholder", "output"):
                        known[each] = self._node(chain.graph, each, known)
                    elif each.op == "output":
                        parts[node] = [known[one] for one in each.all_input_nodes]
                if len(parts[node]) == 1:
                    numbers[node] = parts.pop(node)[0]
            elif node.args and node.args[0] in parts:  # type: ignore[comparison-overlap]
                numbers[node] = parts[node.args[0]][node.args[1]]  # type: ignore[index]
            else:
                numbers[node] = self._node(graph, node, numbers)
        raise CheckpointError("a graph without outputs")

    def _node(self, graph: fx.GraphModule, node: fx.Node, numbers: Mapping[fx.Node, form.Node]) -> form.Node:
        shape = self._shape(node)
        written: Any
        if node.op == "placeholder":
            written = form.Given(shape)
        elif node.op == "get_attr":
            name = str(node.target)
            value = operator.attrgetter(name)(graph)
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{name} of its graph is a {type(value).__name__}, no tensor")
            written = form.Constant(self._tensor(name, value))
        elif node.op == "call_module":
            inputs = tuple(numbers[each] for each in node.args)  # type: ignore[index]
            written = form.Site(self._layer(str(node.target), graph.get_submodule(str(node.target))), inputs, shape)
        else:
            name = name_of(node.target) or ""
            if not name:
                raise CheckpointError(
                    f"its graph calls {node.target}, which is none of the operators that a compiled file may call; "
                    "compile it where it runs"
                )
            args = [self._argument(each, numbers) for each in node.args]
            kwargs = {key: self._argument(each, numbers) for key, each in node.kwargs.items()}
            written = form.Call(name, args, kwargs, shape)
        self.nodes.append(written)
        return form.Node(len(self.nodes) - 1)

    def _shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Sizes of what a node gives; None where it is no tensor, or where others than the first hang on the batch."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape[1:]):
            return None
        return tuple(
            size if isinstance(size, int) else self.sizes.setdefault(str(size), -1 - len(self.sizes)) for size in value.shape
        )

    def _argument(self, value: Any, numbers: Mapping[fx.Node, form.Node]) -> Any:
        if isinstance(value, fx.Node):
            return numbers[value]
        if isinstance(value, list | tuple):
            return [self._argument(each, numbers) for each in value]
        if value is None or isinstance(value, str | bool | int):
            return value
        if isinstance(value, float):
            return _real(value)
        for kind, names in ENUMERATIONS.items():
            for name, one in names.items():
                if type(one) is type(value) and one == value:
                    return Enumerated(kind, name)
        raise CheckpointError(f"its graph has an argument {value} ({type(value).__name__}), which a compiled file cannot hold")

    def _layer(self, name: str, layer: nn.Module) -> int:
        if id(layer) not in self.known:
            tensors = {
                key: None if value is None else self._tensor(f"{name}.{key}", value) for key, value in layer._buffers.items()
            }
            if isinstance(layer, KernelLayer):
                options = {key: self._argument(value, {}) for key, value in layer.options.items()}
                tile = layer.lanes
                lanes = (tile.chunk, tile.vectors, tile.zeros) if isinstance(tile, Tile) else tile
                written: Any = form.KernelSite(layer.operator, tensors, options, lanes)
            elif isinstance(layer, DenseConv2d | DenseLinear):
                limits = map(_real, layer.limits)
                written = form.DenseSite(tensors["weight"], tensors["bias"], *limits)  # type: ignore[arg-type]
                if isinstance(layer, DenseConv2d):
                    more = {"geometry": layer.geometry, "groups": layer.groups, "channels_last": layer.channels_last}
                    written = msgspec.structs.replace(written, **more)
            else:
                raise CheckpointError(f"its graph calls a {type(layer).__name__}, which a compiled file cannot hold")
            self.layers.append(written)
            self.known[id(layer)] = len(self.layers) - 1
        return int(self.known[id(layer)])

    def _tensor(self, name: str, value: Tensor) -> str:
        """The name of a tensor in the file, which holds it once."""
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in self.known:
            return str(self.known[key])
        if str(value.dtype).removeprefix("torch.") not in DTYPES or value.device.type != "cpu" or value.layout != torch.strided:
            raise CheckpointError(f"{name}: {value.dtype}, {value.layout} on {value.device} cannot be held by a compiled file")
        order = tuple(
            sorted(range(value.dim()), key=lambda dim: value.stride()[dim], reverse=True)
        )  # sums may run in memory's order
        stored = value.detach().permute(order)
        if not value.is_contiguous() and stored.is_contiguous():
            self.orders[name] = order
        else:
            stored = value.detach()
        self.tensors[name] = stored.contiguous().clone()
        self.known[key] = name
        return name

    def _outputs(self, graph: fx.Graph, node: fx.Node, numbers: Mapping[fx.Node, form.Node]) -> Any:
        whole = node.args[0]
        if (info := getattr(graph._codegen, "pytree_info", None)) is not None:
            whole = tree_unflatten(list(whole), info.out_spec)  # type: ignore[arg-type]
        return self._tree(whole, numbers)

    def _tree(self, value: Any, numbers: Mapping[fx.Node, form.Node]) -> Any:
        if value is None or isinstance(value, fx.Node):
            return None if value is None else numbers[value]
        kinds: dict[type, str] = {tuple: "tuple", list: "list", dict: "dict", OrderedDict: "OrderedDict"}
        kind = kinds.get(type(value))
        if kind is None or (isinstance(value, dict) and not all(isinstance(key, str) for key in value)):
            raise CheckpointError(f"its outputs are a {type(value).__name__}; tensors, lists, tuples and dicts can be saved")
        if isinstance(value, dict):
            return Several(kind, [self._tree(each, numbers) for each in value.values()], list(value))  # type: ignore[arg-type]
        return Several(kind, [self._tree(each, numbers) for each in value])  # type: ignore[arg-type]


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose results are read, or that raise what the model raises."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "placeholder" or node.is_impure() or any(user in found for user in node.users):
            found.add(node)
    return found


def _real(value: float) -> float | NotFinite:
    return float(value) if math.isfinite(value) else NotFinite(str(float(value)))  # type: ignore[arg-type]
