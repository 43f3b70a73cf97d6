"""What fine-tuning gains by, at equal budget and equal epochs: python benchmarks/finetuning.py --data DIR [--network resnet56]

The published CIFAR-10 networks of benchmarks/correction.py (DIR is its --data) under data-free knapsack schemes over N:16
(at 0.9375 over N:16 and N:32), trained with labels by `nmfx.finetune` as `nmfx run` trains (SR-STE, SGD, cosine; crops and
flips), in bfloat16 to save time. Three seeds, of the order of pictures and their augmentation. An arm changes one thing.
Accuracy is that after the last epoch, on test pictures. One JSON line a run in --out; what has a line is not run again.
`--table` makes the tables of docs/correction.md from them.

The arms `gradual` and `soft` are prototypes that live here alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from correction import MEAN, STD, Pictures, accuracy, cifar, published
from torch import Tensor, nn
from torch.nn.utils import parametrize

import nmfx
from nmfx.data.config import PictureConfig
from nmfx.data.pictures import ArrayPictures
from nmfx.data.source import Data
from nmfx.masking.owner import unmask_model
from nmfx.masking.sites import masked_sites, respec
from nmfx.scheme import Scheme
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import check_groups, make_mask
from nmfx.sparsity.pattern import Pattern
from nmfx.sparsity.rules import RULES
from nmfx.training.record import Progress

WATCHED = 100  # test pictures that an epoch is watched with
FITTED = 512  # training pictures, without labels, that correction and scores look at
CONFIG = PictureConfig((3, 32, 32), MEAN, STD)
Hook = Callable[[nn.Module], Callable[[Progress], None]]  # prepares a masked model; told of every update


class Through(torch.autograd.Function):
    """``where(mask, weight * factor, 0)``; the gradient goes straight through the mask, and SR-STE pulls what is dropped."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, factor, mask)
        return torch.where(mask, weight * factor, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, factor, mask = ctx.saved_tensors
        return grads[0] * factor + RULES["sr-ste"].decay * torch.where(mask, 0.0, weight), None, None


def importance(weight: Tensor) -> Tensor:
    """``1 + filter-wise + kernel-wise importance``, each the sigmoid of its standardised sum of magnitudes."""
    size, factor = weight.abs(), torch.ones(())
    for dims in (tuple(range(1, weight.dim())), tuple(range(2, weight.dim()))):
        sums = size.sum(dims, keepdim=True) if dims else size
        factor = factor + torch.sigmoid((sums - sums.mean()) / sums.std())
    return factor


class Soft(nn.Module):
    """The soft mask of MaxQ (Xiang et al., CVPR 2024): kept weights times their importance, groups made sparse gradually.

    How importances are normalised is our choice; the first values are those of the weight without it.
    """

    def __init__(self, n: int, grouping: Grouping) -> None:
        super().__init__()
        self.n, self.grouping, self.share = n, grouping, 0.0

    def right_inverse(self, value: Tensor) -> Tensor:
        factor = importance(value)
        for _ in range(200):
            factor = factor**0.95 * importance(value / factor) ** 0.05  # in small steps, or it swings
        return value / factor

    def forward(self, weight: Tensor) -> Tensor:
        dense = weight.detach()
        mask = make_mask(dense, self.n, self.grouping)
        (block,) = self.grouping.blocks(self.grouping.as_lines(dense.abs().contiguous()))
        sums = block.sum(2, keepdim=True)  # outer, groups, 1, inner
        rank = sums.flatten().argsort().argsort().view(sums.shape)
        late = (rank >= round(self.share * sums.numel())).expand(block.shape).reshape(weight.shape)
        return Through.apply(weight, importance(dense), mask | late)


def gradually(model: nn.Module) -> Callable[[Progress], None]:
    """N falls from M to its value by a cubic over the first half of the updates (Zhu and Gupta, 2017)."""
    sites = list(masked_sites(model))
    final = [site.spec.pattern for site in sites]

    def at(share: float) -> None:
        left = max(0.0, 1 - 2 * share) ** 3
        for site, pattern in zip(sites, final, strict=True):
            n = pattern.n + math.ceil(left * (pattern.m - pattern.n))
            if n != site.spec.pattern.n:
                respec([site], pattern=Pattern(n, pattern.m))

    at(0.0)
    return lambda progress: at(progress.share)


def softly(model: nn.Module) -> Callable[[Progress], None]:
    """`Soft` in place of the masks; all groups are sparse after half of the updates."""
    specs = [(site.path, site.spec) for site in masked_sites(model)]
    values = {path: model.get_submodule(path)._parameters["weight"].detach().clone() for path, _ in specs}
    unmask_model(model, keep_masked=False)
    masks = []
    for path, spec in specs:
        assert not spec.grouping.flat
        masks.append(Soft(spec.pattern.n, spec.grouping))
        parametrize.register_parametrization(model.get_submodule(path), "weight", masks[-1])
        torch.testing.assert_close(model.get_submodule(path).weight, values[path], rtol=1e-3, atol=1e-5)

    def told(progress: Progress) -> None:
        for mask in masks:
            mask.share = 1 - max(0.0, 1 - 2 * progress.share) ** 3

    return told


@dataclass(frozen=True)
class Arm:
    """What is not as today's `nmfx run` does it: correction first, options of `transform`, of `Settings`, a prototype."""

    correct: bool = False
    masks: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    hook: Hook | None = None


KD = {"distill": 0.5, "temperature": 2.0}
ARMS: dict[str, Arm] = {
    "default": Arm(),
    "corrected": Arm(correct=True),
    "kd": Arm(settings=KD),
    "corrected-kd": Arm(correct=True, settings=KD),
    "input-norm": Arm(masks={"score": "input-norm"}),
    "gradual": Arm(hook=gradually),
    "soft": Arm(hook=softly),
}


@cache
def dense(data: Path, network: str) -> nn.Module:
    return published(data, int(network.removeprefix("resnet")))


@cache
def scheme(data: Path, network: str, target: float) -> tuple[Any, Scheme]:
    sites = nmfx.find_sites(dense(data, network), torch.zeros(1, 3, 32, 32))
    m = 16 if target < 0.93 else (16, 32)  # 1:16 alone cannot reach 0.9375, as the stem stays dense
    return sites, nmfx.find_scheme(dense(data, network), target=target, sites=sites, m=m).scheme


@cache
def fitted(data: Path) -> list[Tensor]:
    return list(cifar(data, "train", FITTED)[0].split(32))


@cache
def corrected(data: Path, network: str, target: float) -> tuple[nn.Module, float]:
    """The masked network with corrected weights, and the seconds that took."""
    sites, chosen = scheme(data, network, target)
    model, start = nmfx.transform(dense(data, network), chosen, sites=sites), time.process_time()
    nmfx.correct(model, fitted(data))
    return model, time.process_time() - start


@cache
def labelled(data: Path, split: str, count: int) -> Pictures:
    return cifar(data, split, count)


def as_bytes(pictures: Pictures) -> ArrayPictures:
    pixels = pictures[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return ArrayPictures((pixels * 255).round().to(torch.uint8), pictures[1], hflip=0.5)


def begin(args: argparse.Namespace, arm: Arm, target: float) -> tuple[nn.Module, float]:
    """The masked network that training starts from, and the seconds of its correction."""
    if arm.correct:
        model, seconds = corrected(args.data, args.network, target)
        return copy.deepcopy(model), seconds
    sites, chosen = scheme(args.data, args.network, target)
    seen = [(x, torch.zeros(len(x), dtype=torch.long)) for x in fitted(args.data)] if arm.masks else None  # no labels
    return nmfx.transform(dense(args.data, args.network), chosen, sites=sites, data=seen, **arm.masks), 0.0


BEFORE: dict[tuple[str, float], float] = {}


def before(args: argparse.Namespace, name: str, target: float) -> float:
    """Accuracy before training, the same for every seed."""
    if (name, target) not in BEFORE:
        BEFORE[name, target] = accuracy(begin(args, ARMS[name], target)[0], labelled(args.data, "test", args.report))
    return BEFORE[name, target]


def run(args: argparse.Namespace, name: str, target: float, seed: int) -> dict[str, Any]:
    arm, report = ARMS[name], labelled(args.data, "test", args.report)
    model, extra = begin(args, arm, target)
    start, watched = before(args, name, target), (report[0][:WATCHED], report[1][:WATCHED])
    data = Data("cifar10", 10, (), as_bytes(labelled(args.data, "train", args.pictures)), as_bytes(watched))
    quick = {"amp": args.amp, "channels_last": True}
    settings = nmfx.Settings(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=seed, **quick, **arm.settings)
    hook = arm.hook(model) if arm.hook else None
    clock, teacher = time.process_time(), dense(args.data, args.network) if "distill" in arm.settings else None
    done = nmfx.finetune(model, data, settings=settings, config=CONFIG, teacher=teacher, progress=hook)
    seconds = time.process_time() - clock
    check(model, *scheme(args.data, args.network, target))
    found = {"before": start, "after": accuracy(model, report), "loss": round(done.epochs[-1].train_loss, 4)}
    return found | {"seconds": round(seconds, 1), "correction seconds": round(extra, 1)}


def check(model: nn.Module, sites: Any, chosen: Scheme) -> None:
    """Every group holds at most N, whatever the arm did."""
    for site in sites:
        if site.name in chosen:
            owner, _, attr = site.name.rpartition(".")
            value = getattr(model.get_submodule(owner), attr)
            check_groups(site.name, value, chosen[site.name].n, chosen.grouping(site))


KEY = ("network", "target", "arm", "seed", "pictures", "epochs", "batch_size", "lr", "amp")


def table(records: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds, and of the paired differences to `default`."""
    groups: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for one in records:
        same = tuple(one[key] for key in KEY if key not in ("arm", "seed"))
        groups.setdefault(same, {}).setdefault(one["arm"], {})[one["seed"]] = one["after"]
    print("| network | dropped | pictures x epochs, lr | arm | top-1 | less `default`, seed by seed |")
    print("|---|---|---|---|---|---|")
    for (network, target, pictures, epochs, _, lr, _), arms in groups.items():
        for arm, found in arms.items():
            both = sorted(found.keys() & arms.get("default", {}).keys())
            less = said([found[seed] - arms["default"][seed] for seed in both]) if both and arm != "default" else ""
            size = f"{pictures:,} x {epochs}, {lr}"
            print(f"| {network} | {target} | {size} | `{arm}` | {said(list(found.values()))} | {less} |")


def said(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}{'' if len(values) == 3 else f' ({len(values)})'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--network", choices=["resnet20", "resnet56"], default="resnet20")
    parser.add_argument("--arms", default="default,corrected")
    parser.add_argument("--targets", default="0.875,0.9375")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--amp", default="bf16", help="none: full precision, twice as long")
    parser.add_argument("--report", type=int, default=5_000, help="test pictures")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--table", action="store_true", help="print what is recorded, run nothing")
    args = parser.parse_args()
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        table(records)
        return
    known = {tuple(one[key] for key in KEY) for one in records}
    for seed in map(int, args.seeds.split(",")):
        for target in map(float, args.targets.split(",")):
            for arm in args.arms.split(","):
                what = vars(args) | {"target": target, "arm": arm, "seed": seed}
                key = {name: what[name] for name in KEY}
                if tuple(key.values()) in known:
                    continue
                record = key | {"report": args.report} | run(args, arm, target, seed)
                print(json.dumps(record), flush=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
