"""What each pattern still loses of a site's output once its kept weights are corrected."""

from __future__ import annotations

import torch

from nmfx.masking.weight import MaskSpec
from nmfx.models.site import weight_of
from nmfx.passes.correction import inputs_of
from nmfx.passes.fitting import solve
from nmfx.passes.gathering import products_of
from nmfx.passes.network import Network
from nmfx.search.tables import Table, Tables
from nmfx.sparsity.correction import Quadratic, Scaled

DAMPING = 0.01


@torch.no_grad()
def corrected_errors(tables: Tables) -> Table:
    """Squared error of each site's output after `nmfx.correct` with each option alone, as a share of its output's energy.

    One forward pass of the dense network; second moments of a site serve all its options. Sites that no product reads as they
    are stored have the share of the squared weights that is dropped.
    """
    problem, first = tables.problem, next(tables.model.parameters())
    index = {site.name: i for i, site in enumerate(problem.sites)}
    errors = {i: [0.0] * len(options) for i, options in enumerate(problem.options)}
    energies = dict.fromkeys(errors, 0.0)
    network = Network(tables.model, {})
    for name, product, moments in products_of(network, inputs_of(tables.pictures.batches, first.device)):
        i = index.get(name, -1)
        if i not in problem.free:
            continue
        scaled, dense = Scaled(moments), product.matrix(product.weight).float()
        lossless, quadratic = moments.error(dense), Quadratic.of(scaled, dense, DAMPING)
        for option, pattern in enumerate(problem.options[i][:-1]):
            spec = MaskSpec(name, pattern, problem.grouping(i, pattern))
            found = solve("admm", quadratic, dense, product, network.weights[name], spec)
            errors[i][option] += max(0.0, moments.error(found) - lossless) * moments.energy
        energies[i] += moments.energy
    table = tables.zeros()
    for i in problem.free:
        if energies[i]:
            table[i] = [error / energies[i] for error in errors[i]]
        else:
            weight = weight_of(tables.model, problem.sites.sites[i])
            whole = max(float(weight.detach().float().square().sum()), 1e-30)
            table[i] = [error / whole for error in tables.squared_errors[i]]
    return table
