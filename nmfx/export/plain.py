"""A baked model for other tools: a plain state dict."""

from __future__ import annotations

from pathlib import Path

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
