"""The squared weights that each option drops: the sensitivity that needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from nmfx.search.tables import Table, Tables


def squared_errors(tables: Tables) -> Table:
    """Sum of the squared weights that each option drops, for every site; 0 for dense."""
    problem, table = tables.problem, tables.zeros()
    if tables.score != "magnitude":
        for i, option, weight, dropped in tables.dropped(tables.model):
            table[i][option] = float(weight[dropped].square().sum(dtype=torch.float64))
        return table
    for i in problem.free:  # what a mask by magnitudes drops can be read off the sorted groups, of one M and V at once
        energies: dict[tuple[int, int], Tensor] = {}  # (m,): of the largest of each group, of the second largest, ...
        for option, pattern in enumerate(problem.options[i]):
            if not pattern.is_dense:
                if (group := (pattern.m, pattern.vector)) not in energies:
                    energies[group] = tables.squares(i, pattern)
                table[i][option] = float(energies[group][pattern.n :].sum())
    return table
