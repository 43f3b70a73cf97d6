"""How the weights inside `nmfx.demo` were made: DigitsNet, trained for 40 epochs in about ten seconds.

    python examples/train_demo.py [FILE]

Without FILE the weights of the package are replaced. The same machine and torch give the same file, byte for byte;
elsewhere the last bits may differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from digits import train
from safetensors.torch import save_file

from nmfx import evaluate
from nmfx.demo import digits as demo
from nmfx.files.atomic import write_atomic


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(demo.__file__).with_name(demo.WEIGHTS)
    torch.set_num_threads(1)  # sums in one order
    train_x, train_y, test_x, test_y = demo.load_digits_data()
    torch.manual_seed(0)
    model = train(demo.DigitsNet(), train_x, train_y, epochs=40, lr=0.1)
    top1 = evaluate(model, [(test_x, test_y)]).top1
    made = f"examples/train_demo.py, torch {torch.__version__}, 40 epochs, seed 0, {top1:.2%} on {len(test_x)} test digits"
    write_atomic(path, lambda temporary: save_file(model.state_dict(), temporary, {"made": made}))
    print(f"{path}: {made}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
