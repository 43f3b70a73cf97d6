"""torch.export: a model as a graph, and the inputs for which that graph gives what the model does."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nmfx.errors import ModelError
from nmfx.runtime.kernel.library import quiet
from nmfx.runtime.lowering.samples import samples_apart

EXPORTING = threading.RLock()  # torch.export, and copies of what it made, are for one thread at a time


@dataclass(frozen=True, eq=False)
class Domain:
    """The inputs for which a graph gives what the model does: what torch.export assumed.

    Attributes:
        shape: of the example.
        dtype: of the example.
        batches: the least and the largest batch; None where there is no largest.
        guards: refuses other batches, with an AssertionError.
        apart: whether samples are shown not to see each other (`nmfx.runtime.lowering.samples`).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    batches: tuple[int, int | None]
    guards: Callable[[Tensor], object] | None = None
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


def copy_of(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a lowered graph over the same tensors, whose sites can be given other layers."""
    with EXPORTING:
        return fx.GraphModule(graph, copy.deepcopy(graph.graph))
