"""A budget of MACs, alone and with a limit on the weights beside it, against a budget of weights. Five seconds.

    python examples/mac_budget.py

The stages of a ResNet do about as many MACs each, but the last one holds most of the weights, so the two budgets take from
opposite ends. The network is ResNet-18 with random weights; with trained ones (`weights="DEFAULT"`, a download) nothing
else changes. On the command line: `nmfx search --method knapsack --limit macs=4x --limit params=4x`.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torchvision.models import resnet18

from nmfx import find_scheme, find_sites

BUDGETS = {"params": {"params": "4x"}, "macs": {"macs": "4x"}, "both": {"macs": "4x", "params": "4x"}}  # times fewer


def main() -> None:
    torch.manual_seed(0)
    model = resnet18(weights=None)
    sites = find_sites(model)
    print(f"ResNet-18, random weights: {len(sites)} sites, {sites.weights:,} weights, {sites.macs:,} MACs\n")

    results = {}
    for name, limits in BUDGETS.items():
        result = results[name] = find_scheme(model, limits=limits, method="knapsack", sites=sites)
        spare = " and ".join(f"{left:,} {budget.kind}" for budget, left in zip(result.budgets, result.lefts, strict=True))
        print(f"budget {name:7} squared weight error {result.loss:.1%}, {spare} to spare")

    print(f"\n{'':12}{'share of all':^16}{'weights kept under budget':>27}")
    print(f"{'stage':12}{'weights':>8}{'MACs':>8}" + "".join(f"{name:>9}" for name in results))
    for stage, members in groupby(sites, lambda site: site.name.partition(".")[0]):
        stage_sites = list(members)
        weights, macs = sum(site.weights for site in stage_sites), sum(site.macs for site in stage_sites)
        kept = [sum(result.scheme.kept(site) for site in stage_sites) / weights for result in results.values()]
        print(f"{stage:12}{weights / sites.weights:8.1%}{macs / sites.macs:8.1%}" + "".join(f"{share:9.1%}" for share in kept))
    totals = [result.totals for result in results.values()]
    print(f"{'all weights':28}" + "".join(f"{1 - total.sparsity:9.1%}" for total in totals))
    print(f"{'all MACs':28}" + "".join(f"{1 - total.mac_sparsity:9.1%}" for total in totals))


if __name__ == "__main__":
    main()
