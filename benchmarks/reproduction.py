"""The runs of docs/reproduction.md: python benchmarks/reproduction.py [--out benchmarks/reproduction.jsonl] [--jobs 2]

The pattern of the paper's tables 4 and 5 (uniform, layer-wise with eta, without eta; by parameters and by MACs) and of its
ablations E3 to E7, with distillation and sparse-to-sparser beside them: a ResNet-20 on Fashion-MNIST, three seeds, equal
budgets. One JSON line a run; what has a line is not run again. `--write docs/reproduction.md` makes the tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from search_study import SIZE, cut, put, resnet20
from torch import nn

import nmfx
from nmfx.data.loader import train_loader, validation_loader
from nmfx.data.source import Data, open_data
from nmfx.search.domino_run import run_domino

SEEDS = (0, 1, 2)
TRAIN, WATCHED = 8_000, 500  # pictures of an epoch; those an epoch is watched with. Figures are of all 10,000 test pictures
DENSE_EPOCHS, EPOCHS = 24, 12  # a tenth of the paper's 120, 100 and 90
LR, BATCH, DECAY = 0.05, 64, 2e-4
LOOP = {"decay": 5.0, "vote_every": 5}  # the published loop, shortened as in docs/search-study.md
BUDGETS = [(kind, target) for kind in ("params", "macs") for target in (0.75, 0.875)]
SCHEMES = ("uniform", "layer-wise", "layer-wise, no eta")
FINAL = ("params", 0.875)
WAYS: dict[str, dict[str, Any]] = {
    "E3: SR-STE, 10 epochs, random start": {"epochs": 10, "start": "random"},
    "E4: SR-STE, 12 epochs, random start": {"start": "random"},
    "E6: SR-STE, 9 epochs, pretrained": {"epochs": 9},
    "E7: ASP, 12 epochs, pretrained": {"training": "fixed"},
    "STE (lambda 0), 12 epochs, pretrained": {"training": "ste"},
    "SR-STE, 12 epochs, distilled (0.5, T = 2)": {"distill": 0.5, "temperature": 2.0},
    "SR-STE, 6 epochs at 0.75, then 6 at 0.875": {"through": 0.75, "epochs": 6},
}


@cache
def pictures() -> Data:
    """Part of the training pictures of Fashion-MNIST; test pictures only to watch."""
    data = open_data("fashion-mnist")
    return Data("fashion-mnist", 10, (), cut(data.train, TRAIN), cut(data.validation, WATCHED), data.shape)


@cache
def test_batches() -> list[Any]:
    """All test pictures."""
    return list(validation_loader(open_data("fashion-mnist"), SIZE, batch_size=250))


def settings(seed: int, epochs: int = EPOCHS, **options: Any) -> nmfx.Settings:
    """The same for all runs, but for what a row is about."""
    return nmfx.Settings(epochs=epochs, batch_size=BATCH, lr=LR, weight_decay=5e-4, seed=seed, **options)


def random_net(seed: int) -> nn.Module:
    """Random weights."""
    torch.manual_seed(seed)
    return resnet20()


@cache
def dense(seed: int) -> nn.Module:
    """The trained dense network; kept on disk between runs."""
    path, model = Path(f"reproduction-{seed}.pt"), random_net(seed)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    nmfx.finetune(model, pictures(), settings=settings(seed, DENSE_EPOCHS), config=SIZE)
    torch.save(model.state_dict(), path)
    return model


def train_dense(seed: int) -> None:
    """Leave the dense network on disk; tensors do not outlive the process that would send them."""
    dense(seed)


@cache
def scheme_for(seed: int, name: str, kind: str, target: float) -> nmfx.Scheme:
    """Never above the budget."""
    model, example = copy.deepcopy(dense(seed)), torch.zeros(1, 1, 28, 28)
    if name == "uniform":
        return nmfx.find_scheme(model, target=target, budget=kind, method="uniform", example_input=example).scheme
    loader = train_loader(pictures(), SIZE, batch_size=BATCH, seed=seed)
    options = {"eta": name == "layer-wise", "seed": seed, **LOOP}
    return run_domino(model, loader, target, budget=kind, example_input=example, **options).scheme  # type: ignore[arg-type]


def train(seed: int, scheme: nmfx.Scheme, *, start: str = "dense", training: str = "sr-ste", **options: Any) -> nn.Module:
    """A converted network, fine-tuned."""
    model = copy.deepcopy(dense(seed)) if start == "dense" else random_net(seed)
    model = nmfx.transform(model, scheme, example_input=torch.zeros(1, 1, 28, 28), training=training, decay=DECAY)
    teacher = copy.deepcopy(dense(seed)) if "distill" in options else None
    nmfx.finetune(model, pictures(), settings=settings(seed, **options), config=SIZE, teacher=teacher)
    return model


def run(seed: int, kind: str, target: float, name: str) -> dict[str, Any]:
    """One row of one seed."""
    begin = time.perf_counter()
    record: dict[str, Any] = {"seed": seed, "budget": kind, "target": target, "name": name}
    if name == "dense":
        return record | {"top1": nmfx.evaluate(dense(seed), test_batches()).top1}
    if name == "dense, 12 epochs more":
        model = copy.deepcopy(dense(seed))
        nmfx.finetune(model, pictures(), settings=settings(seed), config=SIZE)
        return record | {"top1": nmfx.evaluate(model, test_batches()).top1}
    how = dict(WAYS.get(name, {}))
    scheme = scheme_for(seed, name if name in SCHEMES else "layer-wise", kind, target)
    if through := how.pop("through", None):
        model = train(seed, scheme_for(seed, "layer-wise", kind, through), **how)
        sparse = nmfx.bake(model)  # continue: the search starts at the sparse weights
        example = torch.zeros(1, 1, 28, 28)
        scheme = nmfx.find_scheme(sparse, target=target, budget=kind, method="domino", example_input=example).scheme
        model = nmfx.transform(sparse, scheme, example_input=torch.zeros(1, 1, 28, 28), decay=DECAY)
        nmfx.finetune(model, pictures(), settings=settings(seed, **how), config=SIZE)
    else:
        model = train(seed, scheme, **how)
    nmfx.verify(model)
    totals = scheme.totals(nmfx.find_sites(dense(seed), torch.zeros(1, 1, 28, 28)))
    record |= {"kept": totals.kept / totals.weights, "kept_macs": totals.kept_macs / totals.macs}
    found = nmfx.evaluate(model, test_batches())
    return record | {"top1": found.top1, "loss": found.loss, "seconds": time.perf_counter() - begin}


def tasks(seed: int) -> list[tuple[Any, ...]]:
    """All rows of a seed."""
    rows = [(seed, "params", 0.0, name) for name in ("dense", "dense, 12 epochs more")]
    rows += [(seed, *budget, name) for budget in BUDGETS for name in SCHEMES]
    return rows + [(seed, *FINAL, name) for name in WAYS]


def work(rows: list[tuple[Any, ...]], out: str) -> None:
    """Run rows one after the other."""
    torch.set_num_threads(1)
    for row in rows:
        record = run(*row)
        with Path(out).open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), file=sys.stderr, flush=True)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/reproduction.jsonl")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path, help="only write the tables into this file, between its two markers")
    args = parser.parse_args()
    lines = Path(args.out).read_text().splitlines() if Path(args.out).exists() else []
    records = {_row(record): record for record in map(json.loads, lines)}
    if args.write:
        put(args.write, tables(records))
        return
    missing = [[row for row in tasks(seed) if row not in records] for seed in SEEDS]
    pieces = [rows[i::3] for rows in missing for i in range(3) if rows[i::3]]  # small enough to even out
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        pool.map(train_dense, SEEDS, chunksize=1)  # once, before the pieces ask for them together
        pool.starmap(work, [(rows, args.out) for rows in pieces], chunksize=1)


def _row(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("seed", "budget", "target", "name"))


def tables(records: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """The two tables, mean and sample deviation over the seeds in % top-1."""

    def cell(kind: str, target: float, name: str, measure: str = "top1") -> str:
        values = [records[row][measure] for seed in SEEDS if (row := (seed, kind, target, name)) in records]
        if not values:
            return "-"
        spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{100 * statistics.mean(values):.2f}{spread}"

    more = "dense, 12 epochs more"
    lines = [f"Dense: {cell('params', 0.0, 'dense')}; after the same 12 epochs more: {cell('params', 0.0, more)}", ""]
    lines += ["| scheme | " + " | ".join(f"{kind}, {target:.1%}" for kind, target in BUDGETS) + " |", "|---" * 5 + "|"]
    lines += [f"| {name} | " + " | ".join(cell(*budget, name) for budget in BUDGETS) + " |" for name in SCHEMES]
    lines += ["", "| layer-wise, 87.5 % of parameters | top-1 |", "|---|---|"]
    lines += [f"| E5: SR-STE, 12 epochs, pretrained | {cell(*FINAL, 'layer-wise')} |"]
    lines += [f"| {name} | {cell(*FINAL, name)} |" for name in WAYS]
    kept = [f"{cell(*budget, name, 'kept')} / {cell(*budget, name, 'kept_macs')}" for name in SCHEMES for budget in BUDGETS]
    lines += ["", "Kept parameters / MACs in % (mean over seeds):", ""]
    lines += ["| scheme | " + " | ".join(f"{kind}, {target:.1%}" for kind, target in BUDGETS) + " |", "|---" * 5 + "|"]
    lines += [f"| {name} | " + " | ".join(kept[4 * i : 4 * i + 4]) + " |" for i, name in enumerate(SCHEMES)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
