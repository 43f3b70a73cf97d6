"""A converted model under DistributedDataParallel and fully_shard (gloo, two processes on this machine)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from awkward import Mixed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nmfx
from nmfx.masking.parallel import find_units, shard


def make_model(kind: str) -> nn.Module:
    """A little network without batch statistics, so that two halves of a batch make the whole."""
    torch.manual_seed(0)
    if kind == "mixed":
        return Mixed()
    layers = (nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 5))
    return nn.Sequential(*layers)


def converted(kind: str, decay: float | None) -> nn.Module:
    settings = {"training": "fixed"} if decay is None else {"decay": decay}
    return nmfx.transform(make_model(kind), "2:4", example_input=torch.zeros(1, 3, 8, 8), **settings)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    """Every layer by itself, freed after its forward pass, and the rest at the root."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in [*model, model]:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return model


def by_units(model: nn.Module) -> nn.Module:
    """As `finetune` does it, which begins with the weights of the first process."""
    if dist.get_rank():
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    shard(model, find_units(model, torch.zeros(1, 3, 8, 8)))
    return model


CASES = [(wrap, "chain", decay) for wrap in (ddp, fsdp) for decay in (None, 0.0, 0.01)]
CASES += [(by_units, kind, decay) for kind in ("chain", "mixed") for decay in (None, 0.01)]


def worker(rank: int, folder: str) -> None:
    """All cases, one after the other: what takes long is to start the processes."""
    torch.set_num_threads(1)
    for number, (wrap, kind, decay) in enumerate(CASES):
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{number}", rank=rank, world_size=2)
        model = wrap(converted(kind, decay))
        x, y = batch()
        train(model, x[rank::2], y[rank::2])
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if whole:  # FSDP gives the first process everything, and the others nothing
            torch.save(whole, f"{folder}/{number}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes have trained."""
    folder = tmp_path_factory.mktemp("trained")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda number: "-".join(str(getattr(x, "__name__", x)) for x in CASES[number])
)
def test_two_processes_follow_one(number: int, trained: Path) -> None:
    _, kind, decay = CASES[number]
    alone = converted(kind, decay)
    train(alone, *batch())
    states = [torch.load(path, weights_only=True) for path in sorted(trained.glob(f"{number}-*.pt"))]
    assert list(states[0]) == list(alone.state_dict())
    for key, value in alone.state_dict().items():
        assert torch.equal(states[0][key], states[-1][key])
        torch.testing.assert_close(states[0][key], value, rtol=1e-4, atol=1e-6)  # sums of halves round otherwise
    loaded = converted(kind, decay)
    loaded.load_state_dict(states[0])
    nmfx.verify(loaded)
