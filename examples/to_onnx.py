"""From a compressed checkpoint to ONNX: load, bake, export, run in onnxruntime, compare with torch. Ten seconds.

    pip install '.[demo,onnx]'
    python examples/to_onnx.py [--out DIR]

A baked model is made of plain modules with real zeros, so torch's own exporter takes it, and so do other tools.
`save_onnx` calls it as `nmfx export --onnx` does: inputs and outputs have names, the batch is free.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from nmfx import bake, find_scheme, load_checkpoint, recalibrate_bn, save_checkpoint, transform
from nmfx.demo.digits import load_demo, load_digits_data
from nmfx.export.onnx import save_onnx
from nmfx.models.example import Example


def make_checkpoint(path: Path, pictures: Tensor) -> None:
    """The trained demo network at half its weights; yours may come from `nmfx export` or `save_checkpoint`."""
    dense = load_demo(trained=True)
    model = transform(dense, find_scheme(dense, target=0.5).scheme)
    recalibrate_bn(model, pictures.split(200))
    save_checkpoint(model, path)


def zeros(arrays: Iterable[np.ndarray]) -> int:
    """Zeros in weights. Vectors do not count: the exporter folds batch normalisation into the biases."""
    return sum(int((array == 0).sum()) for array in arrays if array.ndim > 1)


def run(out: Path) -> None:
    train_x, _, x, labels = load_digits_data()
    checkpoint, path = out / "digits.safetensors", out / "digits.onnx"
    make_checkpoint(checkpoint, train_x)

    model = bake(load_checkpoint(checkpoint))
    save_onnx(model, path, Example((x[:1],)))
    print(f"{path.name}: {path.stat().st_size:,} bytes; {checkpoint.name}: {checkpoint.stat().st_size:,}")

    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    print(f"zeros in weights: torch {zeros(p.detach().numpy() for p in model.parameters()):,}, ONNX {zeros(stored):,}")

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["output"], {"input": x.numpy()})
    with torch.no_grad():
        expected = model(x).numpy()
    print(f"logits differ by {np.abs(found - expected).max():.1e} at most, of {np.abs(expected).max():.1f} at most")
    right = [int((logits.argmax(1) == labels.numpy()).sum()) for logits in (expected, found)]
    print(f"test digits read right: torch {right[0]}, ONNX {right[1]} of {len(x)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the checkpoint and the ONNX file here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        run(out)


if __name__ == "__main__":
    main()
