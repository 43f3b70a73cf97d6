"""The study of docs/search-study.md: python benchmarks/search_study.py [--out study.jsonl] [--jobs 2] [--only GLOB]

Every search method at the same budgets, three networks: EfficientNet-Lite0 with ImageNet weights (one-shot, two folds of 20
pictures), a ResNet-20 and a small ViT trained on Fashion-MNIST (one-shot, and after equal fine-tuning; three seeds). One JSON
line a run; runs that have a line are not run again. `--write docs/search-study.md` makes the tables.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import nmfx
from nmfx.data.config import PictureConfig
from nmfx.data.loader import train_loader
from nmfx.data.pictures import ArrayPictures
from nmfx.data.sample import calibration
from nmfx.data.source import Data, open_data
from nmfx.report.canvas import save_figure
from nmfx.report.measured import draw_accuracy
from nmfx.report.record import Point
from nmfx.search.domino_run import run_domino
from nmfx.settings.methods import SENSITIVITIES, Sensitivity, resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TARGETS = {"resnet20": (0.5, 0.75, 0.875), "vit": (0.5, 0.75, 0.875), "lite0": (0.3, 0.4, 0.5)}
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "ERK": {"method": "erk"},
    "Domino": {"method": "domino"},
    "knapsack, weight": {"method": "knapsack"},
    "knapsack, activation": {"method": "knapsack", "sensitivity": "activation"},
    "knapsack, gradient": {"method": "knapsack", "sensitivity": "gradient"},
    "knapsack, measured": {"method": "knapsack", "sensitivity": "measured"},
    "spdy": {"method": "spdy"},
    "Domino with data": {},
}
NETWORKS = {"resnet20": (0, 1, 2), "lite0": (0, 1), "vit": (0, 1, 2)}  # the folds, or the seeds
TRAIN, TEST = 20_000, 4_000  # pictures of Fashion-MNIST
DENSE_EPOCHS, TUNE_STEPS, BATCH = 4, 80, 64
SPDY_SECONDS = 15.0
LOOP = {"decay": 5.0, "vote_every": 5}  # the published loop, 50 times stronger and votes 20 times as often
SIZE = PictureConfig((1, 28, 28), (0.286,), (0.353,))


def budgets(network: str) -> list[tuple[str, float]]:
    """Three of parameters and three of MACs; Lite0, whose depthwise sites stay dense, collapses beyond a half."""
    return [(kind, target) for kind in ("params", "macs") for target in TARGETS[network]]


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut; the shortcut of a wider block is a 1x1 convolution."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if stride > 1 or width != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def resnet20() -> nn.Module:
    """The CIFAR ResNet-20 (16, 32, 64 channels, three blocks each) with a stem of stride 2 for 28x28 pictures."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for out in (16, 32, 64):
        for index in range(3):
            layers.append(Block(width, out, 2 if index == 0 and out > 16 else 1))
            width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vit() -> nn.Module:
    """49 tokens of 64 numbers, four blocks."""
    options = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10}
    return timm.models.VisionTransformer(**options, embed_dim=64, depth=4, num_heads=4)


def cut(part: Any, count: int) -> ArrayPictures:
    """The first pictures of Fashion-MNIST."""
    return ArrayPictures(part.pictures[:count], part.labels[:count], part.top, 2, part.hflip)


@cache
def pictures() -> Data:
    """Part of Fashion-MNIST."""
    data = open_data("fashion-mnist")
    return Data("fashion-mnist", 10, (), cut(data.train, TRAIN), cut(data.validation, TEST), data.shape)


@cache
def test_batches() -> list[tuple[Tensor, Tensor]]:
    """Held-out pictures in batches."""
    from nmfx.data.loader import validation_loader

    return list(validation_loader(pictures(), SIZE, batch_size=250))


def train(model: nn.Module, steps: int, lr: float, seed: int, *, epoch: int = 0) -> nn.Module:
    """SGD with momentum (AdamW for the transformer), cosine to 0; the same for every scheme."""
    loader = train_loader(pictures(), SIZE, batch_size=BATCH, seed=seed)
    if isinstance(model, timm.models.VisionTransformer):
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=lr / 20, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], steps, pct_start=0.1)
    model.train()
    done = 0
    while done < steps:
        loader.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
        epoch += 1
    return model.eval()


def tune(model: nn.Module, network: str, seed: int) -> nn.Module:
    """The same fine-tuning for every scheme, and for the dense network."""
    return train(model, TUNE_STEPS, 0.05 if network == "resnet20" else 0.02, seed, epoch=50)


@cache
def dense(network: str, seed: int) -> nn.Module:
    """The trained dense network; kept on disk between runs."""
    if network == "lite0":
        from pictures import lite0

        return lite0()
    path = Path(f"study-{network}-{seed}.pt")
    torch.manual_seed(seed)
    model = {"resnet20": resnet20, "vit": vit}[network]()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, DENSE_EPOCHS * (TRAIN // BATCH), 0.1 if network == "resnet20" else 0.04, seed)
    torch.save(model.state_dict(), path)
    return model


@cache
def evidence(network: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """What data-driven searches look at: 256 training pictures, or ten of the twenty, augmented."""
    if network != "lite0":
        return calibration(pictures(), SIZE, count=256, batch_size=32, seed=seed)
    from pictures import calibration as augmented
    from pictures import labelled

    fold = torch.arange(20) % 2 == seed
    return [(x[fold], labelled()[1][fold]) for x in augmented()]


@cache
def recalibration(network: str, seed: int) -> list[Any]:
    """Pictures for batch statistics, the same for every scheme: no labels."""
    if network != "lite0":
        return [x for x, _ in calibration(pictures(), SIZE, count=512, batch_size=64, seed=100 + seed)]
    from pictures import calibration as augmented

    return list(augmented())


@cache
def tests(network: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Pictures that no search has seen."""
    if network != "lite0":
        return test_batches()
    from pictures import labelled

    fold = torch.arange(20) % 2 != seed
    return [(labelled()[0][fold], labelled()[1][fold])]


@cache
def table(name: str, network: str, seed: int, problem_key: str) -> tuple[Any, float]:
    """A sensitivity of one network, computed once for all budgets: its table, and the seconds it took."""
    tables = _pending[problem_key]
    start = time.perf_counter()
    return resolve(ORIGINAL[name].function)(tables), time.perf_counter() - start


ORIGINAL, _pending = {name: one for name, one in SENSITIVITIES.items() if one.pictures}, dict[str, Any]()


def search(network: str, seed: int, kind: str, target: float, method: str) -> tuple[Any, float]:
    """A scheme, and the seconds the search took."""
    model, data = dense(network, seed), evidence(network, seed)
    example, start, saved = data[0][0][:1], time.perf_counter(), [0.0]
    for name in ORIGINAL:

        def once(tables: Any, name: str = name) -> Any:
            key = str(tables.problem.options)
            _pending[key] = tables
            before = time.perf_counter()
            found, seconds = table(name, network, seed, key)
            saved[0] += max(0.0, seconds - (time.perf_counter() - before))
            return found

        SENSITIVITIES[name] = Sensitivity(once, pictures=True, labels=ORIGINAL[name].labels)
    if method == "Domino with data":
        loader = train_loader(pictures(), SIZE, batch_size=BATCH, seed=seed)
        found = run_domino(model, loader, target, budget=kind, example_input=example, seed=seed, **LOOP)  # type: ignore[arg-type]
        return found.scheme, time.perf_counter() - start
    options = {"seconds": SPDY_SECONDS, "seed": seed} if method == "spdy" else {}
    asked = {"target": target, "budget": kind, "example_input": example, "options": options, **METHODS[method]}
    result = nmfx.find_scheme(model, data=data if method.startswith(("knapsack, ", "spdy")) else None, **asked)
    return result.scheme, result.seconds + saved[0]


def run(network: str, seed: int, kind: str, target: float, method: str) -> dict[str, Any]:
    """One scheme: found, measured one-shot after BN recalibration, and after fine-tuning."""
    model = dense(network, seed)
    record: dict[str, Any] = {"network": network, "seed": seed, "budget": kind, "target": target, "method": method}
    if method == "dense":
        found = nmfx.evaluate(model, tests(network, seed))
        record |= {"one_shot": found.top1, "one_shot_loss": found.loss}
        if network != "lite0":  # the same steps once more: what fine-tuning alone does
            tuned = tune(copy.deepcopy(model), network, seed)
            record |= {"tuned": nmfx.evaluate(tuned, tests(network, seed)).top1}
        return record
    example = evidence(network, seed)[0][0][:1]
    sites = nmfx.find_sites(model, example)
    scheme, record["seconds"] = search(network, seed, kind, target, method)
    totals = scheme.totals(sites)
    record |= {"kept": totals.kept / totals.weights, "kept_macs": totals.kept_macs / totals.macs}
    record["loss"] = _weight_loss(model, sites, scheme)
    converted = nmfx.transform(model, scheme, sites=sites)
    nmfx.recalibrate_bn(converted, recalibration(network, seed))
    found = nmfx.evaluate(converted, tests(network, seed))
    record |= {"one_shot": found.top1, "one_shot_loss": found.loss}
    if network != "lite0":
        tuned = tune(nmfx.transform(model, scheme, sites=sites, decay=2e-4), network, seed)
        nmfx.verify(tuned)
        found = nmfx.evaluate(tuned, tests(network, seed))
        record |= {"tuned": found.top1, "tuned_loss": found.loss}
    return record


@torch.no_grad()
def _weight_loss(model: nn.Module, sites: nmfx.Sites, scheme: nmfx.Scheme) -> float:
    """Squared weight error of a scheme, as a share of all squared weights of its sites."""
    converted = nmfx.bake(nmfx.transform(copy.deepcopy(model), scheme, sites=sites))
    pairs = [
        (p, q) for (name, p), q in zip(model.named_parameters(), converted.parameters()) if name in {s.name for s in sites}
    ]
    return float(sum((p - q).square().sum() for p, q in pairs) / sum(p.square().sum() for p, _ in pairs))


def work(tasks: list[tuple[Any, ...]], out: str) -> None:
    """Run tasks one after the other."""
    torch.set_num_threads(1)
    for task in tasks:
        try:
            record = run(*task)
        except nmfx.NmfxError as error:
            record = dict(zip(("network", "seed", "budget", "target", "method"), task)) | {"error": str(error)}
        with Path(out).open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record)[:220], file=sys.stderr, flush=True)


def tasks() -> list[tuple[Any, ...]]:
    """Everything, a network after the other."""
    found: list[tuple[Any, ...]] = []
    for network, seeds in NETWORKS.items():
        methods = [m for m in METHODS if network != "lite0" or m != "Domino with data"]
        for seed in seeds:
            found.append((network, seed, "params", 0.0, "dense"))
            found += [(network, seed, kind, target, m) for m in methods for kind, target in budgets(network)]
    return found


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/search_study.jsonl")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="*", help="a glob over network-seed")
    parser.add_argument("--write", type=Path, help="only write the tables into this file, between its two markers")
    args = parser.parse_args()
    lines = Path(args.out).read_text().splitlines() if Path(args.out).exists() else []
    records = list({_task(record): record for record in map(json.loads, lines)}.values())
    if args.write:
        write(records, args.write)
        return
    done = set(map(_task, records))
    groups: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for task in tasks():
        if task not in done and fnmatch.fnmatch(f"{task[0]}-{task[1]}", args.only):
            groups[task[0], task[1]].append(task)
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        pool.starmap(work, [(group, args.out) for group in groups.values()], chunksize=1)


def _task(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("network", "seed", "budget", "target", "method"))


MARKERS = ("<!-- tables: ", "<!-- end of tables -->")


def write(records: list[dict[str, Any]], path: Path) -> None:
    """The tables, between the markers of a page, and a figure of the fine-tuned accuracies beside it."""
    for network in ("resnet20", "vit"):
        draw(records, network, path.with_name(f"{path.stem}-{network}.svg"))
    put(path, "\n".join(tables(records)))


def put(path: Path, text: str) -> None:
    """Tables into a page, between its two markers; the first one says who made them."""
    head, begin, rest = path.read_text().partition(MARKERS[0])
    name, _, rest = rest.partition("\n")
    path.write_text(f"{head}{begin}{name}\n\n{text}\n\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}")


def draw(records: list[dict[str, Any]], network: str, path: Path) -> None:
    """Fine-tuned accuracy against the budget of parameters."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for record in records:
        if record["network"] == network and record["budget"] == "params" and record["target"] and "tuned" in record:
            found[record["method"], 1 - record["target"]].append(record["tuned"])
    points = [Point(m, kept, statistics.mean(v), statistics.stdev(v) if len(v) > 2 else 0.0) for (m, kept), v in found.items()]
    reference = [r["tuned"] for r in records if (r["network"], r["method"]) == (network, "dense") and "tuned" in r] or [0.0]
    if points:
        title = f"{network}: fine-tuned accuracy by budget of parameters"
        save_figure(draw_accuracy(points, title=title, dense=statistics.mean(reference)), path, force=True)


def tables(records: list[dict[str, Any]]) -> list[str]:
    """One table a network and measure; then how one-shot and tuned figures go together."""
    lines: list[str] = []
    good = [r for r in records if "error" not in r]
    for network in NETWORKS:
        own = [r for r in good if r["network"] == network]
        reference = [r["one_shot"] for r in own if r["method"] == "dense"]
        if not reference:
            continue
        tuned = [r["tuned"] for r in own if r["method"] == "dense" and "tuned" in r]
        after = f", after the same fine-tuning {_spread(tuned)}" if tuned else ""
        lines += [f"### {network}: dense {_spread(reference)}{after}", ""]
        for measure, title in (
            ("one_shot", "one-shot, after BN recalibration"),
            ("tuned", "fine-tuned"),
            ("seconds", "search seconds"),
        ):
            if any(measure in r for r in own):
                lines += [f"{title}:", "", *_table(own, measure), ""]
        if any("tuned" in r for r in own):
            lines += [f"![{network}, fine-tuned](search-study-{network}.svg)", "", *_agreement(own), ""]
    failed = [r for r in records if "error" in r]
    return lines + [
        f"- failed: {r['network']} {r['seed']} {r['method']} {r['budget']} {r['target']}: {r['error']}" for r in failed
    ]


def _table(own: list[dict[str, Any]], measure: str) -> list[str]:
    asked = budgets(own[0]["network"])
    rows = [
        "| method | " + " | ".join(f"{kind} {target:g}" for kind, target in asked) + " |",
        "|---" * (len(asked) + 1) + "|",
    ]
    for method in METHODS:
        cells = []
        for kind, target in asked:
            values = [r[measure] for r in own if (r["method"], r["budget"], r["target"]) == (method, kind, target)]
            cells.append((f"{statistics.mean(values):.1f}" if measure == "seconds" else _spread(values)) if values else "-")
        if any(cell != "-" for cell in cells):
            rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return rows


def _spread(values: list[float]) -> str:
    """Mean, and the sample deviation of three or more."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 2 else "")


def _agreement(own: list[dict[str, Any]]) -> list[str]:
    """Rank correlation, within each (seed, budget), of what is known before tuning with the accuracy after it."""
    lines = []
    for measure, sign in (("one_shot", 1), ("one_shot_loss", -1), ("loss", -1)):
        found = []
        for kind, target in budgets(own[0]["network"]):
            for seed in {r["seed"] for r in own}:
                rows = [r for r in own if (r["budget"], r["target"], r["seed"]) == (kind, target, seed) and "loss" in r]
                if len(rows) > 3:
                    found.append(_spearman([sign * r[measure] for r in rows], [r["tuned"] for r in rows]))
        if found:
            name = {"one_shot": "one-shot accuracy", "one_shot_loss": "one-shot loss", "loss": "squared weight error"}[measure]
            lines.append(
                f"- {name} and accuracy after fine-tuning: rank correlation {statistics.mean(found):+.2f} on average "
                f"over {len(found)} (seed, budget) pairs ({min(found):+.2f} to {max(found):+.2f})"
            )
    return lines


def _spearman(a: list[float], b: list[float]) -> float:
    ranks = [[sum(y < x for y in values) + sum(y == x for y in values) / 2 for x in values] for values in (a, b)]
    means = [statistics.mean(r) for r in ranks]
    dots = [[math.fsum((x - m) * (y - k) for x, y in zip(r, s)) for s, k in zip(ranks, means)] for r, m in zip(ranks, means)]
    return dots[0][1] / math.sqrt(dots[0][0] * dots[1][1]) if dots[0][0] and dots[1][1] else 0.0


if __name__ == "__main__":
    main()
