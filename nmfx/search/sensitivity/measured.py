"""The loss that each single choice costs, measured."""

from __future__ import annotations

import math

from nmfx.errors import SearchError
from nmfx.search.tables import Table, Tables
from nmfx.sparsity.pattern import Pattern


def loss_increases(tables: Tables) -> Table:
    """Measured loss increase of each single (site, option) on the held-back half, after BN recalibration.

    Never negative, and never less for a sparser option of the same M and V, or one of a larger V with the same N:M: what looks
    better than dense, or than masks of its own for each row, is noise.
    """
    trial, table, problem = tables.trial(), tables.zeros(), tables.problem
    dense = trial.loss({})
    if not math.isfinite(dense):
        raise SearchError(f"the loss of the dense model is {dense} on the data; look at the weights and the pictures")
    for i in problem.free:
        worst: dict[Pattern, float] = {}
        for option, pattern in sorted(enumerate(problem.options[i][:-1]), key=lambda one: (-one[1].density, one[1].vector)):
            increase = trial.loss({i: pattern}) - dense
            increase = increase if math.isfinite(increase) else 1e9
            milder = [loss for other, loss in worst.items() if other.m == pattern.m and other.vector <= pattern.vector]
            table[i][option] = worst[pattern] = max(0.0, increase, *milder)
    return table
