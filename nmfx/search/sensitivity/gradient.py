"""The second-order loss increase of what an option drops, from one backward pass a batch."""

from __future__ import annotations

import torch

from nmfx.masking.copies import throw_away_copy
from nmfx.models.site import weight_of
from nmfx.passes.calibration import batch_gradients
from nmfx.search.tables import Table, Tables


def directional_gradients(tables: Tables) -> Table:
    """``B / 2 E[(g . dw)^2]``: second-order loss increase with the empirical Fisher matrix for the Hessian, along the very
    change that an option makes (`g` the gradient over a batch of B pictures; Singh & Alistarh, 2020, eq. 4). It costs one
    backward pass a batch and one sum an option.
    """
    copied, table, batches = throw_away_copy(tables.model, None).eval(), tables.zeros(), tables.pictures.batches
    sites = {i: tables.problem.sites.sites[i] for i in tables.problem.free}
    masks = [(i, option, dropped) for i, option, _, dropped in tables.dropped(copied)]
    for count, gradients in batch_gradients(copied, list(sites.values()), batches):
        products = {
            i: None if gradient is None else (gradient * weight_of(copied, site).detach()).float()
            for (i, site), gradient in zip(sites.items(), gradients, strict=True)
        }
        for i, option, dropped in masks:
            if (product := products[i]) is not None:
                change = float(torch.where(dropped, product, 0.0).sum())
                table[i][option] += count / 2 * change**2 / len(batches)
    return table
