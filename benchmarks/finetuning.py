"""What fine-tuning gains by, at equal budget and equal epochs: python benchmarks/finetuning.py --data DIR [--network resnet56]

The published CIFAR-10 networks of benchmarks/correction.py (DIR is its --data) under data-free knapsack schemes over N:16
(at 0.9375 over N:16 and N:32), trained with labels by `nmfx.finetune` as `nmfx run` trains (SR-STE, SGD, cosine; crops and
flips), in bfloat16 to save time. Three seeds, of the order of pictures and their augmentation. An arm changes one thing.
Accuracy is that after the last epoch, on test pictures. One JSON line a run in --out; what has a line is not run again.
`--table` makes the tables of docs/correction.md from them.

The arms `gradual`, `soft` and `step` are prototypes of benchmarks/training_tricks.py; of AdamW: `--arms adamw,step --lr 0.001`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from correction import MEAN, STD, Pictures, accuracy, cifar, published
from torch import Tensor, nn
from training_tricks import Hook, gradually, preconditioned, softly

import nmfx
from nmfx.data.config import PictureConfig
from nmfx.data.pictures import ArrayPictures
from nmfx.data.source import Data
from nmfx.scheme import Scheme
from nmfx.sparsity.mask import check_groups

WATCHED = 100  # test pictures that an epoch is watched with
FITTED = 512  # training pictures, without labels, that correction and scores look at
CONFIG = PictureConfig((3, 32, 32), MEAN, STD)


@dataclass(frozen=True)
class Arm:
    """What is not masked weights under the settings of `nmfx run`: correction or matched batch norms first, options of
    `transform`, of `Settings`, a prototype.
    """

    correct: bool = False
    recalibrate: bool = False
    masks: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    hook: Hook | None = None


KD = {"distill": 0.5, "temperature": 2.0}
ARMS: dict[str, Arm] = {
    "default": Arm(),
    "recalibrated": Arm(recalibrate=True),
    "corrected": Arm(correct=True),
    "kd": Arm(settings=KD),
    "corrected-kd": Arm(correct=True, settings=KD),
    "input-norm": Arm(masks={"score": "input-norm"}),
    "gradual": Arm(hook=gradually),
    "soft": Arm(hook=softly),
    "adamw": Arm(settings={"opt": "adamw"}),
    "corrected-adamw": Arm(correct=True, settings={"opt": "adamw"}),
    "step": Arm(settings={"opt": "step"}, hook=preconditioned),
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
    model = nmfx.transform(dense(args.data, args.network), chosen, sites=sites, data=seen, **arm.masks)
    start = time.process_time()
    if arm.recalibrate:
        nmfx.recalibrate_bn(model, fitted(args.data), dense=dense(args.data, args.network))
    return model, time.process_time() - start


BEFORE: dict[tuple[str, float], float] = {}


def before(args: argparse.Namespace, name: str, target: float) -> float:
    """Accuracy before training, the same for every seed."""
    if (name, target) not in BEFORE:
        BEFORE[name, target] = accuracy(begin(args, ARMS[name], target)[0], labelled(args.data, "test", args.report))
    return BEFORE[name, target]


def run(args: argparse.Namespace, arm: str, target: float, seed: int) -> dict[str, Any]:
    model, extra = begin(args, ARMS[arm], target)
    found = {"before": before(args, arm, target)} | train(args, model, seed, ARMS[arm])
    check(model, *scheme(args.data, args.network, target))
    return found | {"correction seconds": round(extra, 1)}


def train(args: argparse.Namespace, model: nn.Module, seed: int, arm: Arm = ARMS["default"]) -> dict[str, Any]:
    """Fine-tune in place: accuracy afterwards, the last epoch's loss, seconds of the processor."""
    report = labelled(args.data, "test", args.report)
    watched = (report[0][:WATCHED], report[1][:WATCHED])
    data = Data("cifar10", 10, (), as_bytes(labelled(args.data, "train", args.pictures)), as_bytes(watched))
    quick = {"amp": args.amp, "channels_last": True}
    settings = nmfx.Settings(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=seed, **quick, **arm.settings)
    hook = arm.hook(model) if arm.hook else None
    clock, teacher = time.process_time(), dense(args.data, args.network) if "distill" in arm.settings else None
    done = nmfx.finetune(model, data, settings=settings, config=CONFIG, teacher=teacher, progress=hook)
    seconds = time.process_time() - clock
    return {"after": accuracy(model, report), "loss": round(done.epochs[-1].train_loss, 4), "seconds": round(seconds, 1)}


def check(model: nn.Module, sites: Any, chosen: Scheme) -> None:
    """Every group holds at most N, whatever the arm did."""
    for site in sites:
        if site.name in chosen:
            owner, _, attr = site.name.rpartition(".")
            value = getattr(model.get_submodule(owner), attr)
            check_groups(site.name, value, chosen[site.name].n, chosen.grouping(site))


KEY = ("network", "target", "arm", "seed", "pictures", "epochs", "batch_size", "lr", "amp")


BASES = ("default", "adamw", "corrected")  # arms that others are compared with


def table(records: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds, and of the differences to `BASES`, seed by seed."""
    groups: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = {}
    for one in records:
        same = tuple(one[key] for key in (*KEY, "report") if key not in ("arm", "seed"))
        groups.setdefault(same, {}).setdefault(one["arm"], {})[one["seed"]] = one
    print("| network | dropped | pictures x epochs, lr | arm | before | after | less `default` (`adamw`) | less `corrected` |")
    print("|---|---|---|---|---|---|---|---|")
    for (network, target, pictures, epochs, _, lr, *_), arms in groups.items():
        for arm, found in sorted(arms.items(), key=lambda item: list(ARMS).index(item[0])):
            less = {base: said(differences(found, arms.get(base, {}))) for base in BASES if base != arm}
            first, start = less.get("default") or less.get("adamw", ""), next(iter(found.values()))["before"]
            row = [network, target, f"{pictures:,} x {epochs}, {lr}", f"`{arm}`", f"{start:.1f}"]
            row += [said([one["after"] for one in found.values()]), first, less.get("corrected", "")]
            print(f"| {' | '.join(map(str, row))} |")


def differences(found: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> list[float]:
    return [found[seed]["after"] - base[seed]["after"] for seed in sorted(found.keys() & base.keys())]


def said(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}{'' if len(values) == 3 else f' ({len(values)})'}"


def options(about: str, out: Path) -> argparse.ArgumentParser:
    """What this benchmark and that of vectors are told."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--network", choices=["resnet20", "resnet56"], default="resnet20")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--amp", default="bf16", help="none: full precision, twice as long")
    parser.add_argument("--report", type=int, default=5_000, help="test pictures")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--table", action="store_true", help="print what is recorded, run nothing")
    return parser


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record(args: argparse.Namespace, names: Sequence[str], one: dict[str, Any], run: Callable[..., dict[str, Any]]) -> None:
    """Add a line of what `run` measures of one case, unless there is one of the same `names`."""
    key = {name: (vars(args) | one)[name] for name in names}
    if any(key.items() <= one.items() for one in read(args.out)):
        return
    line = json.dumps(key | {"report": args.report} | run(args, **one))
    print(line, flush=True)
    with args.out.open("a") as file:
        file.write(line + "\n")


def main() -> None:
    parser = options(__doc__.splitlines()[0], Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--arms", default="default,corrected")
    parser.add_argument("--targets", default="0.875,0.9375")
    args = parser.parse_args()
    if args.table:
        table(read(args.out))
        return
    for seed, target, arm in product(args.seeds.split(","), args.targets.split(","), args.arms.split(",")):
        record(args, KEY, {"target": float(target), "arm": arm, "seed": int(seed)}, run)


if __name__ == "__main__":
    main()
