"""Our solver beside scipy.optimize.milp (HiGHS): python benchmarks/solver.py [--seconds 20] [--only GLOB]   (needs scipy)

One row a problem: seconds, loss, proven gap, and how far above a budget the choice is, recounted in whole numbers. HiGHS gets
losses over their range, mip_rel_gap 0, and each budget in two forms: "integers" (costs above each site's cheapest, over their
common divisor) and "shares" (costs over the budget). Seconds are of the processor; the time limit is of the clock, so on a busy
machine HiGHS gets less. docs/search-study.md, "The solver", says what it shows.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

import nmfx
from nmfx.errors import SearchError
from nmfx.search.problem import make_problem
from nmfx.search.solver.lagrange import solve_all
from nmfx.search.tables import Tables

Problem = tuple[list[list[float]], list[list[list[int]]], list[int]]  # losses, costs by budget, limits

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "resnet50": torchvision.models.resnet50,
    "resnet34": torchvision.models.resnet34,
    "ViT-B": lambda: timm.create_model("vit_base_patch16_224"),
    "ViT-L": lambda: timm.create_model("vit_large_patch16_224"),
}


def of_models() -> Iterator[tuple[str, Problem]]:
    """Squared errors of random weights: one budget, several M, two budgets, made-up times."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, asked = make(), {"target": 0.875, "mixed": True}
        sites, draw = nmfx.find_sites(model), random.Random(name)
        more = {"limits": {"params": 0.125, "macs": "6x"}}
        forms: dict[str, dict[str, Any]] = {"params": asked, "macs": {**asked, "budget": "macs"}}
        forms |= {"params, M 8 16 32": {**asked, "m": (8, 16, 32)}, "macs, M 8 16 32": forms["macs"] | {"m": (8, 16, 32)}}
        forms["params, macs"] = more
        for form, options in forms.items():
            problem = make_problem(sites, **options)
            tables = Tables(problem, model).squared_errors
            costs = [list(map(list, prices)) for prices in problem.prices]
            yield f"{name}: {form}", (tables, costs, [budget.limit for budget in problem.budgets])
            if form == "params":
                times = [latency(draw, len(row)) for row in tables]
                half = sum(row[-1] for row in times) // 2
                yield f"{name}: times", (tables, [times], [half])
                yield f"{name}: times, params", (tables, [times, costs[0]], [half, 2 * problem.budget.limit])


def latency(draw: random.Random, options: int) -> list[int]:
    """Nanoseconds of the options of one site, dense last: noisy, not ordered by density."""
    dense = int(10 ** draw.uniform(4, 6.5))
    shares = (0.15 + 0.85 / 2**k for k in range(options - 1, 0, -1))
    return [int(dense * share * draw.uniform(0.7, 1.3)) + draw.randrange(2000) for share in shares] + [dense]


def made_up() -> Iterator[tuple[str, Problem]]:
    """Random, hard and degenerate tables."""
    draw = random.Random(0)
    losses = [sorted((draw.random() ** 3 for _ in range(5)), reverse=True) for _ in range(1000)]
    costs = [[[draw.randint(10**4, 10**6) * (i + 1) for i in range(5)] for _ in range(1000)] for _ in "ab"]
    quarter = [sum(row[-1] for row in table) // 4 for table in costs]
    yield "random 1,000 x 5", (losses, costs[:1], quarter[:1])
    yield "random 1,000 x 5, two", (losses, costs, quarter)
    for sites, options, noise in ((40, 12, 1000), (40, 12, 1), (1000, 5, 1000)):
        for seed in range(2):
            yield f"correlated {sites} x {options}, noise {noise}, seed {seed}", correlated(sites, options, noise, seed)
    yield "correlated 40 x 12, two", correlated(40, 12, 1000, 0, two=True)
    yield "zero losses", ([[0.0] * 5] * 50, [[[1, 2, 4, 8, 16]] * 50], [200])
    yield "forbidden options", ([[math.inf, 2.0, 1.0, 0.0]] * 50, [[[1, 2, 5, 9]] * 50], [230])
    yield "one option", ([[1.0]] * 50, [[[3]] * 50], [150])
    yield "infeasible", ([[1.0, 0.0]] * 50, [[[3, 4]] * 50], [149])
    far = [[1e12, 3e-9, 1e-9], [1e12, 2e-9, 1e-9], [2e-9, 1e-9]]
    yield "losses from 1e-9 to 1e12", (far, [[[0, 1, 3], [0, 1, 2], [0, 3]]], [4])


def correlated(sites: int, options: int, noise: float, seed: int, *, two: bool = False) -> Problem:
    """What a dearer option saves is its price but for a little noise."""
    draw = random.Random(seed)
    costs = [sorted(draw.randrange(10**6) for _ in range(options)) for _ in range(sites)]
    losses = [[10.0**6 - cost + draw.uniform(-noise, noise) for cost in row] for row in costs]
    tables = [costs] + ([[[draw.randrange(10**6) for _ in row] for row in costs]] if two else [])
    lows = [sum(map(min, table)) for table in tables]
    return losses, tables, [low + (sum(map(max, table)) - low) // 3 for low, table in zip(lows, tables, strict=True)]


def highs(problem: Problem, seconds: float, *, shares: bool) -> tuple[list[int], float] | None:
    """Options and gap of HiGHS; None where it finds no choice."""
    losses, prices, limits = problem
    sizes = [len(row) for row in losses]
    flat = np.concatenate([np.array(row) - min(row) for row in losses])
    forbidden = ~np.isfinite(flat)
    scale = flat[~forbidden].max() / 1e4 or 1.0
    rows = csr_array((np.ones(sum(sizes)), (np.repeat(np.arange(len(sizes)), sizes), np.arange(sum(sizes)))))
    constraints = [LinearConstraint(rows, 1, 1)]
    for costs, limit in zip(prices, limits, strict=True):
        above = [cost - min(row) for row in costs for cost in row]
        unit = math.gcd(*above) or 1
        if shares:
            constraints.append(LinearConstraint(np.concatenate(costs)[None] / limit, -np.inf, 1))
        else:
            room = (limit - sum(map(min, costs))) // unit
            constraints.append(LinearConstraint(np.array(above)[None] // unit, -np.inf, room))
    found = milp(
        np.where(forbidden, 0, flat / scale),
        constraints=constraints,
        integrality=1,
        bounds=Bounds(0, np.where(forbidden, 0, 1)),
        options={"mip_rel_gap": 0, "time_limit": seconds},
    )
    if found.x is None:
        return None
    parts = np.split(found.x, np.cumsum(sizes)[:-1])
    return [int(part.argmax()) for part in parts], (found.fun - found.mip_dual_bound) * scale


def row(name: str, who: str, took: float, problem: Problem, options: list[int] | None, gap: float) -> str:
    """One line of the table."""
    if options is None:
        return f"| {name} | {who} | {took:.2f} | no choice | | |"
    losses, prices, limits = problem
    loss = math.fsum(row[o] for row, o in zip(losses, options, strict=True))
    over = [sum(r[o] for r, o in zip(c, options, strict=True)) - most for c, most in zip(prices, limits, strict=True)]
    proven = "proven" if gap <= 1e-9 * abs(loss) else f"{gap:.3g}"
    return f"| {name} | {who} | {took:.2f} | {loss:.10g} | {proven} | {', '.join(str(o) for o in over if o > 0) or '-'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit of HiGHS, by the clock")
    parser.add_argument("--only", default="*", help="glob over the names of problems")
    args = parser.parse_args()
    print("| problem | solver | seconds | loss | gap | above the budget |\n|---|---|---|---|---|---|")
    for problems in (of_models, made_up):
        for name, problem in problems():
            if not fnmatch.fnmatch(name, args.only):
                continue
            start = time.process_time()
            try:
                choice = solve_all(*problem)
                ours = list(choice.options), 0.0 if choice.optimal else choice.gap
            except SearchError:
                ours = None
            print(row(name, "nmfx", time.process_time() - start, problem, *(ours or (None, 0.0))), flush=True)
            for who, shares in (("HiGHS, integers", False), ("HiGHS, shares", True)):
                start = time.process_time()
                found = highs(problem, args.seconds, shares=shares)
                print(row(name, who, time.process_time() - start, problem, *(found or (None, 0.0))), flush=True)


if __name__ == "__main__":
    main()
