"""Several processes that work together: which one this is, and sums over all of them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


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
