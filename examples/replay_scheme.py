"""A published scheme, replayed: DominoSearch's ResNet-50 at 80 % (N:16), counted, masked, checked and stored. Ten seconds.

    python examples/replay_scheme.py [--out DIR]

The file (of the tests' data) is as published: one line of `{'layer': [N, M], ...}`, read as a literal and matched layer by
layer. Counts and file sizes depend on shapes only, so the network has random weights here; `weights="IMAGENET1K_V1"` (a
download) takes trained ones. `recipes/resnet50-0.80.yaml` is the training with it.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from torchvision.models import resnet50

from nmfx import Scheme, find_sites, save_checkpoint, transform, verify

SCHEME = Path(__file__).parents[1] / "tests" / "data" / "resnet50_m16_0.80.txt"
PUBLISHED = {"weights": 25_502_912, "kept": 4_907_200, "macs": 4_089_184_256, "kept_macs": 1_141_313_536}


def run(out: Path) -> None:
    model = resnet50(weights=None)
    sites = find_sites(model)
    scheme = replace(Scheme.load(SCHEME, sites), layout="flat")  # cut as the published code does
    totals = scheme.totals(sites)
    print(f"{SCHEME.name}: {len(sites)} layers, {len(scheme)} of them sparse, {totals.sparsity:.3%} of the weights out")
    for name, count in PUBLISHED.items():
        found = asdict(totals)[name]
        print(f"{name:10} {found:>13,}  {'as published' if found == count else f'published: {count:,}'}")

    scheme.save(out / "resnet50.yaml", sites)
    assert Scheme.load(out / "resnet50.yaml", sites).patterns == scheme.patterns
    print(f"saved as YAML, with its totals and the model's shapes: {(out / 'resnet50.yaml').stat().st_size:,} bytes")

    save_checkpoint(model, out / "dense.safetensors")
    transform(model, out / "resnet50.yaml", sites=sites, inplace=True)
    checked = verify(model)
    print(f"verified: {checked.groups:,} groups of {checked.sites} layers hold at most N non-zeros")
    save_checkpoint(model, out / "sparse.safetensors")
    dense, sparse = ((out / name).stat().st_size for name in ("dense.safetensors", "sparse.safetensors"))
    print(f"checkpoint: {sparse:,} of {dense:,} bytes ({sparse / dense:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the scheme and the checkpoints here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        run(out)


if __name__ == "__main__":
    main()
