"""Several processes over one model: who this one is, sums over all, and DistributedDataParallel around masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nmfx.graph.masked import masked_sites
from nmfx.graph.reading import mask_name


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place; every process has to ask."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def wrap(model: nn.Module, ignore: Iterable[str] = ()) -> nn.Module:
    """Under several processes, `model` in DDP; masks follow from the weights and, as the buffers in `ignore`, are not sent."""
    if world() == 1:
        return model
    own = [f"{masked.path}.{mask_name(masked.attr)}".lstrip(".") for masked in masked_sites(model)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*own, *ignore])
    return DistributedDataParallel(model)
