"""From a dense network to a sparse checkpoint on real handwritten digits, in less than a minute: what `make demo` runs.

    python examples/digits.py [--epochs 20] [--tune-epochs 10] [--out DIR]

A small CNN is trained from scratch, then made sparse three times. Uniform 2:16 leaves the stem dense (it has one input
channel), so it ends a little below 87.5 %; the two searches get its budget, and every row the same training after it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nmfx import Scheme, Sites, evaluate, find_scheme, find_sites, load_checkpoint, recalibrate_bn, save_checkpoint, transform
from nmfx.demo.digits import DigitsNet, load_digits_data


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, lr: float, seed: int = 0) -> nn.Module:
    """A plain training loop. It knows nothing of sparsity: a transformed model masks its own weights and gradients."""
    torch.manual_seed(seed)
    batches = -(-len(x) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def find_schemes(model: nn.Module, sites: Sites) -> dict[str, Scheme]:
    """Uniform 2:16, and what two searches make of the weights that it keeps."""
    uniform = Scheme.uniform(sites, "2:16")
    target = uniform.totals(sites).sparsity
    domino = find_scheme(model, target=target, method="domino", sites=sites).scheme
    knapsack = find_scheme(model, target=target, method="knapsack", sites=sites).scheme
    return {"dense": Scheme({}), "uniform 2:16": uniform, "Domino": domino, "knapsack": knapsack}


def check_reload(model: nn.Module, path: Path, x: Tensor) -> None:
    """The file holds the model: a network filled from it gives the same logits, bit for bit."""
    loaded = load_checkpoint(path, DigitsNet())
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x)), f"{path}: other logits after loading"


def run(out: Path, *, epochs: int, tune_epochs: int) -> Table:
    """Train, convert, search, fine-tune, export, reload: one row for each scheme."""
    train_x, train_y, test_x, test_y = load_digits_data()
    torch.manual_seed(0)
    dense = train(DigitsNet(), train_x, train_y, epochs=epochs, lr=0.1)
    sites = find_sites(dense)
    table = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column("", no_wrap=True)
    for head in ("accuracy\none-shot", "accuracy\nfine-tuned", "weights\nkept", "\nsparsity", "MACs\nkept", "file\nkB"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, scheme in find_schemes(dense, sites).items():
        model = transform(dense, scheme, sites=sites, training="sr-ste")
        recalibrate_bn(model, train_x.split(200))
        one_shot = evaluate(model, [(test_x, test_y)]).top1
        train(model, train_x, train_y, epochs=tune_epochs, lr=0.05)
        tuned = evaluate(model, [(test_x, test_y)]).top1
        path = out / f"digits-{name.split()[0].lower()}.safetensors"
        save_checkpoint(model, path)
        check_reload(model, path, test_x)
        total = scheme.totals(sites)
        shares = f"{total.sparsity:.1%}", f"{total.kept_macs / total.macs:.1%}"
        table.add_row(name, f"{one_shot:.1%}", f"{tuned:.1%}", f"{total.kept:,}", *shares, f"{path.stat().st_size / 1000:.1f}")
    table.caption = (
        f"one-shot: BatchNorm recalibrated, no training; fine-tuned: {tune_epochs} epochs.\n"
        f"One of the {len(test_x)} test digits is {1 / len(test_x):.2%}: less than 1% apart says nothing.\n"
        "Searched at the budget of uniform 2:16, whose stem (in=1) stays dense."
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="of the dense network")
    parser.add_argument("--tune-epochs", type=int, default=10, help="of every row")
    parser.add_argument("--out", type=Path, help="keep the checkpoints here")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the pictures are so small that a second thread only waits
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        Console().print(run(out, epochs=options.epochs, tune_epochs=options.tune_epochs))


if __name__ == "__main__":
    main()
