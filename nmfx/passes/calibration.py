"""recalibrate_bn: batch normalisation statistics re-estimated after the weights have changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nmfx.errors import NmfxError
from nmfx.graph.modes import keep_modes


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace running means and variances by the average over `batches`, in place; the weights stay.

    One-shot N:M collapses these statistics: uniform 2:4 on EfficientNet-Lite0 scores 0 % without this step and about 40 % with
    it. A few hundred pictures are enough.

    Args:
        batches: inputs, or ``(input, label, ...)`` tuples, as a loader gives them; every batch counts alike.

    Returns:
        The number of batches seen. Models without batch normalisation see none.

    Raises:
        NmfxError: there are no batches; the statistics are left as they are.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        return 0
    first = next(remaining := iter(batches), None)
    if first is None:
        raise NmfxError("recalibrate_bn: no batches to re-estimate the statistics on")
    momenta = [module.momentum for module in norms]
    count, device = 0, next(model.parameters()).device
    with keep_modes(model):
        model.eval()  # dropout and drop path stay off: only the statistics are wanted
        try:
            for module in norms:
                module.reset_running_stats()
                module.momentum = None  # a cumulative average
                module.train()
            for batch in itertools.chain([first], remaining):
                model(_input_of(batch, device))
                count += 1
        finally:
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
    return count


def _input_of(batch: Any, device: torch.device) -> Tensor:
    x = batch[0] if isinstance(batch, list | tuple) else batch
    result: Tensor = x.to(device)
    return result
