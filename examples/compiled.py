"""A sparse network compiled for this processor, saved to a file, and loaded again without the network. Ten seconds.

    pip install '.[demo]'
    python examples/compiled.py [--out DIR]

Every layer is timed here, dense and by the sparse kernel, and keeps the faster way; what is loaded computes in the same ways,
to the last bit. Loading needs neither the model's code nor a compiler. `nmfx export --compiled` writes the same file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from nmfx import compile, find_scheme, load_compiled, recalibrate_bn, transform
from nmfx.demo.digits import load_demo, load_digits_data


def make_sparse(pictures: Tensor) -> nn.Module:
    """The trained demo network at half its weights; yours may come from `load_checkpoint`."""
    dense = load_demo(trained=True)
    model = transform(dense, find_scheme(dense, target=0.5).scheme)
    recalibrate_bn(model, pictures.split(200))
    return model.eval()


@torch.no_grad()
def run(out: Path) -> None:
    train_x, _, x, labels = load_digits_data()
    model, path = make_sparse(train_x), out / "digits.nmfxc"

    compiled = compile(model, x[:32])  # an example of the size to be fast for; other batches from 2 on are taken too
    print(compiled)
    for choice in compiled.choices:
        print(f"  {choice.name}: {choice.kept:,} weights, {choice.chosen}")

    compiled.save(path)
    loaded = load_compiled(path)
    print(f"{path.name}: {path.stat().st_size:,} bytes")

    expected, found, again = model(x), compiled(x), loaded(x)
    print(f"logits differ by {(found - expected).abs().max():.1e} at most, of {expected.abs().max():.1f} at most")
    print("loaded: the same, bit for bit" if torch.equal(again, found) else "loaded: other outputs")
    right = [int((logits.argmax(1) == labels).sum()) for logits in (expected, again)]
    print(f"test digits read right: masked {right[0]}, compiled {right[1]} of {len(x)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the file here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        run(out)


if __name__ == "__main__":
    main()
