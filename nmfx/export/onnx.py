"""A baked model as ONNX: named inputs and outputs, a free batch, real zeros in its weights."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from nmfx.errors import CheckpointError
from nmfx.files.atomic import write_atomic
from nmfx.models.example import Example

LARGEST = 2**31 - 2**24  # bytes of weights in one file, of which protobuf takes 2 GiB; the others go to a file beside it
DATA = ".data"  # what that file is called, after the name of the first
SIZES = {3: ("length",), 4: ("height", "width"), 5: ("frames", "height", "width")}  # of an input by its rank, from dimension 2


def save_onnx(model: nn.Module, path: Path, example: Example, *, opset: int | None = None, free_size: bool = False) -> None:
    """A baked model as ONNX through torch.onnx. Inputs and outputs have names: ``input`` and ``output`` where there is one,
    else those of the forward pass. The batch is free, and called so. Weights of more than 2 GB go to ``PATH.data`` beside it.

    Args:
        opset: version of the operators; None: the exporter's own.
        free_size: also height and width are free, where the model does not fix them.

    Raises:
        CheckpointError: the exporter is not installed, or cannot express the model, or not in that opset; a free size of a
            model that has one size.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CheckpointError(f"ONNX export needs {error.name}: pip install 'nmfx[onnx]'") from None

    def write(temporary: Path) -> None:
        quiet = contextlib.redirect_stdout(io.StringIO())  # the exporter prints its own progress
        with warnings.catch_warnings(), quiet, torch.no_grad(), _silent("torch.onnx", "onnxscript", "onnx_ir"):
            warnings.simplefilter("ignore")
            model.eval()
            twice = example.doubled()  # a batch of one would be taken for a constant
            inputs, shapes = _inputs(model, twice, free_size=free_size)
            program = torch.onnx.export(
                model,
                twice.args,
                kwargs=twice.kwargs,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=_output_names(model(*twice.args, **twice.kwargs)),
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            whole = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) <= LARGEST
            program.save(str(temporary), external_data=not whole)
        graph = onnx.load(str(temporary), load_external_data=False)
        _check_opset(graph, opset)
        _name_sizes(graph)
        onnx.save(graph, str(temporary))
        data = temporary.with_name(temporary.name + DATA)
        if data.exists():
            os.replace(data, path.with_name(data.name))  # before the file that names it

    try:
        write_atomic(path, write)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {type(model).__name__} {error}") from error
    except (RuntimeError, ValueError, TypeError, torch.onnx.OnnxExporterError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{path}: {type(model).__name__} cannot be exported to ONNX: {first}") from error


@contextlib.contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Loggers of these names say nothing; what matters comes back as an error."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _inputs(model: nn.Module, example: Example, *, free_size: bool) -> tuple[list[str], Any]:
    """Names of the inputs that are tensors, and which of their dimensions are free, as torch.export wants it."""
    given = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
    plain = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    names = ["input"] if len(plain) == len(given) == 1 else list(given) if len(plain) == len(given) else []
    free = {name: {0: torch.export.Dim.DYNAMIC} for name in plain}
    if free_size:
        free = _free_sizes(model, example, given, free)
    if example.kwargs:
        return names, {name: free.get(name) for name in given}
    return names, tuple(free.get(name) for name in given)


def _free_sizes(
    model: nn.Module, example: Example, given: Mapping[str, Any], free: Mapping[str, Mapping[int, Any]]
) -> dict[str, dict[int, Any]]:
    """Also the sizes that may be doubled and that torch.export finds free: the exporter to ONNX believes what it is told.

    Raises:
        CheckpointError: there are none.
    """
    asked = {name: dict(dims) for name, dims in free.items()}
    for dim in range(2, 5):  # of all inputs together: pictures that go together have one size
        sized = [name for name in free if dim - 2 < len(SIZES.get(given[name].dim(), ()))]
        larger = {name: torch.cat([value, value], dim) if name in sized else value for name, value in given.items()}
        if sized and _runs(model, example, larger):
            for name in sized:
                asked[name][dim] = torch.export.Dim.AUTO
    shapes = {name: asked.get(name) for name in given} if example.kwargs else tuple(asked.get(name) for name in given)
    exported = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes)
    nodes = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    tensors = [nodes[name] for name in exported.graph_signature.user_inputs if name in nodes]
    tensors = [value for value in tensors if isinstance(value, Tensor)]
    found = {
        name: {dim: torch.export.Dim.DYNAMIC for dim in asked[name] if not isinstance(value.shape[dim], int)}
        for name, value in zip(asked, tensors, strict=True)
    }
    if not any(dim > 0 for dims in found.values() for dim in dims):
        raise CheckpointError("takes inputs of one size only; leave --free-size out")
    return found


def _runs(model: nn.Module, example: Example, given: Mapping[str, Any]) -> bool:
    positional = [given[name] for name in list(given)[: len(example.args)]]
    try:
        model(*positional, **{name: given[name] for name in example.kwargs})
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return False
    return True


def _output_names(outputs: Any) -> list[str]:
    """``output``, keys of a dictionary, or ``output_0`` and so on."""
    paths = [path for path, leaf in tree_flatten_with_path(outputs)[0] if isinstance(leaf, Tensor)]
    words = [
        "_".join(str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", step)))) for step in p) for p in paths
    ]
    return [f"output_{word}" if word.isdigit() else word or "output" for word in words]


def _check_opset(graph: Any, opset: int | None) -> None:
    found = next(one.version for one in graph.opset_import if one.domain in ("", "ai.onnx"))
    if opset is not None and found != opset:
        raise CheckpointError(
            f"cannot be said in ONNX opset {opset}, {found} is the nearest; leave --opset out, or ask for that"
        )


def _name_sizes(graph: Any) -> None:
    """Call free dimensions by what they are, instead of torch.export's ``s77``, wherever they stand."""
    words: dict[str, str] = {}
    for value in graph.graph.input:
        dims = value.type.tensor_type.shape.dim
        for index, word in enumerate(("batch", "", *SIZES.get(len(dims), ()))[: len(dims)]):
            if word and (symbol := dims[index].dim_param):
                taken = [known for known in words.values() if known.rstrip("_0123456789") == word]
                words.setdefault(symbol, f"{word}_{len(taken) + 1}" if taken else word)
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"[A-Za-z_]\w*", lambda found: words.get(found[0], found[0]), dim.dim_param)
