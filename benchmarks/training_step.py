"""A training step of a converted network against its dense original, in one run: python benchmarks/training_step.py

ResNet-50 at 224 px, SGD with momentum; every site that can take it 4:16, SR-STE. Steps alternate between dense and converted,
so that a change of the machine's speed meets both; the median of the pairwise ratios is what counts. `--argsort` also times a
mask by argsort in every forward, as the published code makes it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

import nmfx
from nmfx.masking.sites import masked_sites
from nmfx.models.building import build_model
from nmfx.sparsity.mask import make_mask


class ArgsortMask(nn.Module):
    """The published way, as a parametrization: sort every group in every forward."""

    def __init__(self, spec: object) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, weight: Tensor) -> Tensor:
        return weight * make_mask(weight, self.spec.pattern.n, self.spec.grouping)


def argsort_model(name: str, scheme: str) -> nn.Module:
    """The dense model with `ArgsortMask` on every site."""
    model = build_model(name, weights="none").model
    specs = [(site.path, site.attr, site.spec) for site in masked_sites(nmfx.transform(model, scheme))]
    for path, attr, spec in specs:
        nn.utils.parametrize.register_parametrization(model.get_submodule(path), attr, ArgsortMask(spec))
    return model


def step_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One training step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-5)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--pattern", default="4:16")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--argsort", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    dense = build_model(args.model, weights="none").model
    models = {"dense": dense, "nmfx": nmfx.transform(dense, args.pattern)}
    models |= {"argsort": argsort_model(args.model, args.pattern)} if args.argsort else {}
    print(f"{args.model}, {args.pattern}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for batch in args.batches:
        x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
        steps = {name: step_of(model, x, y) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(args.rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if turn:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            ratios = [t / d for t, d in zip(times, seconds["dense"], strict=True)]
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"batch {batch:>3}  {name:<8} median {median(times):.3f} s, {median(ratios):.3f} of dense ({spread})")


if __name__ == "__main__":
    main()
