"""Time and memory of convert and search, each in a process of its own: python benchmarks/convert_search.py [MODEL ...]

Convert is what `nmfx convert --pattern 4:16` does after building: find the sites, verify the swap, mask, verify the groups.
Times are after imports; memory is the peak above what the process held before the model was built, as a multiple of it.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time

MODELS = ["torchvision:resnet50", "timm:vit_large_patch16_224"]


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, what: str) -> None:
    """Print one line for one step on one model: `what` is convert, or a search as method/budget."""
    import torch

    import nmfx
    from nmfx.models.building import build_model
    from nmfx.passes.transform import conversion_difference
    from nmfx.stages.work import example_of

    torch.randn(64, 64) @ torch.randn(64, 64)  # thread pools and allocator in place
    nmfx.find_sites(build_model("torchvision:resnet18", weights="none").model)  # imports of the model libraries
    before = _peak()
    model = build_model(name, weights="none").model
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    start = time.perf_counter()
    if what == "convert":
        example = example_of(model, None)
        sites = nmfx.find_sites(model, example)
        difference = conversion_difference(model, sites, example)
        nmfx.transform(model, "4:16", sites=sites, inplace=True)
        note = f"{nmfx.verify(model).sites} sites, difference {difference:g}"
    else:
        method, budget = what.split("/")
        result = nmfx.find_scheme(model, target=0.875, method=method, budget=budget)
        note = f"{len(result.events)} steps, sparsity {result.totals.sparsity:.4f}, {result.totals.mac_sparsity:.4f} of MACs"
    seconds = time.perf_counter() - start
    print(f"{name} ({size:.0f} MiB)  {what:<16} {seconds:6.2f} s, peak {(_peak() - before) / size:.2f} x the model; {note}")


def main() -> None:
    """A fresh process for each model and step."""
    for name in sys.argv[1:] or MODELS:
        for what in ("convert", "domino/params", "domino/macs", "knapsack/params", "knapsack/macs"):
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, what))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
