"""A converted model under DistributedDataParallel (gloo, two processes on this machine)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nmfx


def make_model() -> nn.Module:
    """A little network without batch statistics, so that two halves of a batch make the whole."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 5))
    return nn.Sequential(*layers)


def converted(decay: float) -> nn.Module:
    return nmfx.transform(make_model(), "2:4", example_input=torch.zeros(1, 3, 8, 8), decay=decay)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def worker(rank: int, folder: str, decay: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = DistributedDataParallel(converted(decay))
    x, y = batch()
    train(model, x[rank::2], y[rank::2])
    nmfx.verify(model.module)
    torch.save({key.removeprefix("module."): value for key, value in model.state_dict().items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("decay", [0.0, 0.01], ids=["ste", "sr-ste"])
def test_two_processes_follow_one(decay: float) -> None:
    alone = converted(decay)
    train(alone, *batch())
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(folder, decay), nprocs=2)
        states = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert list(states[0]) == list(alone.state_dict())
    for key, value in alone.state_dict().items():
        assert torch.equal(states[0][key], states[1][key])
        torch.testing.assert_close(states[0][key], value, rtol=1e-4, atol=1e-6)  # sums of halves round otherwise
