"""The speed of nmfx.compile: python benchmarks/runtime.py [--only GLOB] [--turns 15] [--out benchmarks/runtime.json]

Each case times a network dense (PyTorch, channels last, torch.compile with frozen weights, ONNX Runtime and
OpenVINO where installed, in fp32 and int8) and sparse (masked,
and by nmfx) in one run, in turns, on one thread and on all, batch 1 and 8. `latency *` searches for a speed (ResNet-50: twice
that of the best dense run) and compares with the parameter budget that happens to be as fast. `roofline` measures what the
machine can do. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import nmfx
from nmfx.export.onnx import save_onnx
from nmfx.models.example import Example
from nmfx.runtime.measuring.bench import NMFX, bench
from nmfx.runtime.measuring.latency import measured_seconds
from nmfx.search.finder import find_scheme
from nmfx.settings.stages import BenchSettings
from nmfx.stages import latency

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def settled(model: nn.Module) -> nn.Module:
    """Random weights, and batch norms that have seen something: times do not depend on values."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def resnet50() -> nn.Module:
    return settled(torchvision.models.resnet50(weights=None))


def lite0() -> nn.Module:
    from pictures import lite0 as trained

    return trained()


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "resnet50 0.9375 uniform 2:32": (resnet50, {"target": 0.9375, "m": 32, "method": "uniform"}),
    "resnet50 0.9375 N:32": (resnet50, {"target": 0.9375, "m": 32}),
    "resnet50 0.9375 N:32, 14x fewer MACs": (resnet50, {"limits": {"params": 0.0625, "macs": "14x"}, "m": 32}),
    "resnet50 0.875 N:16": (resnet50, {"target": 0.875, "m": 16}),
    "resnet50 0.875 N:16, 8x fewer MACs": (resnet50, {"limits": {"params": 0.125, "macs": "8x"}, "m": 16}),
    "efficientnet_lite0 0.875 uniform 2:16": (lite0, {"pattern": "2:16"}),
    "vit_base_patch16_224 0.875": (lambda: timm.create_model("vit_base_patch16_224"), {"target": 0.875, "m": 16}),
}


def run(name: str, turns: int, batches: tuple[int, ...], threads: tuple[int, ...]) -> dict[str, Any]:
    """One case: medians and spreads of all engines in ms, and how much is kept."""
    build, asked = CASES[name]
    model, x = build().eval(), torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    sites = nmfx.find_sites(model, x)
    if "pattern" in asked:
        scheme = nmfx.Scheme.uniform(sites, nmfx.Pattern(asked["pattern"]))
    else:
        scheme = find_scheme(model, sites=sites, **asked).scheme
    totals = scheme.totals(sites)
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(model, path := Path(folder) / "dense.onnx", Example((x,)))
        converted = nmfx.transform(model, scheme, sites=sites)
        engines = BenchSettings().engine_names
        found = bench(model, converted, x, batches=batches, threads=threads, turns=turns, onnx=path, engines=engines)
    record: dict[str, Any] = {"case": name, "sparsity": totals.sparsity, "mac_sparsity": totals.mac_sparsity}
    record |= {"difference": found.difference, "missing": dict(found.missing), "rows": []}
    for batch, count in found.choices:
        rows = [one for one in found.timings if (one.batch, one.threads) == (batch, count)]
        ours = found.of(NMFX, batch, count)
        assert ours is not None
        times = {one.engine: [round(1e3 * s, 3) for s in (one.median, *one.spread)] for one in rows}
        record["rows"].append({"batch": batch, "threads": count, "ms": times})
        said = [f"nmfx {ours.median * 1e3:.2f} ms"]
        for int8 in (False, True):
            best = found.best_dense(batch, count, int8=int8)
            if best:
                times_faster = best.median / ours.median
                record["rows"][-1]["against the best int8" if int8 else "against the best fp32"] = round(times_faster, 3)
                said.append(f"{best.engine} {best.median * 1e3:.2f} ms ({times_faster:.2f}x)")
        print(f"{name}: batch {batch}, {count} threads: {', '.join(said)}", flush=True)
    return record


def search_latency(name: str, build: Any, speedup: str) -> dict[str, Any]:
    """A latency, against the mildest parameter budget that is as fast; one-shot accuracy of both where weights are trained."""
    from pictures import calibration, labelled

    model, x = build(), labelled()[0][:1]
    sites = nmfx.find_sites(model, x)

    def score(scheme: nmfx.Scheme) -> dict[str, float]:
        totals = scheme.totals(sites)
        kept = {"kept": totals.kept / totals.weights, "kept_macs": totals.kept_macs / totals.macs}
        if build is not lite0:
            return kept
        converted = nmfx.transform(model, scheme, sites=sites)
        nmfx.recalibrate_bn(converted, list(calibration()))
        scored = nmfx.evaluate(converted, [labelled()])
        return kept | {"top1": scored.top1, "loss": scored.loss}

    question: dict[str, Any] = {"m": 16}
    find = lambda **more: find_scheme(model, sites=sites, method="knapsack", **more)  # noqa: E731
    found = latency.search_latency(model, sites, x, speedup, question, find)
    record: dict[str, Any] = {"case": f"latency {speedup}, {name}", "dense_ms": found.dense * 1e3}
    record |= {"wanted_ms": found.wanted * 1e3, "predicted_ms": found.predicted * 1e3, "measured_ms": found.measured * 1e3}
    record["by latency"] = score(found.result.scheme)
    low, high, best = Fraction(0), Fraction(99, 100), None
    for _ in range(7):  # the mildest parameter budget that is as fast
        middle = (low + high) / 2
        try:
            scheme = find_scheme(model, sites=sites, target=float(middle), m=16).scheme
        except nmfx.NmfxError:
            high = middle
            continue
        seconds = measured_seconds(nmfx.transform(model, scheme, sites=sites), x, found.latency)
        if seconds <= max(found.measured, found.wanted):
            high, best = middle, (scheme, seconds)
        else:
            low = middle
    if best is not None:
        record["by parameters"] = score(best[0]) | {"ms": best[1] * 1e3}
    print(json.dumps(record, indent=1), flush=True)
    return record


def roofline() -> dict[str, Any]:
    """Multiply-adds a second of one and all threads (a dense product that fits the cache), and bytes a second of copies."""
    record: dict[str, Any] = {"case": "roofline"}
    for threads in sorted({1, torch.get_num_threads()}):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        x, w = torch.randn(1, 256, 56, 56), torch.randn(256, 256, 3, 3)
        packed = torch.ops.mkldnn._reorder_convolution_weight(w, [1, 1], [1, 1], [1, 1], 1, list(x.shape))
        x = x.contiguous(memory_format=torch.channels_last)
        conv = lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, None, [1, 1], [1, 1], [1, 1], 1, "none", [], "")  # noqa: B023, E731
        big, other = torch.zeros(1 << 26), torch.zeros(1 << 26)
        small, there = torch.zeros(1 << 17), torch.zeros(1 << 17)
        best = lambda run: min(_once(run) for _ in range(9))  # noqa: E731
        record[f"{threads} threads"] = {
            "GMAC/s of oneDNN's 3x3 convolution": 256 * 256 * 9 * 56 * 56 / best(conv) / 1e9,
            "GB/s of copies in memory (read and written)": 2 * big.nbytes / best(lambda: other.copy_(big)) / 1e9,  # noqa: B023
            "GB/s of copies in the second-level cache": 2 * small.nbytes / best(lambda: there.copy_(small)) / 1e9,  # noqa: B023
        }
        torch.set_num_threads(before)
    print(json.dumps(record, indent=1), flush=True)
    return record


def _once(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Run the cases asked for; records go to a file, those of other cases stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", default=f"1,{torch.get_num_threads()}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/runtime.json"))
    args = parser.parse_args()
    batches, threads = (tuple(map(int, text.split(","))) for text in (args.batches, args.threads))
    found = {one["case"]: one for one in (json.loads(args.out.read_text()) if args.out.exists() else [])}
    runs = {name: (lambda name=name: run(name, args.turns, batches, threads)) for name in CASES}
    runs |= {"latency resnet50": lambda: search_latency("resnet50", resnet50, "2x")}
    for speedup in ("1.4x", "2x"):
        runs[f"latency lite0 {speedup}"] = lambda speedup=speedup: search_latency("efficientnet_lite0", lite0, speedup)
    runs |= {"roofline": roofline}
    for name, go in runs.items():
        if fnmatch.fnmatch(name, args.only):
            record = go()
            found[record["case"]] = record
            args.out.write_text(json.dumps(list(found.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
