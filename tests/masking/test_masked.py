"""Laws of the masked attribute: read as where(mask, weight, 0), everything else as it was."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from awkward import MODELS, build, models, run, same
from torch import Tensor, nn

from nmfx.errors import NmfxError
from nmfx.masking.copies import throw_away_copy
from nmfx.masking.derived import derive
from nmfx.masking.owner import is_masked, mask_attribute, plain_class, read_masked, unmask
from nmfx.masking.sites import freeze, masked_sites
from nmfx.masking.updates import pull
from nmfx.masking.value import MaskedWeight
from nmfx.masking.weight import MaskSpec, mask_name
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.passes.baking import bake
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.pattern import Pattern

CONVERTIBLE = [name for name in MODELS if name != "scripted"]  # deepcopy of a ScriptModule makes non-leaf parameters
OWN = [name for name in CONVERTIBLE if name != "standardised"]  # see test_derived.py
METHODS = {"sr-ste": 0.125, "ste": 0.0, "kept": None}  # an eighth: exact in every precision
methods = pytest.mark.parametrize("decay", METHODS.values(), ids=METHODS)
train_or_eval = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def convert(name: str, training: str = "sr-ste", decay: float = 0.125) -> tuple[nn.Module, nn.Module, Example]:
    """A model, the same with every site masked that can be, short groups included, and an example of the input."""
    model, example = build(name)
    sites = find_sites(model, example)
    scheme = Scheme.uniform(sites, "2:4", remainder="short")
    assert len(scheme)
    return model, transform(model, scheme, sites=sites, training=training, decay=decay), example  # type: ignore[arg-type]


def linear(shape: tuple[int, int] = (8, 16), decay: float | None = 0.125) -> nn.Linear:
    """A masked linear."""
    module = nn.Linear(shape[1], shape[0])
    mask_attribute(module, "weight", MaskSpec("weight", Pattern("2:4"), Grouping((*shape, 1), 4), decay))
    return module


def convolution() -> nn.Conv2d:
    """A masked convolution."""
    module = nn.Conv2d(8, 6, 3)
    mask_attribute(module, "weight", MaskSpec("weight", Pattern("2:4"), Grouping((6, 8, 9), 4)))
    return module


def parameter(module: nn.Module) -> nn.Parameter:
    """The dense weight, as an optimiser finds it: without a read through the mask."""
    return dict(module.named_parameters())["weight"]


def assert_fresh(module: nn.Module, attr: str = "weight") -> None:
    """What is read is the masked value of the weight as it is now, under the mask of the weight as it is now."""
    spec = next(site.spec for site in masked_sites(module) if site.owner is module and site.attr == attr)
    weight: Tensor | None = module._parameters[attr]
    assert weight is not None
    if spec.derived:
        weight = derive(module, plain_class(module))
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            value = read_masked(module, attr)
        mask = getattr(module, mask_name(attr))
        if not spec.frozen:
            assert torch.equal(mask, make_mask(weight, spec.pattern.n, spec.grouping))
        assert torch.equal(value, torch.where(mask, weight, torch.zeros((), dtype=weight.dtype)))
        assert (value.dtype, value.device, value.stride()) == (weight.dtype, weight.device, weight.stride())


def statistics(model: nn.Module) -> list[Tensor]:
    """What batch normalisation has gathered."""
    return [value for key, value in model.state_dict().items() if "running" in key]


def loss_of(model: nn.Module, example: Example) -> Tensor:
    return torch.stack([out.float().square().sum() for out in run(model, example, train=True)]).sum()


def gradients(model: nn.Module, example: Example) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss_of(model, example).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- what stays as it was


@models(CONVERTIBLE)
def test_keys_order_values_and_class_stay(name: str) -> None:
    model, converted, _ = convert(name)
    before, after = model.state_dict(), converted.state_dict()
    assert list(before) == list(after)
    assert same(after.values(), before.values())  # the dense weights
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in converted.named_parameters()]
    assert isinstance(converted, type(model))
    for (path, module), (other_path, other) in zip(model.named_modules(), converted.named_modules(), strict=True):
        assert path == other_path
        assert isinstance(other, type(module))
        assert plain_class(other) is type(module)
        assert is_masked(other) == any(site.path == path for site in masked_sites(converted))


@models(CONVERTIBLE)
def test_checkpoints_load_strictly_in_both_directions(name: str) -> None:
    model, converted, example = convert(name)
    other, _ = build(name)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.normal_()
    converted.load_state_dict(other.state_dict(), strict=True)
    assert same(converted.state_dict().values(), other.state_dict().values())
    for site in masked_sites(converted):
        assert_fresh(site.owner, site.attr)
    model.load_state_dict(converted.state_dict(), strict=True)
    assert same(run(model, example), run(other, example))


@models(CONVERTIBLE)
@train_or_eval
def test_output_is_that_of_pre_masked_weights(name: str, train: bool) -> None:
    _, converted, example = convert(name)
    baked = bake(converted)
    assert not any(is_masked(module) for module in baked.modules())
    for _ in range(2):  # the second time from the cache
        assert same(run(converted, example, train=train), run(baked, example, train=train))
    assert same(statistics(converted), statistics(baked))


@models(CONVERTIBLE)
def test_output_without_gradients_is_that_of_pre_masked_weights(name: str) -> None:
    _, converted, example = convert(name)
    baked = bake(converted)
    with torch.no_grad():  # fused attention paths
        assert same(run(converted, example), run(baked, example))


@models(OWN)
def test_kept_gradients_are_those_of_pre_masked_weights(name: str) -> None:
    _, converted, example = convert(name, "fixed")
    masks = {site.spec.name: site.mask for site in masked_sites(converted)}
    expected, found = gradients(bake(converted), example), gradients(converted, example)
    assert masks.keys() <= found.keys() == expected.keys()
    for key, grad in expected.items():
        if key in masks and grad is not None:
            grad = torch.where(masks[key], grad, torch.zeros((), dtype=grad.dtype))
        assert (found[key] is None) == (grad is None)
        assert grad is None or torch.equal(found[key], grad), key  # type: ignore[arg-type]


@models(OWN)
def test_ste_gradients_are_dense_ones_and_an_update_adds_the_decay(name: str) -> None:
    _, converted, example = convert(name, decay=0.125)
    dropped = {site.spec.name: site.parameter.detach().masked_fill(site.mask, 0) for site in masked_sites(converted)}
    expected, found = gradients(bake(converted), example), gradients(converted, example)
    for key, grad in expected.items():
        assert (found[key] is None) == (grad is None)
        assert grad is None or torch.equal(found[key], grad), key  # type: ignore[arg-type]
    pull(converted)
    for key, parameter in converted.named_parameters():
        if (grad := expected[key]) is not None:
            wanted = grad + 0.125 * dropped[key] if key in dropped else grad
            assert torch.equal(parameter.grad, wanted), key  # type: ignore[arg-type]


# --- copies


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}
copies = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)


@copies
@models(CONVERTIBLE)
def test_copies_are_equal_and_independent(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    _, converted, example = convert(name)
    run(converted, example)  # with warm caches
    twin = duplicate(converted)
    sites, twins = list(masked_sites(converted)), list(masked_sites(twin))
    assert [(s.path, s.attr, s.spec) for s in sites] == [(s.path, s.attr, s.spec) for s in twins]
    assert all(type(a) is type(b) for a, b in zip(converted.modules(), twin.modules(), strict=True))
    assert list(converted.state_dict()) == list(twin.state_dict())
    expected = run(converted, example)
    assert same(run(twin, example), expected)
    with torch.no_grad():
        for site in twins:
            site.parameter.normal_()
    for site in twins:
        assert_fresh(site.owner, site.attr)
    assert same(run(converted, example), expected)


@copies
def test_copies_train(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    twin = duplicate(linear())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()
    assert_fresh(twin)


def test_a_frozen_mask_survives_a_copy() -> None:
    module = linear()
    freeze(module)
    with torch.no_grad():
        parameter(module).normal_()
    twin = pickled(copy.deepcopy(module))
    assert torch.equal(twin.get_buffer("weight_mask"), module.get_buffer("weight_mask"))
    assert_fresh(twin)


def test_a_copied_weight_is_a_plain_tensor() -> None:
    weight, stream = linear().weight, io.BytesIO()
    torch.save(weight, stream)
    stream.seek(0)
    for value in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(stream, weights_only=True)):
        assert type(value) is Tensor
        assert torch.equal(value, weight)


# --- writes through the attribute


def in_place_operator(module: nn.Module) -> None:
    module.weight *= 2


def in_place_data_operator(module: nn.Module) -> None:
    module.weight.data *= 2


def assign_data(module: nn.Module) -> None:
    module.weight.data = torch.ones(8, 16)


def assign_parameter(module: nn.Module) -> None:
    module.weight = nn.Parameter(torch.ones(8, 16))


def set_row(module: nn.Module) -> None:
    module.weight[1] = 3.0


def set_data_entry(module: nn.Module) -> None:
    module.weight.data[1, 2] = 3.0


def set_entry_of_a_view(module: nn.Module) -> None:
    module.weight.view(-1)[3] = 7.0


def chained(module: nn.Module) -> None:
    module.weight.normal_().mul_(2).clamp_(-1, 1)


WRITES: dict[str, Callable[[Any], Any]] = {
    "init.normal_": lambda m: nn.init.normal_(m.weight),
    "init.kaiming_uniform_": lambda m: nn.init.kaiming_uniform_(m.weight),
    "init.constant_": lambda m: nn.init.constant_(m.weight, 0.5),
    "init.orthogonal_": lambda m: nn.init.orthogonal_(m.weight),
    "init.sparse_": lambda m: nn.init.sparse_(m.weight, 0.5),
    "init.trunc_normal_": lambda m: nn.init.trunc_normal_(m.weight),
    "timm.trunc_normal_": lambda m: timm.layers.trunc_normal_(m.weight, std=0.02),
    "reset_parameters": lambda m: m.reset_parameters(),
    "copy_": lambda m: m.weight.copy_(torch.ones(8, 16)),
    "mul_": lambda m: m.weight.mul_(2),
    "chained": chained,
    "set_": lambda m: m.weight.set_(torch.ones(8, 16)),
    "in-place operator": in_place_operator,
    "data.copy_": lambda m: m.weight.data.copy_(torch.ones(8, 16)),
    "data.normal_": lambda m: m.weight.data.normal_(),
    "data.zero_": lambda m: m.weight.data.zero_(),
    "data operator": in_place_data_operator,
    "data entry": set_data_entry,
    "data=": assign_data,
    "parameter=": assign_parameter,
    "register_parameter": lambda m: m.register_parameter("weight", nn.Parameter(torch.ones(8, 16))),
    "row": set_row,
    "view": set_entry_of_a_view,
    "row view": lambda m: m.weight[1].fill_(2.0),
    "transposed view": lambda m: m.weight.t()[3].fill_(1.0),
    "detached": lambda m: m.weight.detach()[2].fill_(5.0),
    "data view": lambda m: m.weight.data.view(-1)[3:6].fill_(1.0),
    "whole view": lambda m: m.weight.view(-1).fill_(2.0),
    "chunks": lambda m: [nn.init.normal_(part) for part in m.weight.chunk(2)],
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(torch.ones(8 * 16 + 8), m.parameters()),
}
ANYWHERE = ("init.", "timm", "data", "reset", "parameter", "register", "vector")
WITHOUT_NO_GRAD = [key for key in WRITES if key.startswith(ANYWHERE)]


def written(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("write", [pytest.param(WRITES[key], id=key) for key in names])


def write_both(write: Callable[[Any], Any], train: bool) -> tuple[nn.Linear, nn.Linear]:
    """A masked and a plain linear after the same write."""
    module, plain = linear().train(train), nn.Linear(16, 8).train(train)
    plain.load_state_dict(module.state_dict())
    assert_fresh(module)  # with a warm cache
    for each in (plain, module):
        torch.manual_seed(1)
        write(each)
    return module, plain


@written(list(WRITES))
@train_or_eval
def test_writes_reach_the_parameter(write: Callable[[Any], Any], train: bool) -> None:
    with torch.no_grad():
        module, plain = write_both(write, train)
    assert_fresh(module)
    assert torch.equal(parameter(module), plain.weight)
    assert same(module.state_dict().values(), plain.state_dict().values())


@written(WITHOUT_NO_GRAD)
def test_what_torch_allows_outside_no_grad_is_allowed(write: Callable[[Any], Any]) -> None:
    module, plain = write_both(write, train=True)
    assert_fresh(module)
    assert torch.equal(parameter(module), plain.weight)


def test_a_leaf_that_needs_gradients_is_still_protected() -> None:
    module = linear()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        module.weight.mul_(2)


def moved(module: nn.Module) -> nn.Module:
    return module.double()


def masked_anew(module: nn.Module) -> nn.Module:
    mask_attribute(module, "weight", MaskSpec("weight", Pattern("2:4"), Grouping((8, 16, 1), 4), 0.0))
    return module


def unmasked(module: nn.Module) -> nn.Module:
    unmask(module, keep_masked=False)
    return module


WAITING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "state_dict": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "double": moved,
    "unmask": unmasked,
    "mask again": masked_anew,
    "throw-away copy": lambda m: throw_away_copy(m, None),
}
then_one_of = pytest.mark.parametrize("then", WAITING.values(), ids=WAITING)


@then_one_of
def test_a_write_through_a_view_is_not_lost_before_the_next_read(then: Callable[[nn.Module], nn.Module]) -> None:
    module = linear()
    with torch.no_grad():
        nn.init.constant_(module.weight.view(-1), 2.0)
    assert (then(module).state_dict()["weight"] == 2.0).all()


def test_a_write_through_a_view_does_not_undo_a_later_load() -> None:
    module = linear()
    checkpoint = {key: value.clone() for key, value in module.state_dict().items()}
    nn.init.orthogonal_(module.weight)
    module.load_state_dict(checkpoint)
    assert_fresh(module)
    assert torch.equal(parameter(module), checkpoint["weight"])


def test_grad_requires_grad_and_hooks_are_the_parameters() -> None:
    module, seen = linear(), []
    module.weight.grad = torch.ones(8, 16)
    assert parameter(module).grad is module.weight.grad
    module.zero_grad()
    assert module.weight.grad is None
    handle = module.weight.register_hook(lambda grad: seen.append(grad))
    module(torch.randn(2, 16)).sum().backward()
    assert len(seen) == 1
    assert module.weight.grad is parameter(module).grad is not None
    handle.remove()
    module.weight.requires_grad_(False)
    assert not parameter(module).requires_grad
    assert not module.weight.requires_grad
    assert not F.linear(torch.randn(2, 16), module.weight).requires_grad
    module.weight.requires_grad = True
    assert parameter(module).requires_grad
    assert F.linear(torch.randn(2, 16), module.weight).requires_grad


WRITES_BEHIND: dict[str, Callable[[nn.Linear], Any]] = {
    "init.eye_": lambda m: nn.init.eye_(m.weight),  # torch.eye(out=...)
    "out=": lambda m: torch.ones(8, 16, out=m.weight),
    "function view": lambda m: torch.transpose(m.weight, 0, 1).fill_(1.0),
}

READS_AFTER = {"read": lambda m: m.weight, "state dict": lambda m: m.state_dict(), "copy": copy.deepcopy, "pickle": pickled}


@pytest.mark.parametrize("write", WRITES_BEHIND.values(), ids=WRITES_BEHIND)
@pytest.mark.parametrize("then", READS_AFTER.values(), ids=READS_AFTER)
def test_writes_that_cannot_be_followed_raise(write: Callable[[Any], Any], then: Callable[[nn.Module], Any]) -> None:
    module = linear()
    before = parameter(module).detach().clone()
    with torch.no_grad():
        write(module)
    with pytest.raises(NmfxError, match="weight: its masked value was written to"):
        then(module)
    assert torch.equal(parameter(module), before)
    assert_fresh(module)  # once is enough


@pytest.mark.xfail(
    strict=True, reason="a known limit: Module.get_parameter reads the attribute and refuses what is no Parameter"
)
def test_get_parameter_finds_the_dense_weight() -> None:
    model = nn.Sequential(linear())
    assert model.get_parameter("0.weight") is parameter(model[0])


def test_what_cannot_be_assigned_raises() -> None:
    module = linear()
    before = parameter(module)
    with pytest.raises((TypeError, NmfxError)):
        module.weight = torch.zeros(8, 16)  # type: ignore[assignment]
    assert parameter(module) is before
    assert_fresh(module)


# --- the cache


def test_an_unchanged_weight_is_read_from_the_cache() -> None:
    module, x = linear().eval(), torch.randn(2, 16)
    with torch.no_grad():
        value = module.weight
        module(x)
        assert module.weight is value
    assert type(value) is MaskedWeight


def step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    module(x).square().sum().backward()
    optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.01, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.01, fused=True),
    "sgd-fused-momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@optimizers
@methods
def test_a_step_is_seen(make: Callable[[Any], torch.optim.Optimizer], decay: float | None) -> None:
    module = linear((64, 64), decay)
    optimizer = make(module.parameters())
    for _ in range(3):
        step(module, optimizer, torch.randn(8, 64))
        assert_fresh(module)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            make,
            id=key,
        )
        for key, make in OPTIMIZERS.items()
    ],
)
def test_a_step_that_leaves_the_first_feature_alone_is_seen(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    module = linear((64, 64), decay=0.0)
    x = torch.randn(8, 64)
    x[:, 0] = 0  # a pixel in the corner, a dead unit
    step(module, make(module.parameters()), x)
    assert_fresh(module)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "copy_": lambda m: parameter(m).copy_(torch.randn(64, 64)),
    "one entry": lambda m: parameter(m).view(-1)[77].fill_(9.0),
    "data": lambda m: parameter(m).data.normal_(),
    "new data": lambda m: setattr(parameter(m), "data", torch.randn(64, 64)),
    "load_state_dict": lambda m: m.load_state_dict(nn.Linear(64, 64).state_dict()),
    "load_state_dict-assign": lambda m: m.load_state_dict(nn.Linear(64, 64).state_dict(), assign=True),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "meta and back": lambda m: nn.init.normal_(m.to("meta").to_empty(device="cpu").weight),
    "share_memory": lambda m: m.share_memory(),
    "new parameter": lambda m: m.register_parameter("weight", nn.Parameter(torch.randn(64, 64))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[nn.Module], Any]) -> None:
    module = linear((64, 64)).eval()
    assert_fresh(module)
    with torch.no_grad():
        change(module)
    assert_fresh(module)


@pytest.mark.xfail(
    strict=True, reason="a known limit: .data of the parameter, in weights that are not probed, without a backward"
)
def test_a_small_write_through_the_parameters_data_is_seen() -> None:
    module = linear((64, 64)).eval()
    assert_fresh(module)
    parameter(module).data[3, 5] = 9.0
    assert_fresh(module)


def test_a_memory_format_is_followed() -> None:
    module = convolution()
    expected = module.weight.detach().clone()
    module.to(memory_format=torch.channels_last)
    assert_fresh(module)
    assert torch.equal(module.weight, expected)
    with torch.no_grad():
        parameter(module).normal_()
    assert_fresh(module)


STRIDES = {"transposed": lambda: torch.randn(8, 4).t(), "strided": lambda: torch.randn(4, 16)[:, ::2]}


@pytest.mark.parametrize("dense", STRIDES.values(), ids=STRIDES)
def test_any_strides_will_do(dense: Callable[[], Tensor]) -> None:
    module = nn.Linear(8, 4)
    module.weight = nn.Parameter(dense())
    mask_attribute(module, "weight", MaskSpec("weight", Pattern("2:4"), Grouping((4, 8, 1), 4)))
    for _ in range(2):
        value, weight = module.weight, parameter(module)
        assert torch.equal(value, torch.where(make_mask(weight, 2, Grouping((4, 8, 1), 4)), weight, torch.zeros(())))
        with torch.no_grad():
            weight.normal_()


def test_a_read_in_inference_mode_leaves_a_module_that_trains() -> None:
    module, x = linear(), torch.randn(2, 16)
    with torch.inference_mode():
        module(x)
    step(module, torch.optim.SGD(module.parameters(), lr=0.1), x)
    assert_fresh(module)


# --- freezing, masking and unmasking


def test_freeze_holds_the_mask() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear((4, 8)))
    before = [site.mask.clone() for site in masked_sites(model)]
    freeze(model)
    for _ in range(2):
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_()
        assert same([site.mask for site in masked_sites(model)], before)
        for site in masked_sites(model):
            assert_fresh(site.owner)


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(
            True,
            id="read",
        ),
        pytest.param(False, id="unread"),
    ],
)
def test_freeze_lets_go(read: bool) -> None:
    module = linear()
    freeze(module)
    with torch.no_grad():
        parameter(module).normal_()
    if read:
        assert_fresh(module)
    freeze(module, frozen=False)
    assert_fresh(module)


def test_freeze_holds_the_mask_of_the_weights_of_that_moment() -> None:
    module = linear()
    with torch.no_grad():
        parameter(module).normal_()  # not read since
    freeze(module)
    assert torch.equal(module.get_buffer("weight_mask"), make_mask(parameter(module), 2, Grouping((8, 16, 1), 4)))


@models(OWN)
@pytest.mark.parametrize("keep_masked", [True, False], ids=["masked", "dense"])
def test_unmask_gives_the_plain_model_back(name: str, keep_masked: bool) -> None:
    model, converted, example = convert(name)
    expected = run(converted if keep_masked else model, example)
    for module in converted.modules():
        unmask(module, keep_masked=keep_masked)
    assert [type(module) for module in converted.modules()] == [type(module) for module in model.modules()]
    assert [key for key, _ in converted.named_buffers()] == [key for key, _ in model.named_buffers()]
    for found, expected_module in zip(converted.modules(), model.modules(), strict=True):
        assert found.__dict__.keys() == expected_module.__dict__.keys()
    assert same(run(converted, example), expected)
    pickle.dumps(converted)


def test_masks_are_buffers_that_are_not_saved() -> None:
    module = linear()
    assert dict(module.named_buffers()).keys() == {"weight_mask"}
    assert module.get_buffer("weight_mask").dtype == torch.bool
    assert list(module.state_dict()) == ["weight", "bias"]
    assert module.half().get_buffer("weight_mask").dtype == torch.bool
    assert module.to("meta").get_buffer("weight_mask").is_meta


def test_a_module_that_uses_the_masks_name_is_refused() -> None:
    module = nn.Linear(16, 8)
    module.register_buffer("weight_mask", torch.ones(8, 16))
    with pytest.raises(NmfxError, match=r"fc\.weight: .*already has an attribute 'weight_mask'"):
        mask_attribute(module, "weight", MaskSpec("fc.weight", Pattern("2:4"), Grouping((8, 16, 1), 4)))
    assert type(module) is nn.Linear


def test_masking_again_replaces_the_pattern() -> None:
    module = linear()
    state = next(masked_sites(module)).spec
    mask_attribute(module, "weight", replace(state, pattern=Pattern("1:4")))
    assert_fresh(module)
    assert int(module.weight.count_nonzero()) == 8 * 16 // 4
    assert type(module).__mro__[1] is nn.Linear


def test_two_masks_in_one_module() -> None:
    module = nn.LSTM(8, 4)
    for attr, length in (("weight_ih_l0", 8), ("weight_hh_l0", 4)):
        mask_attribute(module, attr, MaskSpec(attr, Pattern("2:4"), Grouping((16, length, 1), 4)))
    other = nn.LSTM(8, 4)
    for attr, length in (("weight_ih_l0", 8), ("weight_hh_l0", 4)):
        mask_attribute(other, attr, MaskSpec(attr, Pattern("1:4"), Grouping((16, length, 1), 4)))
    assert type(module) is type(other)  # one class for each pair, so that compilers see stable types
    assert [site.attr for site in masked_sites(module)] == ["weight_ih_l0", "weight_hh_l0"]
    for attr in ("weight_ih_l0", "weight_hh_l0"):
        assert_fresh(module, attr)


def test_a_tied_weight_is_read_masked_by_all_its_owners() -> None:
    _, converted, _ = convert("tied")
    assert [site.path for site in masked_sites(converted)] == ["embed", "decoder"]
    assert converted.embed._parameters["weight"] is converted.decoder._parameters["weight"]
    assert torch.equal(converted.embed.weight, converted.decoder.weight)
    assert torch.equal(converted.embed(torch.arange(12)), converted.decoder.weight)


def test_the_original_keeps_its_weights_when_a_copy_is_converted() -> None:
    model, converted, example = convert("residual")
    expected = run(model, example)
    step(converted, torch.optim.SGD(converted.parameters(), lr=1.0), *example.args)
    assert not any(is_masked(module) for module in model.modules())
    assert same(run(model, example), expected)


def test_a_throw_away_copy_is_plain_and_dense() -> None:
    model, converted, example = convert("attention")
    twin = throw_away_copy(converted, None)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert same(run(twin, example), run(model, example))
    assert all(tensor.is_meta for tensor in throw_away_copy(converted).parameters())


# --- with the rest of torch


def test_reset_classifier_of_a_converted_timm_model() -> None:
    model = timm.create_model("test_resnet", num_classes=8).eval()
    x = torch.randn(1, 3, 32, 32)
    converted = transform(model, "2:4", example_input=x)
    assert is_masked(converted.get_classifier())
    converted.reset_classifier(4)
    assert converted(x).shape == (1, 4)
    assert type(converted.get_classifier()) is nn.Linear
    assert same([converted.forward_features(x)], [bake(converted).forward_features(x)])
    assert converted.pretrained_cfg == model.pretrained_cfg
    sites = find_sites(converted, x)
    assert sites["fc.weight"].shape[0] == 4
    again = transform(converted, "2:4", sites=sites)
    assert is_masked(again.get_classifier())
    pickle.loads(pickle.dumps(again))


def test_functional_call_masks_the_weights_it_is_given() -> None:
    module, x = linear(), torch.randn(2, 16)
    weight = torch.randn(8, 16)
    mask = make_mask(weight, 2, Grouping((8, 16, 1), 4))
    found = torch.func.functional_call(module, {"weight": weight}, x)
    assert torch.equal(found, F.linear(x, weight * mask, module.bias))
    assert_fresh(module)


@methods
def test_function_transforms(decay: float | None) -> None:
    module, x = linear(decay=decay), torch.randn(2, 16)
    state = {key: value.detach() for key, value in module.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(module, p, x).square().sum())(state)
    module(x).square().sum().backward()
    assert torch.equal(found["weight"], parameter(module).grad)


@methods
def test_checkpointing_gives_the_same_gradients(decay: float | None) -> None:
    module, x = linear(decay=decay), torch.randn(2, 16)
    module(x).square().sum().backward()
    expected, parameter(module).grad = parameter(module).grad, None
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(parameter(module).grad, expected)


def test_autocast_reads_the_mask_too() -> None:
    module, x = linear(), torch.randn(2, 16)
    plain = bake(module)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), plain(x))
        with torch.no_grad():
            parameter(module).normal_()
        plain = bake(module)


def test_averaged_models_follow() -> None:
    module = linear()
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    average(torch.randn(2, 16))
    with torch.no_grad():
        parameter(module).normal_()
    average.update_parameters(module)
    assert_fresh(average.module)


def test_the_dense_gradient_can_revive_a_weight() -> None:
    module = linear((1, 4), decay=0.0)
    with torch.no_grad():
        parameter(module).copy_(torch.tensor([[3.0, 2.0, 1.0, 0.5]]))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(torch.tensor([[0.0, 0.0, 0.0, -9.0]])).sum().backward()
    optimizer.step()
    assert module.get_buffer("weight_mask").tolist() == [[True, True, False, False]]  # as of the last read
    assert module.weight.tolist() == [[3.0, 0.0, 0.0, 9.5]]


def test_nan_weights_do_not_hide() -> None:
    module = linear()
    with torch.no_grad():
        parameter(module)[0, 3] = math.nan
    assert module.weight[0, 3].isnan()
    assert int(module.get_buffer("weight_mask").sum()) == 64


# --- torch.compile


class Small(nn.Module):
    """A convolution, a linear and a functional read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3), nn.Linear(8, 8)
        self.inner = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.fc(self.conv(x).mean((2, 3)))), self.inner.weight)


def check_compiled(backend: str) -> None:
    x = torch.randn(2, 4, 5, 5)
    model = transform(Small(), "2:4", example_input=x)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    for _ in range(2):
        for train in (False, True):
            torch.testing.assert_close(compiled.train(train)(x), model.train(train)(x))
        for each, optimizer in zip((model, compiled), optimizers, strict=True):
            step(each, optimizer, x)
        for found, expected in zip(twin.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad)
            torch.testing.assert_close(found, expected)
    for each in (model, twin):
        freeze(each)
        with torch.no_grad():
            for index, weight in enumerate(each.parameters()):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_agree(backend: str) -> None:
    torch.compiler.reset()
    check_compiled(backend)


def test_masked_values_go_with_their_module() -> None:
    module = linear()
    module(torch.randn(2, 16)).sum().backward()
    cache = weakref.ref(module.__dict__["_masked_sites"]["weight"].cache)
    gc.disable()
    try:
        del module
        assert cache() is None  # without the help of the garbage collector
    finally:
        gc.enable()
