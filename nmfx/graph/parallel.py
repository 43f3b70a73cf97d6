"""Several processes over one model: DistributedDataParallel around masks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nmfx.graph.masked import masked_sites
from nmfx.graph.reading import mask_name
from nmfx.processes import world


def wrap(model: nn.Module, ignore: Iterable[str] = ()) -> nn.Module:
    """Under several processes, `model` in DDP; masks follow from the weights and, as the buffers in `ignore`, are not sent."""
    if world() == 1:
        return model
    own = [f"{masked.path}.{mask_name(masked.attr)}".lstrip(".") for masked in masked_sites(model)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*own, *ignore])
    return DistributedDataParallel(model)
