"""A baked model for other tools: a plain state dict, or ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from nmfx.errors import CheckpointError
from nmfx.files.atomic import write_atomic
from nmfx.masking.owner import FOLDED
from nmfx.models.example import Example


def save_baked(model: nn.Module, path: Path, example: Example | None = None) -> None:
    """The state dict of a baked model as safetensors, under its own keys: any tool can load it. It needs no example.

    Raises:
        CheckpointError: a weight was folded that its original class would make anew, and wrongly, from what is loaded.
    """
    folded = {name: module.__dict__[FOLDED] for name, module in model.named_modules() if FOLDED in module.__dict__}
    if folded:
        name, kind = next(iter(folded.items()))
        raise CheckpointError(
            f"{path}: {name} was a {kind}, which standardises its weight; baked it is a plain layer, and its weight, loaded "
            f"into the original model, would be standardised again. Take the compressed checkpoint (no --baked), or ONNX"
        )
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomic(path, lambda temporary: save_file(state, temporary))


def save_onnx(model: nn.Module, path: Path, example: Example) -> None:
    """A baked model as ONNX with a free batch size, real zeros in its weights, through torch.onnx.

    Raises:
        CheckpointError: the exporter is not installed, or cannot express the model.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CheckpointError(f"ONNX export needs {error.name}: pip install 'nmfx[onnx]'") from None

    def write(temporary: Path) -> None:
        quiet = contextlib.redirect_stdout(io.StringIO())  # the exporter prints its own progress
        with warnings.catch_warnings(), quiet, torch.no_grad():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            batch = tuple({0: torch.export.Dim.DYNAMIC} if isinstance(a, torch.Tensor) else None for a in example.args)
            twice = example.doubled()  # a batch of one would be taken for a constant
            torch.onnx.export(
                model.eval(),
                twice.args,
                str(temporary),
                kwargs=twice.kwargs,
                dynamo=True,
                dynamic_shapes=batch,
                external_data=False,
                verbose=False,
            )

    try:
        write_atomic(path, write)
    except (RuntimeError, ValueError, TypeError, torch.onnx.OnnxExporterError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{path}: {type(model).__name__} cannot be exported to ONNX: {first}") from error
