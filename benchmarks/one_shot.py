"""One-shot accuracy of EfficientNet-Lite0 (ImageNet weights) on 20 labelled pictures: python benchmarks/one_shot.py

No training: schemes at half the weights, batch normalisation recalibrated on 320 augmented pictures. One picture is 5 points.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import nmfx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pictures import calibration, labelled, lite0

SEARCHES = {
    "uniform": {"method": "uniform"},
    "Domino": {"method": "domino"},
    "ERK": {"method": "erk"},
    "knapsack": {"method": "knapsack"},
    "knapsack, any N": {"method": "knapsack", "candidates": range(1, 17)},
}


def main() -> None:
    """Print one line for each scheme."""
    torch.set_num_threads(2)
    model, data = lite0(), [labelled()]
    print(f"{'dense':<16} top-1 {nmfx.evaluate(model, data).top1:.0%}")
    schemes = {name: nmfx.find_scheme(model, target=0.5, **options).scheme for name, options in SEARCHES.items()}
    sites = nmfx.find_sites(model)
    for name, scheme in {**schemes, "2:4 everywhere": nmfx.Scheme.uniform(sites, "2:4")}.items():
        converted = nmfx.transform(model, scheme, sites=sites)
        before = nmfx.evaluate(converted, data).top1
        nmfx.recalibrate_bn(converted, calibration())
        after, totals = nmfx.evaluate(converted, data), scheme.totals(sites)
        print(
            f"{name:<16} top-1 {after.top1:.0%}, top-5 {after.top5:.0%} ({before:.0%} before), sparsity {totals.sparsity:.4f}"
        )


if __name__ == "__main__":
    main()
