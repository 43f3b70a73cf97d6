"""What a search costs: python benchmarks/search_speed.py [step] [gradient] [knapsack] [free]   (all by default)

step: an iteration of DominoSearch against a plain training step, interleaved; gradient: the table of squared directional
gradients against plain forward and backward passes over the same pictures; knapsack: 1,000 sites with 6 patterns; free:
data-free Domino and knapsack on ResNet-50. Ratios are of medians within one run.
"""

from __future__ import annotations

import copy
import random
import statistics
import sys
import time

import torch
import torchvision
from torch import nn

import nmfx
from nmfx.passes.calibration import Calibration
from nmfx.search.problem import make_problem
from nmfx.search.solver.knapsack import solve
from nmfx.search.tables import Tables


def _batch(size: int, count: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(size, 3, 224, 224), torch.randint(0, 1000, (size,))) for _ in range(count)]


def step(pairs: int = 21) -> None:
    """ResNet-18, batch 32 (published: 64): plain SGD steps against masked ones with search.step(); votes spread over them."""
    plain, (x, y) = torchvision.models.resnet18().train(), _batch(32)[0]
    searched = copy.deepcopy(plain)
    search = nmfx.DominoSearch(searched, 0.9, example_input=x[:1])
    optimizers = {id(m): torch.optim.SGD(m.parameters(), lr=0.001) for m in (plain, searched)}

    def run(model: nn.Module, domino: nmfx.DominoSearch | None) -> float:
        start = time.perf_counter()
        optimizers[id(model)].zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if domino is not None:
            domino.step()
        optimizers[id(model)].step()
        return time.perf_counter() - start

    ratios, times = [], {True: [], False: []}
    for index in range(pairs):
        order = (True, False) if index % 2 else (False, True)
        found = {masked: run(searched if masked else plain, search if masked else None) for masked in order}
        ratios.append(found[True] / found[False])
        for masked in order:
            times[masked].append(found[masked])
    vote = time.perf_counter()
    search.count_votes(search.voters())
    vote = time.perf_counter() - vote
    both = [statistics.median(times[masked]) for masked in (True, False)]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"search step {both[0]:.3f} s, plain step {both[1]:.3f} s")
    print(f"ratio: median {statistics.median(ratios):.3f} of {pairs} pairs ({spread})")
    print(f"a round of votes takes {vote:.3f} s, once in 100 steps: {vote / 100 / both[1]:.3%} of a plain step")


def gradient(pictures: int = 256, size: int = 16, repeats: int = 2) -> None:
    """ResNet-50: forward and backward with and without the table."""
    model, batches = torchvision.models.resnet50().eval(), _batch(size, pictures // size)
    problem = make_problem(nmfx.find_sites(model), target=0.875)
    rounds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for x, y in batches:
            torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        middle = time.perf_counter()
        Tables(problem, model, calibration=Calibration.of(batches)).table("gradient")
        rounds.append((time.perf_counter() - middle, middle - start))
    ratio = statistics.median(table / plain for table, plain in rounds)
    print(
        f"gradient table over {pictures} pictures {rounds[-1][0]:.1f} s, plain passes {rounds[-1][1]:.1f} s, ratio {ratio:.3f}"
    )


def knapsack(sites: int = 1000, patterns: int = 6) -> None:
    """Random tables with falling losses."""
    draw, times = random.Random(0), []
    for _ in range(5):
        losses = [sorted((draw.random() ** 3 for _ in range(patterns)), reverse=True) for _ in range(sites)]
        costs = [[draw.randint(10**4, 10**6) * (i + 1) for i in range(patterns)] for _ in range(sites)]
        budget = sum(row[-1] for row in costs) // 4
        start = time.perf_counter()
        choice = solve(losses, costs, budget)
        times.append(time.perf_counter() - start)
        assert choice.gap == 0, choice.gap
    print(f"knapsack, {sites} x {patterns}, exact: median {statistics.median(times):.3f} s, most {max(times):.3f} s")


def free() -> None:
    """Data-free searches of ResNet-50, sites found beforehand."""
    model = torchvision.models.resnet50()
    sites = nmfx.find_sites(model)
    for method in ("domino", "knapsack"):
        for budget in ("params", "macs"):
            result = nmfx.find_scheme(model, sites=sites, method=method, budget=budget)
            print(f"ResNet-50 {method} {budget}: {result.seconds:.2f} s")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["step", "gradient", "knapsack", "free"]:
        globals()[name]()
