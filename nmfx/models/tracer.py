"""The converted model as a torch.fx.GraphModule over the model's own modules, right in train and in eval mode."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmfx.errors import TraceError
from nmfx.masking.copies import MASKS_IN_FORWARD, throw_away_copy
from nmfx.masking.modes import keep_modes
from nmfx.masking.owner import is_masked
from nmfx.models.example import Example
from nmfx.text import sentence

log = logging.getLogger(__name__)


class SiteTracer(fx.Tracer):
    """fx's tracer with timm's settings: its leaf modules and functions stay whole, parameter shapes are constants.

    Masked owners trace as their plain classes do: a masked convolution is a leaf, and a weight that a parent reads becomes a
    ``get_attr`` node, which goes through the mask when the graph runs.
    """

    def __init__(self, leaves: tuple[type[nn.Module], ...] = (), *, follow_buffers: bool = True) -> None:
        from timm.layers import get_notrace_functions, get_notrace_modules
        from torchvision.ops import DropBlock2d, DropBlock3d, StochasticDepth

        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
        self.leaves = (*get_notrace_modules(), StochasticDepth, DropBlock2d, DropBlock3d, *leaves)
        self.stack: list[nn.Module] = []
        # What is computed from a buffer follows the buffer, instead of becoming a constant.
        self.proxy_buffer_attributes = follow_buffers

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Only parameters have constant shapes: fx's ParameterProxy refuses buffers."""
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaves are torch.nn's modules, timm's registered ones, those that derive their weight, and classes that failed."""
        return isinstance(m, self.leaves) or MASKS_IN_FORWARD in m.__dict__ or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace a call of a module, remembering the innermost one, so that `_trace` knows the class that failed."""
        self.stack.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.stack.pop()
        return result


def _trace(model: nn.Module, concrete: dict[str, Any], *, follow_buffers: bool) -> fx.Graph:
    """Trace `model`, making the innermost module class that fails a leaf and trying again."""
    leaves: tuple[type[nn.Module], ...] = ()
    while True:
        tracer = SiteTracer(leaves, follow_buffers=follow_buffers)
        try:
            return tracer.trace(model, concrete_args=concrete)
        except Exception as error:
            if not tracer.stack or type(tracer.stack[-1]) in leaves:
                raise TraceError(
                    f"{type(model).__name__}: torch.fx cannot trace it at the root ({type(error).__name__}: {error}); "
                    f"transform() converts it all the same"
                ) from error
            leaves = (*leaves, type(tracer.stack[-1]))
            log.debug("fx cannot trace %s (%r); keeping it whole", leaves[-1].__name__, error)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Defaulted forward arguments as constants: as proxies, `if mask is None` would take the wrong branch."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@dataclass(frozen=True)
class Traced:
    """A graph, and the tensors that the forward pass makes out of nothing (by the name of their ``get_attr`` node)."""

    graph: fx.Graph
    constants: dict[str, Tensor]


def trace(model: nn.Module, *, train: bool = False) -> Traced:
    """The fx graph of `model`, traced on a throw-away copy: the model is not touched.

    Where a buffer's values decide what is computed (rotary embeddings of EVA), buffers count as constants.

    Raises:
        TraceError: fx cannot trace the model at the root.
    """
    try:
        return _trace_copy(model, train, follow_buffers=True)
    except TraceError:
        return _trace_copy(model, train, follow_buffers=False)


def describe_trace(model: nn.Module) -> str:
    """Whether a model traces at the root, in words."""
    try:
        nodes = trace(model).graph.nodes
    except TraceError as error:
        return f"does not trace at the root ({sentence(error.__cause__ or error, 80)}); converted all the same"
    return f"traces at the root, {len(nodes)} nodes"


def _trace_copy(model: nn.Module, train: bool, *, follow_buffers: bool) -> Traced:
    for device in ("meta", None):  # a copy with values only where the graph holds constants computed from them
        copied = throw_away_copy(model, device).train(train)
        graph = _trace(copied, _defaults(copied), follow_buffers=follow_buffers)
        names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        constants = {name: getattr(copied, name) for name in sorted(names) if name.startswith("_tensor_constant")}
        if all(value.device.type != "meta" for value in constants.values()):
            break
    return Traced(graph, constants)


SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class SiteGraph(fx.GraphModule):
    """The fx view of a model: `graph` is the train or the eval graph, and follows ``train()`` and ``eval()``.

    fx bakes the train flag into functional dropout and attention, so that one graph is right in one mode only. The modules are
    the model's own, all of them: the state dict is the model's, and masked owners stay masked.
    """

    def __init__(self, model: nn.Module, traced: dict[bool, Traced], class_name: str) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name)
        for name in SHARED:
            self.__dict__[name] = copy.copy(model.__dict__[name])
        self.graphs = {}
        for mode, prefix in ((False, "eval"), (True, "train")):
            for name, value in traced[mode].constants.items():
                self.register_buffer(f"{prefix}{name}", value, persistent=False)
            for node in traced[mode].graph.nodes:
                node.target = f"{prefix}{node.target}" if node.target in traced[mode].constants else node.target
            self.graphs[mode] = traced[mode].graph
        self.training = model.training
        self.graph = self.graphs[model.training]

    def train(self, mode: bool = True) -> SiteGraph:
        """Switch mode: the modules' and the graph's."""
        super().train(mode)
        if self.graph is not self.graphs[mode]:
            self.graph = self.graphs[mode]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteGraph:
        root = nn.Module()
        root.__dict__.update({name: copy.deepcopy(self.__dict__[name], memo) for name in SHARED})
        root.training = self.training
        traced = {mode: Traced(copy.deepcopy(graph), {}) for mode, graph in self.graphs.items()}
        return SiteGraph(root, traced, self._get_name())

    def __reduce__(self) -> Any:
        raise TraceError("the fx view of a model cannot be pickled; pickle the model, or call save_checkpoint on it")


def to_graph(model: nn.Module, example_input: Any = None) -> SiteGraph:
    """The fx view of a (converted) model: every convolution and linear node targets the model's own, masked, module, and a
    weight that is read by a functional call is a ``get_attr`` node that goes through the mask.

    Args:
        example_input: if given, the eval graph is run on it and must equal the model, bit for bit.

    Raises:
        TraceError: fx cannot trace the model at the root, or the graph computes something else.
    """
    if any(is_masked(module) and module is model for module in model.modules()):
        raise TraceError(
            f"{type(model).__name__}: the root itself holds a masked weight; put it inside a parent module, or use to_graphs"
        )
    view = SiteGraph(model, {mode: trace(model, train=mode) for mode in (False, True)}, type(model).__name__)
    if example_input is not None:
        _compare(model, view, example_input)
    return view


def to_graphs(model: nn.Module) -> dict[str, SiteGraph]:
    """The fx views of the largest parts of `model` that trace, by module path; ``{"": view}`` when the root does.

    Detectors, which loop over pictures, come apart into their backbone, heads and the like. A part is traced by itself: what
    its parent feeds it is not known, so compare it with the module before relying on it.
    """
    with contextlib.suppress(TraceError):  # a module that holds a masked weight itself needs a parent: a graph of one call
        return {"": to_graph(nn.Sequential(model) if is_masked(model) else model)}
    parts: dict[str, SiteGraph] = {}
    for name, child in model.named_children():
        if any(True for _ in child.parameters()):
            parts |= {f"{name}.{path}".rstrip("."): view for path, view in to_graphs(child).items()}
    return parts


def _compare(model: nn.Module, view: SiteGraph, example_input: Any) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = Example.of(example_input).to(device)
    if device.type == "meta":
        return
    mode = model.training
    with keep_modes(model):
        try:
            model.eval(), view.eval()
            with torch.no_grad():
                expected, found = (m(*example.args, **example.kwargs) for m in (model, view))
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        except AssertionError as error:
            raise TraceError(f"{type(model).__name__}: its fx graph computes something else: {error}") from error
        finally:
            view.train(mode)
