"""Laws of bake and verify: plain classes with real zeros that compute the same, and no group with a weight too many."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from awkward import MODELS, build, models, run, same, snapshot
from torch import Tensor, nn

from nmfx.errors import SchemeError, VerificationError
from nmfx.masking.sites import masked_sites
from nmfx.models.census import find_sites
from nmfx.passes.baking import bake
from nmfx.passes.transform import scheme_of, transform
from nmfx.passes.verification import Verified, verify
from nmfx.scheme import Scheme

CONVERTIBLE = [name for name in MODELS if name != "scripted"]  # deepcopy of a ScriptModule makes non-leaf parameters


def converted(name: str, remainder: Any = "short") -> tuple[nn.Module, nn.Module, Scheme, Any]:
    """A model, the same converted, its scheme, and an example of the input."""
    model, example = build(name)
    sites = find_sites(model, example)
    scheme = Scheme.uniform(sites, "1:4", remainder=remainder)
    return model, transform(model, scheme, sites=sites), scheme, example


@models([name for name in CONVERTIBLE if name != "standardised"])  # see masking/test_derived.py
def test_a_baked_model_is_plain_and_computes_the_same(name: str) -> None:
    model, masked, scheme, example = converted(name)
    expected = [run(copy.deepcopy(masked), example, train=train) for train in (False, True)]
    before = snapshot(masked)
    baked = bake(masked)
    assert snapshot(masked) == before
    assert [type(module) for module in baked.modules()] == [type(module) for module in model.modules()]
    assert list(baked.state_dict()) == list(model.state_dict())
    assert not list(masked_sites(baked))
    assert [m.__dict__.keys() for m in baked.modules()] == [m.__dict__.keys() for m in model.modules()]
    assert all(same(run(copy.deepcopy(baked), example, train=train), expected[train]) for train in (False, True))
    for key, weight in baked.named_parameters():
        if key in scheme:
            assert int((weight == 0).sum()) == weight.numel() - scheme.kept(find_sites(model, example)[key])


@models(CONVERTIBLE)
def test_masked_and_baked_are_verified_alike(name: str) -> None:
    _, masked, scheme, example = converted(name)
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.copy_(torch.randn_like(parameter))
    found, baked = verify(masked), verify(bake(masked), scheme, example_input=example)
    assert found.nonzeros > 0
    if name not in ("tied", "twice"):
        assert found == baked
        assert found.sites == len(scheme)


def test_a_tied_weight_is_verified_once() -> None:
    _, masked, scheme, example = converted("tied")
    assert verify(masked) == verify(bake(masked), scheme, example_input=example)


def test_verify_counts_by_hand() -> None:
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 3))
    masked = transform(model, Scheme({"0.weight": "1:4", "1.weight": "2:4"}, short=True), example_input=torch.empty(1, 10))
    assert verify(masked) == Verified(sites=2, groups=4 * 3 + 3, weights=52, nonzeros=4 * 3 + 3 * 2)


def test_inplace_bakes_the_model_itself() -> None:
    _, masked, _, example = converted("residual")
    expected, parameters = run(masked, example), [id(p) for p in masked.parameters()]
    assert bake(masked, inplace=True) is masked
    assert [id(p) for p in masked.parameters()] == parameters
    assert same(run(masked, example), expected)


def test_baking_twice_or_nothing_changes_nothing() -> None:
    model, masked, _, example = converted("residual")
    once = bake(masked)
    assert same(bake(once).state_dict().values(), once.state_dict().values())
    assert same(run(bake(model), example), run(model, example))


def test_what_is_baked_is_what_is_read_now() -> None:
    _, masked, _, example = converted("residual")
    optimizer = torch.optim.SGD(masked.parameters(), lr=1.0)
    run(masked, example, train=True)[0].square().sum().backward()
    optimizer.step()
    weights = {site.spec.name: getattr(site.owner, site.attr).detach().clone() for site in masked_sites(masked)}
    baked = bake(masked)
    assert all(torch.equal(dict(baked.named_parameters())[key].detach(), weight) for key, weight in weights.items())


def test_a_baked_model_takes_gradients_everywhere() -> None:
    _, masked, _, example = converted("residual")
    baked = bake(masked)
    run(baked, example, train=True)[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in baked.parameters())
    assert all(type(parameter) is nn.Parameter for parameter in baked.parameters())


# Violations.


def dropped(weight: Tensor) -> tuple[int, ...]:
    """Where the last dropped weight is."""
    return tuple((weight == 0).nonzero()[-1].tolist())


@pytest.mark.parametrize("name", ["residual", "attention", "listed", "tied", "transposed", "products"])
def test_a_planted_weight_is_found_and_named(name: str) -> None:
    _, masked, scheme, example = converted(name)
    for key in scheme:
        baked = bake(masked)
        weight = dict(baked.named_parameters())[key].detach()
        weight[dropped(weight)] = 1e-30
        with pytest.raises(VerificationError, match=rf"^{key}: group \d+ of row \d+ holds 2 non-zeros, expected at most 1"):
            verify(baked, scheme, example_input=example)


def test_the_group_and_the_row_are_the_ones() -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 3))
    scheme, x = Scheme({"0.weight": "2:4"}), torch.empty(1, 8, 5, 5)
    baked = bake(transform(model, scheme, example_input=x))
    baked[0].weight.data[3, 4:8, 1, 2] = 1  # output 3, tap 5 of 9: row 3 * 9 + 5, second group of four
    with pytest.raises(VerificationError, match=r"0\.weight: group 1 of row 32 holds 4 non-zeros, expected at most 2 of 4"):
        verify(baked, scheme, example_input=x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-45], ids=["nan", "inf", "denormal"])
def test_everything_but_zero_counts(value: float) -> None:
    _, masked, scheme, example = converted("residual")
    baked = bake(masked)
    baked.fc.weight.data[dropped(baked.fc.weight)] = value
    with pytest.raises(VerificationError, match=r"fc\.weight"):
        verify(baked, scheme, example_input=example)


def test_negative_zero_is_zero() -> None:
    _, masked, scheme, example = converted("residual")
    baked = bake(masked)
    baked.fc.weight.data[dropped(baked.fc.weight)] = -0.0
    verify(baked, scheme, example_input=example)


def test_a_spoilt_mask_is_found() -> None:
    _, masked, _, _ = converted("residual")
    masked.conv1._buffers["weight_mask"].fill_(True)
    fixed = transform(masked, "1:4", example_input=torch.empty(1, 3, 6, 6), training="fixed")
    verify(fixed)
    fixed.conv1._buffers["weight_mask"].fill_(True)
    next(site for site in masked_sites(fixed) if site.path == "conv1").parameter.data.add_(1)
    with pytest.raises(VerificationError, match=r"conv1\.weight: group 0 of row 0 holds 4"):
        verify(fixed)


@pytest.mark.parametrize(
    ("scheme", "make", "groups"),
    [
        (Scheme({"0.weight": "1:16"}, "flat"), lambda: nn.Conv2d(3, 16, 3), 27),
        (Scheme({"0.weight": "1:16"}, short=True), lambda: nn.Conv2d(3, 16, 3), 144),
        (Scheme({"0.weight": "2:8"}, short=True), lambda: nn.Conv2d(20, 4, 1), 12),
        (Scheme({"0.weight": "2:4"}), lambda: nn.Conv2d(8, 8, 1, groups=2), 8),
    ],
    ids=["flat", "short", "full and short", "conv groups"],
)
def test_every_layout_is_verified(scheme: Scheme, make: Callable[[], nn.Conv2d], groups: int) -> None:
    model = nn.Sequential(make())
    x = torch.empty(1, model[0].in_channels, 4, 4)
    masked = transform(model, scheme, example_input=x)
    baked = bake(masked)
    assert verify(masked).groups == verify(baked, scheme, example_input=x).groups == groups
    with pytest.raises(VerificationError):
        verify(model, scheme, example_input=x)


def test_a_dense_model_disobeys_and_a_plain_one_has_nothing_to_obey() -> None:
    model, _, scheme, example = converted("residual", "dense")
    with pytest.raises(VerificationError, match=r"conv1\.weight: group 0 of row 0 holds 4 non-zeros"):
        verify(model, scheme, example_input=example)
    with pytest.raises(VerificationError, match="Residual: nothing is masked; give the scheme"):
        verify(model)
    with pytest.raises(SchemeError, match=r"stem2\.weight: not a site"):
        verify(model, Scheme({"stem2.weight": "2:4"}), example_input=example)
    assert verify(model, Scheme({}), example_input=example).sites == 0


def test_a_timm_network_is_baked() -> None:
    model = timm.create_model("test_vit").eval()
    masked = transform(model, "2:4")
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        baked = bake(masked)
        assert same([baked(x)], [masked(x)])
    assert verify(baked, scheme_of(masked)) == verify(masked)
    assert type(baked) is type(model)


def test_what_is_kept_is_what_the_weights_are_now() -> None:
    model = transform(nn.Sequential(nn.Linear(64, 64, bias=False)), "2:4", example_input=torch.empty(1, 64)).eval()
    with torch.no_grad():
        model(torch.zeros(1, 64))  # cached
    dict(model.named_parameters())["0.weight"].data[7, 4] = 6.0  # one entry, without a trace
    assert bake(model)[0].weight[7, 4] == 6.0
    verify(model)
    assert model[0].weight[7, 4] == 6.0
