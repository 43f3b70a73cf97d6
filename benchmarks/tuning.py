"""What tuning costs and gives: python benchmarks/tuning.py [--only NAME] [--batches 1,8] [--threads 2] [--turns 15]

Seconds of `nmfx.compile` without a cache, `tune="quick"` and `"full"`, and then both models, and the quick one on the library's
own threads instead of the OpenMP that torch runs on, in turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import timm
import torch

import nmfx
from nmfx.runtime.kernel.library import loaded
from nmfx.runtime.measuring.bench import SETTLE, TURN
from nmfx.runtime.measuring.timing import mean_seconds

sys.path.insert(0, str(Path(__file__).parent))
NETWORKS = {
    "resnet50 0.9375 N:32": ("resnet50", 0.9375, 32),
    "resnet50 0.875 N:16": ("resnet50", 0.875, 16),
    "efficientnet_lite0 0.875 N:16": ("tf_efficientnet_lite0", 0.875, 16),
    "vit_base_patch16_224 0.875 N:16": ("vit_base_patch16_224", 0.875, 16),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="no full tuning")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for label, (name, target, m) in NETWORKS.items():
        if args.only not in label:
            continue
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        one = torch.rand(1, 3, 224, 224)
        model = nmfx.transform(model, nmfx.find_scheme(model, target=target, m=m, example_input=one).scheme, example_input=one)
        for batch in map(int, args.batches.split(",")):
            x, runs, said = one.expand(batch, 3, 224, 224).contiguous(), {}, []
            for tune in ("quick",) if args.quick else ("quick", "full"):
                os.environ["NMFX_CACHE"] = tempfile.mkdtemp()
                start = time.perf_counter()
                compiled = nmfx.compile(model, x, tune=tune)
                said.append(f"{tune} {time.perf_counter() - start:.1f} s")
                runs[tune] = partial(compiled, x)
            times: dict[str, list[float]] = {}
            for _ in range(args.turns):
                for tune, run in (*runs.items(), ("quick, own threads", runs["quick"])):
                    loaded().use_own_threads() if "own" in tune else loaded().use_openmp()
                    mean_seconds(run, SETTLE)
                    times.setdefault(tune, []).append(mean_seconds(run, TURN))
            loaded().use_openmp()
            medians = {tune: sorted(all_times)[len(all_times) // 2] * 1e3 for tune, all_times in times.items()}
            found = ", ".join(f"{tune} {ms:.2f} ms" for tune, ms in medians.items())
            print(f"{label}, batch {batch}, {args.threads} threads: compiled in {', '.join(said)}; runs in {found}", flush=True)


if __name__ == "__main__":
    main()
