"""What masks that V adjacent outputs share cost in accuracy: python benchmarks/vector.py --data DIR [--network resnet56]

The published CIFAR-10 networks of benchmarks/correction.py (DIR is its --data) under 4:16 and 2:16 everywhere and data-free
knapsacks over N:16, each with V = 1, 2, 4, 8: corrected on 512 unlabelled pictures, then fine-tuned from there as
benchmarks/finetuning.py does, the same for every V. A seed draws the pictures of the correction, and the order and augmentation
of those of the training. `--order` lets similar outputs share instead of adjacent ones (a prototype that lives here alone), of
all weights or of those alone whose order is free (`inner`: the next weight's inputs can be renumbered); corrected only, unless
`--tune-ordered`. One JSON line a run in --out; what has a line is not run again. `--table` makes the tables of
docs/vector-study.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from correction import accuracy
from finetuning import FITTED, dense, labelled, options, read, record, said, train
from torch import Tensor, nn

import nmfx
from nmfx.masking.sites import masked_sites, respec
from nmfx.scheme import Scheme
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import check_groups
from nmfx.sparsity.pattern import VECTORS, Pattern

POOL = 4_000  # training pictures that those of the correction are drawn from
SCHEMES = ("4:16", "2:16", "0.75", "0.875")


@dataclass(frozen=True)
class Ordered(Grouping):
    """Outputs that share are adjacent in `order`, which is of all outputs of a run: a kernel would read it as an index of rows.

    What asks for the groups of a part of the rows (the `sweep` method of `nmfx.correct`) does not know of it.
    """

    order: tuple[int, ...] = ()

    def sums(self, scores: Tensor) -> Tensor:
        run, step = self.run
        return super().sums(scores.reshape(-1, run, step)[:, list(self.order)].reshape(self.rows))

    def spread(self, leading: Tensor) -> Tensor:
        run, step = self.run
        rows = super().spread(leading).reshape(-1, run, step)
        return rows[:, torch.tensor(self.order).argsort()].reshape(self.rows)


def similar(weight: Tensor, n: int, grouping: Grouping) -> tuple[int, ...]:
    """An order of outputs: pairs that lose least of their squares by sharing, greedily; then pairs of pairs, up to V."""
    (run, step), (outer, length, inner) = grouping.run, grouping.rows
    assert (outer, length * inner) == (run, step), "convolutions of one group and linears"
    squares = weight.detach().reshape(run, length // grouping.m, grouping.m, inner).square()
    sets, tail = [[row] for row in range(run)], list[int]()
    for _ in range(grouping.vector.bit_length() - 1):
        sums = torch.stack([squares[rows].sum(0) for rows in sets])
        alone, loss = kept(sums, n), torch.full((len(sets), len(sets)), torch.inf)
        for one in range(len(sets) - 1):
            loss[one, one + 1 :] = alone[one] + alone[one + 1 :] - kept(sums[one] + sums[one + 1 :], n)
        pairs, left = [], set(range(len(sets)))
        while len(left) > 1:
            pair = divmod(int(loss.argmin()), len(sets))
            pairs.append(sets[pair[0]] + sets[pair[1]])
            left -= set(pair)
            loss[list(pair)] = loss[:, list(pair)] = torch.inf
        sets, tail = pairs, [row for one in left for row in sets[one]] + tail
    return tuple(row for rows in [*sets, tail] for row in rows)


def kept(squares: Tensor, n: int) -> Tensor:
    """Sums of the `n` largest in every group; ``(..., groups, M, inner)``."""
    return squares.topk(n, dim=-2).values.sum((-3, -2, -1))


def order(model: nn.Module, what: str) -> None:
    """Give masked sites the order of their outputs: of `all`, or of the first convolutions of blocks (`inner`)."""
    for site in masked_sites(model):
        if what == "all" or site.name.endswith("conv1.weight"):
            grouping = site.spec.grouping
            plain = {field.name: getattr(grouping, field.name) for field in fields(Grouping)}
            respec([site], grouping=Ordered(**plain, order=similar(site.parameter, site.spec.pattern.n, grouping)))


@cache
def found_scheme(data: Path, network: str, what: str, vector: int) -> tuple[Any, Scheme]:
    model = dense(data, network)
    sites = nmfx.find_sites(model, torch.zeros(1, 3, 32, 32))
    if ":" in what:
        pattern = Pattern(what)
        return sites, Scheme.uniform(sites, Pattern(pattern.n, pattern.m, vector))
    return sites, nmfx.find_scheme(model, target=float(what), sites=sites, m=16, vector=vector).scheme


def fitted(data: Path, seed: int) -> list[Tensor]:
    drawn = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))[:FITTED]
    return list(labelled(data, "train", POOL)[0][drawn].split(32))


def run(args: argparse.Namespace, scheme: str, vector: int, seed: int) -> dict[str, Any]:
    sites, chosen = found_scheme(args.data, args.network, scheme, vector)
    model, start = nmfx.transform(dense(args.data, args.network), chosen, sites=sites), time.process_time()
    if args.order:
        order(model, args.order)
    nmfx.correct(model, fitted(args.data, seed), seed=seed)
    found = {"correction seconds": round(time.process_time() - start, 1), "report": args.report}
    found |= {"dropped": round(chosen.totals(sites).sparsity, 4), "macs dropped": round(chosen.totals(sites).mac_sparsity, 4)}
    found |= {"corrected": accuracy(model, labelled(args.data, "test", args.report))}
    if not args.order or args.tune_ordered:
        found |= train(args, model, seed)
    for site in masked_sites(model):
        check_groups(site.name, site.value, site.spec.pattern.n, site.spec.grouping)
    return found


KEY = ("network", "scheme", "vector", "order", "seed", "pictures", "epochs", "batch_size", "lr", "amp")
Records = list[dict[str, Any]]
PAIRS = (  # what takes about the same time, by the prototype of docs/vector-study.md: the first should be no slower
    (("4:16", 4), ("2:16", 1)),
    (("2:16", 4), ("1:16", 1)),
    (("0.75", 4), ("0.875", 1)),
)


def table(records: Records) -> None:
    """Means and standard deviations over seeds; differences are those of the same seed."""
    for measure, title in (("corrected", "After correction"), ("after", "After correction and fine-tuning")):
        for which, what in (("", "adjacent outputs share"), ("all", "similar outputs"), ("inner", "similar ones where free")):
            own = [one for one in records if measure in one and one["order"] == which]
            if own:
                print(f"\n{title}, {what}: top-1, then less V = 1; (1): seeds, where not three\n")
                rows(own, measure, [one for one in records if measure in one and one["vector"] == 1])
    plain = [one for one in records if not one["order"]]
    print("\n| network | at about the same time | corrected | fine-tuned |\n|---|---|---|---|")
    for network in dict.fromkeys(one["network"] for one in records):
        for first, second in PAIRS:
            cells = []
            for measure in ("corrected", "after"):
                one, other = (cell(plain, network, *side, measure) for side in (first, second))
                cells.append(said([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]))
            print(f"| {network} | {named(*first)} less {named(*second)} | {' | '.join(cells)} |")


def rows(own: Records, measure: str, alone: Records) -> None:
    print("| network | scheme | " + " | ".join(f"V = {vector}" for vector in VECTORS) + " |\n|---|---|---|---|---|---|")
    for network in dict.fromkeys(one["network"] for one in own):
        for scheme in dict.fromkeys([*SCHEMES, *(one["scheme"] for one in own)]):
            base, cells = cell(alone, network, scheme, 1, measure), []
            for vector in VECTORS:
                found = cell(own, network, scheme, vector, measure)
                less = [found[seed] - base[seed] for seed in sorted(found.keys() & base.keys())] if vector > 1 else []
                cells.append(", ".join(filter(None, (said(list(found.values())), said(less)))))
            if any(cells):
                print(f"| {network} | {scheme} | {' | '.join(cells)} |")


def cell(records: Records, network: str, scheme: str, vector: int, measure: str) -> dict[int, float]:
    """By seed."""
    asked = (network, scheme, vector)
    own = [one for one in records if (one["network"], one["scheme"], one["vector"]) == asked]
    return {one["seed"]: one[measure] for one in own if measure in one}


def named(scheme: str, vector: int) -> str:
    return f"{scheme}x{vector}" if ":" in scheme else f"{scheme} V = {vector}"


def main() -> None:
    parser = options(__doc__.splitlines()[0], Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--vectors", default="1,2,4,8")
    parser.add_argument("--order", choices=["", "all", "inner"], default="")
    parser.add_argument("--tune-ordered", action="store_true")
    args = parser.parse_args()
    if args.table:
        table(read(args.out))
        return
    for seed, scheme, vector in product(args.seeds.split(","), args.schemes.split(","), args.vectors.split(",")):
        record(args, KEY, {"scheme": scheme, "vector": int(vector), "seed": int(seed)}, run)


if __name__ == "__main__":
    main()
