"""The loss that each single choice costs, measured."""

from __future__ import annotations

import math

from nmfx.errors import SearchError
from nmfx.search.tables import Table, Tables


def loss_increases(tables: Tables) -> Table:
    """Measured loss increase of each single (site, option) on the held-back half, after BN recalibration.

    Never negative, and never less for a sparser option of the same M: what looks better than dense is noise.
    """
    trial, table, problem = tables.trial(), tables.zeros(), tables.problem
    dense = trial.loss({})
    if not math.isfinite(dense):
        raise SearchError(f"the loss of the dense model is {dense} on the data; look at the weights and the pictures")
    for i in problem.free:
        worst: dict[int, float] = {}
        for option, pattern in reversed(list(enumerate(problem.options[i][:-1]))):
            increase = trial.loss({i: pattern}) - dense
            increase = increase if math.isfinite(increase) else 1e9
            table[i][option] = worst[pattern.m] = max(worst.get(pattern.m, 0.0), increase)
    return table
