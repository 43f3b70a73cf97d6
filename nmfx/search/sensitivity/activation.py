"""The share of its output's energy that a site loses, by the second moments of its inputs."""

from __future__ import annotations

from nmfx.masking.copies import throw_away_copy
from nmfx.passes.calibration import input_squares
from nmfx.search.tables import Table, Tables


def output_errors(tables: Tables) -> Table:
    """Squared error of each site's own output, as a share of its output's energy: ``sum_dropped w^2 E[x^2]`` over the same sum
    of all weights, `x` being the input each weight meets (uncorrelated inputs assumed; Wanda, Sun et al., 2024, scores so).
    """
    copied, table, sites = throw_away_copy(tables.model, None).eval(), tables.zeros(), tables.problem.sites
    squares = input_squares(copied, sites, tables.pictures.batches)
    for i, option, weight, dropped in tables.dropped(copied):
        rows = sites.sites[i].rows
        energy = weight.float().square().reshape(rows) * squares[sites.sites[i].name]
        table[i][option] = float((energy * dropped.reshape(rows)).sum() / energy.sum().clamp_min(1e-30))
    return table
