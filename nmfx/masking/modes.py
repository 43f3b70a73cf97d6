"""Modes of modules: train or eval, each module's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its mode back at the end: ``model.train(mode)`` would wake a frozen batch normalisation."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
