"""SR-STE's pull is applied once an update, at its stated size, whatever stands between a loss and a step."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import Lookahead
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import nmfx
from nmfx.masking import updates
from nmfx.masking.sites import masked_sites
from nmfx.models.site import Sites
from nmfx.passes.transform import transform
from nmfx.training.masks import set_training

X = torch.ones(4, 8, dtype=torch.float64)


class Net(nn.Module):
    """Two linears and a norm; a weight read twice, and one that is tied."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.norm, self.again, self.tied = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied.weight = self.again.weight
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.again(self.again(self.norm(self.first(x)))))


@cache
def sites() -> Sites:
    return nmfx.find_sites(Net(), X)


def make(decay: float = 0.25, **options: Any) -> nn.Module:
    return transform(Net(), "2:4", sites=sites(), decay=decay, **options)


def no_loss(model: nn.Module, x: Tensor = X) -> Tensor:
    """Gradients of zero everywhere: what moves then is what an update adds."""
    return (model(x) * 0).sum()


def values(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and mask of each site."""
    return {site.spec.name: (site.parameter.detach().clone(), site.mask.clone()) for site in masked_sites(model)}


def assert_pulled(model: nn.Module, before: dict[str, tuple[Tensor, Tensor]], factor: float) -> None:
    """Dropped weights are `factor` of their size, kept ones as they were."""
    assert before
    for name, (weight, mask) in values(model).items():
        was, kept = before[name]
        assert torch.equal(mask, kept)
        torch.testing.assert_close(weight, torch.where(kept, was, was * factor), rtol=1e-12, atol=0)


# Ways to make an update of a loss.

Step = Callable[[nn.Module, torch.optim.Optimizer, int], None]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad()
    no_loss(model).backward()
    optimizer.step()


def zeros(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad(set_to_none=False)
    no_loss(model).backward()
    optimizer.step()


def never_zeroed(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    no_loss(model).backward()
    optimizer.step()


def passes(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad()
    for _ in range(8):
        (no_loss(model) / 8).backward()
    optimizer.step()


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad()
    no_loss(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    optimizer.step()


def closure(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    def again() -> Tensor:
        optimizer.zero_grad()
        loss = no_loss(model)
        loss.backward()
        return loss

    optimizer.step(again) if t % 2 else optimizer.step(closure=again)


def with_eval_between(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad()
    no_loss(model).backward()
    with torch.no_grad():
        model(X)
    optimizer.step()


def checkpointed(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad()
    x = X.clone().requires_grad_()
    (torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) * 0).sum().backward()
    optimizer.step()


def by_a_step_that_failed_before(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a hook of the user's")

    optimizer.zero_grad()
    no_loss(model).backward()
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a hook"):
        optimizer.step()
    handle.remove()
    optimizer.step()


WAYS = [plain, zeros, never_zeroed, passes, clipped, closure, with_eval_between, checkpointed, by_a_step_that_failed_before]


class Inherited(torch.optim.SGD):
    """A step around that of its base class: hooks of both run."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def hooked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """As after a load: hooks run around the step of a wrapper, too, which does not call its base's constructor."""
    optimizer._patch_step_function()
    return optimizer


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.5, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, lr=0.5, fused=True),
    "maximising": lambda p: torch.optim.SGD(p, lr=0.5, maximize=True),
    "inherited": lambda p: Inherited(p, lr=0.5),
    "lookahead": lambda p: Lookahead(torch.optim.SGD(p, lr=0.5)),
    "lookahead, a copy": lambda p: hooked(Lookahead(torch.optim.SGD(p, lr=0.5))),
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dropped_weights_shrink_by_lr_times_decay_an_update(kind: str, way: Step) -> None:
    model = make()
    optimizer, before = OPTIMIZERS[kind](model.parameters()), values(model)
    for t in range(5):
        way(model, optimizer, t)
    assert_pulled(model, before, (1 - 0.5 * 0.25) ** 5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_scaler_changes_nothing(kind: str, count: int, unscaled: bool, fused: bool) -> None:
    """Scales are powers of two, so that the same run with and without one is the same, bit for bit."""
    models = [make(), make()]
    optimizers = [getattr(torch.optim, kind)(model.parameters(), lr=1e-5, fused=fused) for model in models]
    scalers = [torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**12, growth_interval=2) for enabled in (True, False)]
    for t in range(6):
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(t)
            for _ in range(count):
                x = torch.randn(4, 8, generator=generator, dtype=torch.float64)
                scaler.scale(model(x).square().mean() / count).backward()
            if unscaled:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    for (name, found), wanted in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_pulls_nothing(fused: bool) -> None:
    model = make()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused), torch.amp.GradScaler("cpu")
    before = values(model)
    for t in range(4):
        optimizer.zero_grad()
        scaler.scale(no_loss(model)).backward()
        if t % 2:
            next(model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
    assert_pulled(model, before, (1 - 0.5 * 0.25) ** 2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    decay=st.floats(0, 2),
    lr=st.floats(1e-4, 1),
    steps=st.lists(st.sampled_from(["pass", "update", "eval", "copy", "pickle"]), max_size=12),
)
def test_the_law_over_any_course(decay: float, lr: float, steps: list[str]) -> None:
    """w <- w (1 - lr decay) an update, however many passes, evaluations and copies of the model lie between."""
    model = make(decay)
    before, updated = values(model), 0
    for step in [*steps, "pass", "update"]:
        if step == "pass":
            no_loss(model).backward()
        elif step == "update":
            has = any(parameter.grad is not None for parameter in model.parameters())
            torch.optim.SGD(model.parameters(), lr=lr).step()
            updated += has
            model.zero_grad()
        elif step == "eval":
            with torch.no_grad():
                model.eval()(X)
            model.train()
        else:
            model = copy.deepcopy(model) if step == "copy" else pickle.loads(pickle.dumps(model))
    assert_pulled(model, before, (1 - lr * decay) ** updated)


def test_the_gradient_a_user_sees_is_that_of_the_loss() -> None:
    model, other = make(), make(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for each in (model, other):
        each(X).square().sum().backward()
    own = [parameter.grad for parameter in model.parameters()]
    optimizer.step()
    for parameter, grad, wanted in zip(model.parameters(), own, other.parameters(), strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, wanted.grad)  # type: ignore[arg-type]


def test_adamw_has_the_pull_in_its_moments() -> None:
    model = make()
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=0.01), values(model)
    plain(model, optimizer, 0)
    weight, mask = before["first.weight"]
    state = optimizer.state[dict(model.named_parameters())["first.weight"]]
    torch.testing.assert_close(state["exp_avg"], 0.1 * 0.25 * torch.where(mask, 0.0, weight))
    torch.testing.assert_close(state["exp_avg_sq"], 1e-3 * (0.25 * torch.where(mask, 0.0, weight)) ** 2)


def test_an_optimiser_made_before_the_masks() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    transform(model, "2:4", example_input=X, decay=0.25, inplace=True)
    before = values(model)
    plain(model, optimizer, 0)
    assert_pulled(model, before, 1 - 0.5 * 0.25)


def test_several_optimisers_each_pull_their_own() -> None:
    model = make()
    named, before = dict(model.named_parameters()), values(model)
    one, other = (torch.optim.SGD([named[name]], lr=0.5) for name in ("first.weight", "again.weight"))
    no_loss(model).backward()
    one.step()
    half = values(model)
    assert torch.equal(half["again.weight"][0], before["again.weight"][0])
    other.step()
    assert_pulled(model, before, 1 - 0.5 * 0.25)


def test_without_a_gradient_there_is_no_update() -> None:
    model = make()
    before = values(model)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert_pulled(model, before, 1.0)


def test_a_second_step_on_the_same_gradients_is_an_update_like_the_first() -> None:
    model = make()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.5), values(model)
    no_loss(model).backward()
    for _ in range(3):
        optimizer.step()
    assert_pulled(model, before, (1 - 0.5 * 0.25) ** 3)


@pytest.mark.parametrize("training", ["ste", "fixed"])
def test_other_trainings_have_no_pull(training: Any) -> None:
    model = make(training=training)
    before = values(model)
    plain(model, torch.optim.SGD(model.parameters(), lr=0.5), 0)
    assert_pulled(model, before, 1.0)
    set_training(model, "sr-ste", 0.25)
    plain(model, torch.optim.SGD(model.parameters(), lr=0.5), 0)
    assert_pulled(model, before, 1 - 0.5 * 0.25)


def test_frozen_masks_are_pulled_by_the_mask_that_is_there() -> None:
    model = make()
    nmfx.freeze(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype))
    before = values(model)
    plain(model, torch.optim.SGD(model.parameters(), lr=0.5), 0)
    assert_pulled(model, before, 1 - 0.5 * 0.25)


def test_a_weight_changed_after_its_backward_pass_is_pulled_by_the_mask_it_has_now() -> None:
    model = make()
    no_loss(model).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    weights = {site.spec.name: site.parameter.detach().clone() for site in masked_sites(model)}
    optimizer.step()
    fresh = make()
    fresh.load_state_dict({**fresh.state_dict(), **weights, "tied.weight": weights["again.weight"]})
    assert_pulled(model, values(fresh), 1 - 0.5 * 0.25)


def test_models_that_are_gone_leave_nothing_behind() -> None:
    gc.collect()
    there = len(updates._owners)
    model = make()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nmfx.bake(model)]
    plain(model, torch.optim.SGD(model.parameters(), lr=0.5), 0)
    assert len(updates._owners) >= there + 9
    del model, copies
    gc.collect()
    assert len(updates._owners) == there
    assert not any(updates._steps.values())


def test_a_saved_optimiser_goes_on_over_a_saved_model() -> None:
    model = make()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.5), values(model)
    stream = io.BytesIO()
    torch.save((model, optimizer), stream)
    stream.seek(0)
    model, optimizer = torch.load(stream, weights_only=False)
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
    for t in range(3):
        plain(model, optimizer, t)
    assert_pulled(model, before, (1 - 0.5 * 0.25) ** 3)


def test_lbfgs_minimises_with_the_pull() -> None:
    """Every evaluation has it once: where the loss is flat, the pull alone moves, and only what is dropped."""
    model = make()
    before = values(model)
    closure(model, torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=1, tolerance_grad=0), 1)
    for name, (weight, mask) in values(model).items():
        was, kept = before[name]
        assert torch.equal(weight[kept & mask], was[kept & mask])
        assert (weight[~kept].abs() < was[~kept].abs()).all()


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["the model", "the whole update"])
def test_compiled_training_is_pulled_alike(whole: bool) -> None:
    model = make()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.5), values(model)
    forward = torch.compile(model, backend="eager")

    def update() -> None:
        (forward(X) * 0).sum().backward()
        optimizer.step()

    if whole:
        update = torch.compile(update, backend="eager")
    for _ in range(3):
        optimizer.zero_grad()
        update()
    assert_pulled(model, before, (1 - 0.5 * 0.25) ** 3)


def test_optimisers_inside_the_backward_pass() -> None:
    """As torchtune and torchtitan do it: each weight is updated as soon as its gradient is there."""
    model = make()
    before, optimizers = values(model), {}

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        optimizers[parameter] = torch.optim.SGD([parameter], lr=0.5)
        parameter.register_post_accumulate_grad_hook(update)
    for _ in range(2):
        no_loss(model).backward()
    assert_pulled(model, before, (1 - 0.5 * 0.25) ** 2)


def test_a_loop_without_an_optimiser_pulls_by_itself() -> None:
    model = make()
    before = values(model)
    for _ in range(3):
        model.zero_grad()
        no_loss(model).backward()
        nmfx.pull(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.5)
    assert_pulled(model, before, (1 - 0.5 * 0.25) ** 3)


# Several processes.


def layers(model: nn.Module) -> Iterator[nn.Module]:
    yield from (model.first, model.again, model)  # type: ignore[misc]


def worker(rank: int, folder: str, ways: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for how in ways:
        model = transform(Untied(), "2:4", example_input=X, decay=0.25)
        before = values(model)
        parallel: Any = DistributedDataParallel(model) if "ddp" in how else model
        if "fsdp" in how:
            for layer in layers(model):
                fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        forward = torch.compile(parallel, backend="eager") if "compiled" in how else parallel
        scaler = torch.amp.GradScaler("cpu", enabled="scaled" in how)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5)
        if how.startswith("zero"):  # an optimiser around another
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            for part in range(4):
                scaler.scale(no_loss(forward, X[part : part + 1] * (rank + 1)) / 4).backward()
            scaler.step(optimizer)
            scaler.update()
        for name, parameter in model.named_parameters():
            if name in before:
                whole: Any = parameter.detach()
                whole = whole.full_tensor() if "fsdp" in how else whole
                was, kept = before[name]
                torch.testing.assert_close(whole, torch.where(kept, was, was * (1 - 0.5 * 0.25) ** 3), rtol=1e-12, atol=0)
    if "fsdp" in ways:
        for training in ("sr-ste", "fixed"):
            twice(training)
    dist.destroy_process_group()


def twice(training: Any) -> None:
    """Two forward passes before a backward pass, and one without any: FSDP trains as one process does."""
    alone, shared = (transform(Untied(), "2:4", example_input=X, decay=0.25, training=training) for _ in range(2))
    for layer in layers(shared):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    for model in (alone, shared):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            (model(X).square().sum() + model(2 * X).square().sum()).backward()
            optimizer.step()
            model(X)
    for found, wanted in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.detach().full_tensor(), wanted.detach())  # type: ignore[attr-defined]


class Untied(nn.Module):
    """Of a number of rows that two processes do not share evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again = nn.Linear(8, 20).double(), nn.Linear(20, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x))


@pytest.mark.parametrize(
    "ways",
    [["ddp", "scaled ddp", "zero ddp", "fsdp"], pytest.param(["compiled fsdp"], marks=pytest.mark.slow)],
    ids=["eager", "compiled"],
)
def test_two_processes_pull_as_one(ways: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(folder, ways), nprocs=2)
