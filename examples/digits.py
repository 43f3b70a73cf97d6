"""From a dense network to a sparse checkpoint on real handwritten digits, in less than a minute: what `make demo` runs.

    python examples/digits.py [--epochs 20] [--tune-epochs 10] [--out DIR]

A small CNN is trained from scratch, then made sparse three times, each with the same training after it. The two searches
keep 87.5 % or more of the weights out; uniform 2:16 ends a little below, as its stem stays dense (it has one input channel).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nmfx import Scheme, Sites, evaluate, find_scheme, find_sites, load_checkpoint, recalibrate_bn, save_checkpoint, transform
from nmfx.demo.digits import DigitsNet, load_digits_data

SEEDS = 0, 1, 2  # of the fine-tuning: a single run moves by a few test digits


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
    """Uniform 2:16, and two searches for the same sparsity."""
    domino = find_scheme(model, target=0.875, method="domino", sites=sites).scheme
    knapsack = find_scheme(model, target=0.875, method="knapsack", sites=sites).scheme
    return {"dense": Scheme({}), "uniform 2:16": Scheme.uniform(sites, "2:16"), "Domino": domino, "knapsack": knapsack}


def check_reload(model: nn.Module, path: Path, x: Tensor) -> None:
    """The file holds the model: a network built from it gives the same logits, bit for bit."""
    loaded = load_checkpoint(path)
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
        path, tuned = out / f"digits-{name.split()[0].lower()}.safetensors", []
        for seed in SEEDS:
            model = transform(dense, scheme, sites=sites, training="sr-ste")
            recalibrate_bn(model, train_x.split(200))
            one_shot = evaluate(model, [(test_x, test_y)]).top1  # the same every time
            train(model, train_x, train_y, epochs=tune_epochs, lr=0.05, seed=seed)
            tuned.append(100 * evaluate(model, [(test_x, test_y)]).top1)
        save_checkpoint(model, path)
        check_reload(model, path, test_x)
        accuracies = f"{one_shot:.1%}", f"{mean(tuned):.1f}% +-{stdev(tuned):.1f}"
        total, size = scheme.totals(sites), f"{path.stat().st_size / 1000:.1f}"
        table.add_row(
            name, *accuracies, f"{total.kept:,}", f"{total.sparsity:.1%}", f"{total.kept_macs / total.macs:.1%}", size
        )
    table.caption = (
        f"one-shot: BatchNorm recalibrated, no training. fine-tuned: {tune_epochs} epochs,\n"
        f"mean and deviation of {len(SEEDS)} seeds; one of the {len(test_x)} test digits is {1 / len(test_x):.2%}.\n"
        "Domino and knapsack searched 0.875; the stem of uniform 2:16 (in=1) stays dense."
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
