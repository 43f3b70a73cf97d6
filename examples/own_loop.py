"""Your own model and your own training loop, which know nothing of sparsity: ten seconds on real handwritten digits.

    python examples/own_loop.py [--out DIR]

Dense training, search, masks, the same loop again, a check, a compressed file, and the file in a fresh model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from nmfx import evaluate, find_scheme, load_checkpoint, save_checkpoint, transform, verify
from nmfx.demo.digits import load_digits_data


class RowReader(nn.Module):
    """One transformer block over the eight rows of a picture; nmfx finds its weights, attention included, by their use."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(0.02 * torch.randn(8, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures ``(batch, 1, 8, 8)`` to logits ``(batch, 10)``."""
        return self.head(self.block(self.embed(x[:, 0]) + self.place).mean(1))


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, lr: float) -> nn.Module:
    """A plain loop. After `transform`, the forward pass reads masked weights and each step adds SR-STE's pull."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def run(out: Path) -> None:
    train_x, train_y, test_x, test_y = load_digits_data()
    test = [(test_x, test_y)]

    dense = train(RowReader(), train_x, train_y, epochs=30, lr=2e-3)
    print(f"dense:       {evaluate(dense, test).top1:.1%} of {len(test_x)} test digits")

    found = find_scheme(dense, target=0.75, example_input=test_x[:1])
    print(f"scheme:      {len(found.scheme)} of {len(found.sites)} sites sparse, sparsity {found.totals.sparsity:.2%}")

    sparse = transform(dense, found.scheme, sites=found.sites)
    print(f"one-shot:    {evaluate(sparse, test).top1:.1%}")
    train(sparse, train_x, train_y, epochs=15, lr=1e-3)
    print(f"fine-tuned:  {evaluate(sparse, test).top1:.1%}")

    checked = verify(sparse)
    print(f"verified:    {checked.groups:,} groups hold at most N weights, {checked.nonzeros:,} of {checked.weights:,}")

    save_checkpoint(dense, out / "dense.safetensors")
    save_checkpoint(sparse, out / "sparse.safetensors")
    before, after = (path.stat().st_size for path in (out / "dense.safetensors", out / "sparse.safetensors"))
    print(f"saved:       {after:,} bytes; dense {before:,}")

    fresh = load_checkpoint(out / "sparse.safetensors", RowReader())
    with torch.no_grad():
        same = torch.equal(fresh(test_x), sparse(test_x))
    print(f"loaded:      {evaluate(fresh, test).top1:.1%}, logits {'the same, bit for bit' if same else 'DIFFER'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the checkpoints here")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the pictures are so small that a second thread only waits
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        run(out)


if __name__ == "__main__":
    main()
