"""Sparse int8 beside dense int8: python benchmarks/int8.py speed|accuracy|draw [--data DIR] [--only GLOB] [--out FILE]

`speed` times networks in one run, engine after engine in turns, batch 1 and 8: dense int8 by OpenVINO and ONNX Runtime (those
installed), dense int8 and sparse int8 by nmfx under uniform patterns, and 2:16 in float32. Weights are random but for Lite0:
times do not depend on values. Run it on a machine that does nothing else.

`accuracy` takes the networks of benchmarks/correction.py (DIR is its --data): top-1 on pictures that nothing was fitted to, and
milliseconds at batch 1, of dense fp32, dense int8 by each engine, and nmfx int8 under schemes found by knapsack and corrected
without labels. One JSON line a row in --out; `draw` makes docs/int8.svg of accuracy against milliseconds from the last line of
each row (it needs matplotlib).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from runtime import settled
from torch import Tensor, nn

import nmfx
from nmfx.export.onnx import save_onnx
from nmfx.models.example import Example
from nmfx.runtime.measuring.bench import in_turns
from nmfx.runtime.measuring.engines import open_engine
from nmfx.settings.engines import ENGINES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
Run = Callable[[], object]


class Linears(nn.Sequential):
    """The linear layers of ViT-B/16's twelve blocks over tokens, without what is between them."""

    def __init__(self) -> None:
        sizes = ((768, 2304), (2304, 768), (768, 3072), (3072, 768))
        super().__init__(*(layer for _ in range(12) for size in sizes for layer in (nn.Linear(*size), nn.ReLU())))


def lite0() -> nn.Module:
    from pictures import lite0 as trained

    return trained()


PICTURE, TOKENS = (3, 224, 224), (197, 768)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50": (lambda: settled(torchvision.models.resnet50(weights=None)), PICTURE),
    "regnet_x_3_2gf": (lambda: settled(torchvision.models.regnet_x_3_2gf(weights=None)), PICTURE),
    "mobilenet_v2": (lambda: settled(torchvision.models.mobilenet_v2(weights=None)), PICTURE),
    "efficientnet_lite0": (lite0, PICTURE),
    "vit_b_16 linears": (Linears, TOKENS),
    "vit_base_patch16_224": (lambda: timm.create_model("vit_base_patch16_224").eval(), PICTURE),
}
PATTERNS = ("dense", "4:16", "4:16x4", "2:16", "2:16x2", "2:16x4")


def rivals(model: nn.Module, x: Tensor, threads: int, *, int8: bool = True) -> dict[str, Run]:
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(model, path := Path(folder) / "dense.onnx", Example((x[:1],)))
        engines = [one for one in ENGINES.values() if one.is_installed and one.int8 == int8]
        return {one.label: open_engine(one, path, x, threads) for one in engines}


def compiled(model: nn.Module, x: Tensor, calibration: Tensor) -> nmfx.CompiledModel:
    return nmfx.compile(model, x, precision="int8", calibration=calibration)


def milliseconds(runs: dict[str, Run], turns: int) -> dict[str, list[float]]:
    """Median, fastest and slowest of each."""
    with torch.no_grad():
        found = in_turns(runs, turns, lambda done, what: None)
    return {name: [round(1e3 * s, 3) for s in (statistics.median(one), min(one), max(one))] for name, one in found.items()}


def speed(name: str, batch: int, threads: int, turns: int) -> dict[str, Any]:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(batch, *shape)
    runs, kinds = rivals(build().eval(), x, threads), {}
    for pattern in PATTERNS:
        model = build().eval()
        if pattern != "dense":
            model = nmfx.transform(model, pattern, example_input=x)
        one = compiled(model, x, torch.randn(max(8, batch), *shape))
        runs[f"nmfx int8, {pattern}"] = partial(one, x)
        kinds[pattern] = sum(choice.chosen == "int8" for choice in one.choices)
        if pattern == "2:16":
            runs["nmfx fp32, 2:16"] = partial(nmfx.compile(model, x), x)
    ms = milliseconds(runs, turns)
    best = min((ms[engine.label][0] for engine in ENGINES.values() if engine.label in ms), default=float("nan"))
    record = {"network": name, "batch": batch, "threads": threads, "ms": ms, "int8 sites": kinds}
    record["against the best dense int8"] = {
        key.removeprefix("nmfx "): round(best / took[0], 2) for key, took in ms.items() if key.startswith("nmfx")
    }
    return record


def top1(run: Callable[[Tensor], Tensor], pictures: tuple[Tensor, Tensor], batch: int) -> float:
    whole = len(pictures[1]) // batch * batch
    parts = zip(pictures[0][:whole].split(batch), pictures[1][:whole].split(batch), strict=True)
    with torch.no_grad():
        return 100 * sum(int((run(x).argmax(1) == y).sum()) for x, y in parts) / whole


def openvino_int8(model: nn.Module, fit: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
    """The network quantised by NNCF on the same pictures, for batches of one size."""
    import nncf
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        save_onnx(model, path := Path(folder) / "dense.onnx", Example((fit[:1],)))
        quantised = nncf.quantize(
            openvino.Core().read_model(str(path)), nncf.Dataset([one[None].numpy() for one in fit]), subset_size=len(fit)
        )
    quantised.reshape([batch, *fit.shape[1:]])
    request = openvino.Core().compile_model(quantised, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[0].copy())


def accuracy(name: str, data: Path, turns: int, threads: int, targets: list[str]) -> list[dict[str, Any]]:
    from correction import cifar, imagenet, published

    if name == "lite0":
        model, (fit, report) = lite0(), imagenet(data)
    else:
        model, fit, report = (
            published(data, int(name.removeprefix("resnet"))),
            cifar(data, "train", 512),
            cifar(data, "test", 2000),
        )
    batch, one = 50, fit[0][:1]
    runs: dict[str, Run] = rivals(model, one, threads) | rivals(model, one, threads, int8=False)
    rows: dict[str, dict[str, Any]] = {"dense, PyTorch": {"top1": top1(model, report, batch)}}
    rows["dense, PyTorch"]["kind"] = "fp32"
    if ENGINES["openvino-int8"].is_installed:
        rows["OpenVINO, int8"] = {"top1": top1(openvino_int8(model, fit[0][:256], batch), report, batch), "kind": "int8"}
    for target in targets:
        masked = model
        if target != "dense":
            share, _, vector = target.partition("x")
            scheme = nmfx.find_scheme(
                model, target=float(share), m=16, vector=int(vector or 1), sites=nmfx.find_sites(model, one)
            ).scheme
            masked = nmfx.transform(model, scheme, example_input=one)
            nmfx.correct(masked, list(fit[0].split(32)))
        label = f"nmfx int8, {target}"
        rows[label] = {
            "top1": top1(compiled(masked, fit[0][:batch], fit[0]), report, batch),
            "fp32 top1": top1(masked, report, batch),
        }
        rows[label]["kind"] = "nmfx"
        runs[label] = partial(compiled(masked, one, fit[0][:64]), one)
    ms = milliseconds(runs, turns)
    fastest = min(
        (label for label in ms if label in {e.label for e in ENGINES.values() if not e.int8}),
        key=lambda key: ms[key][0],
        default="",
    )
    for label, row in rows.items():
        row |= {"network": name, "run": label, "ms": ms.get(fastest if label == "dense, PyTorch" else label)}
    for label in ms.keys() - rows.keys():
        rows[label] = {"network": name, "run": label, "ms": ms[label], "kind": "other"}
    return list(rows.values())


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against milliseconds at batch 1, a panel a network."""
    from matplotlib.figure import Figure

    marks = {
        "fp32": ("s", "#8a8a8a", "dense fp32"),
        "int8": ("D", "#c2571a", "dense int8, OpenVINO"),
        "nmfx": ("o", "#1f6fb4", "nmfx int8"),
    }
    networks = [name for name in ("resnet56", "lite0") if any(row["network"] == name for row in rows)]
    figure = Figure(figsize=(4.6 * len(networks), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        for kind, (mark, colour, label) in marks.items():
            mine = [row for row in rows if row["network"] == name and row["kind"] == kind and row.get("ms")]
            axes.scatter([row["ms"][0] for row in mine], [row["top1"] for row in mine], marker=mark, color=colour, label=label)
            for row in mine if kind == "nmfx" else ():
                said = row["run"].removeprefix("nmfx int8, ")
                axes.annotate(said, (row["ms"][0], row["top1"]), textcoords="offset points", xytext=(5, -9), fontsize=7)
        axes.set(
            title={"resnet56": "ResNet-56, CIFAR-10", "lite0": "EfficientNet-Lite0, ImageNet"}[name],
            xlabel="ms, batch 1",
            ylabel="top-1, %",
        )
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "accuracy", "draw"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="*")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--targets", default="dense,0.5,0.5x4,0.75,0.75x4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def keep(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    if args.what == "draw":
        lines = [json.loads(line) for line in args.out.read_text().splitlines()]
        last = {(row["network"], row["run"]): row for row in lines if "run" in row}
        draw(list(last.values()), Path(__file__).parents[1] / "docs" / "int8.svg")
        return
    if args.what == "speed":
        for name in NETWORKS:
            for batch in map(int, args.batches.split(",")):
                if fnmatch.fnmatch(name, args.only):
                    keep(speed(name, batch, args.threads, args.turns))
        return
    for name in ("resnet20", "resnet56", "lite0"):
        if fnmatch.fnmatch(name, args.only):
            for row in accuracy(name, args.data, args.turns, args.threads, args.targets.split(",")):
                keep(row)


if __name__ == "__main__":
    main()
