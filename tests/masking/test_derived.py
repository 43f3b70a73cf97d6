"""Laws of weights that are standardised in the forward pass: the convolution receives the zeros, and training works."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

import nmfx
from nmfx.errors import NmfxError
from nmfx.masking.derived import derive
from nmfx.masking.sites import masked_sites
from nmfx.models.example import Example
from nmfx.passes.transform import conversion_difference
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask


class Standardising(nn.Conv2d):
    """Weight standardisation as its authors write it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Centred(nn.Linear):
    """A linear layer that takes the mean off its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, bias=self.bias, weight=self.weight - self.weight.mean(1, keepdim=True))


LAYERS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module]]] = {
    "std": (lambda: StdConv2d(8, 12, 3), nn.Conv2d),
    "std-same": (lambda: StdConv2dSame(8, 12, 3, stride=2), Conv2dSame),
    "std-grouped": (lambda: StdConv2d(8, 12, 3, groups=2, padding=2, dilation=2), nn.Conv2d),
    "scaled": (lambda: ScaledStdConv2d(8, 12, 3, gamma=1.7), nn.Conv2d),
    "scaled-same": (lambda: ScaledStdConv2dSame(8, 12, 3, stride=2), Conv2dSame),
    "own": (lambda: Standardising(8, 12, 3, padding=1), nn.Conv2d),
    "linear": (lambda: Centred(8, 12), nn.Linear),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network of one such layer, with a gain that is not one, and an input of odd size."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name][0]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, torch.randn(2, 8) if name == "linear" else torch.randn(2, 8, 9, 11)


def by_hand(model: nn.Module, x: Tensor, n: int = 2) -> Tensor:
    """What the layer computes when the weight that it hands on is masked; differentiable."""
    layer = model[0]  # type: ignore[index]
    site = nmfx.find_sites(model, x)["0.weight"]
    mask = make_mask(derive(layer, type(layer)), n, Grouping(site.rows, 4))
    real = F.linear if isinstance(layer, nn.Linear) else F.conv2d
    name = real.__name__
    patched = lambda x, weight, *args, **kwargs: real(x, weight * mask, *args, **kwargs)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, name, patched)
        return model(x)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_convolved_is_masked(name: str) -> None:
    model, x = build(name)
    site = nmfx.find_sites(model, x)["0.weight"]
    assert site.derived
    converted = nmfx.transform(model, "2:4", example_input=x, training="fixed")
    assert torch.equal(converted(x), by_hand(model, x))
    assert not torch.equal(converted(x), model(x))
    checked = nmfx.verify(converted, example_input=x)
    assert (checked.sites, checked.received, checked.nonzeros * 2) == (1, 1, checked.weights)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_pass_through_the_standardisation(name: str) -> None:
    model, x = build(name)
    converted = nmfx.transform(model, "2:4", example_input=x, training="fixed")
    by_hand(model, x).square().sum().backward()
    converted(x).square().sum().backward()
    for expected, found in zip(model.parameters(), converted.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_training_moves_masks_and_loss(name: str) -> None:
    model, x = build(name)
    converted = nmfx.transform(model, "2:4", example_input=x)
    target = torch.randn_like(model(x))
    first = next(masked_sites(converted)).mask.clone()
    optimizer = torch.optim.SGD(converted.parameters(), 0.05)
    losses = []
    for _ in range(30):
        loss = (converted(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(next(masked_sites(converted)).mask, first)
    nmfx.verify(converted, example_input=x)


@pytest.mark.parametrize("name", LAYERS)
def test_baking_gives_a_plain_layer_that_receives_the_zeros(name: str) -> None:
    model, x = build(name)
    converted = nmfx.transform(model, "2:4", example_input=x)
    baked = nmfx.bake(converted)
    assert type(baked[0]) is LAYERS[name][1]  # type: ignore[index]
    assert {key for key, _ in baked.named_parameters()} == {"0.weight", "0.bias"} & {key for key, _ in model.named_parameters()}
    torch.testing.assert_close(baked(x), converted(x))
    assert int((dict(baked.named_parameters())["0.weight"] != 0).sum()) * 2 == nmfx.find_sites(model, x).weights
    assert nmfx.verify(baked, nmfx.scheme_of(converted), example_input=x).received == 1


@pytest.mark.parametrize("name", LAYERS)
def test_keys_copies_and_checkpoints(name: str, tmp_path: Path) -> None:
    model, x = build(name)
    converted = nmfx.transform(model, "2:4", example_input=x)
    expected = converted(x)
    assert list(converted.state_dict()) == list(model.state_dict())
    converted.load_state_dict(copy.deepcopy(model).state_dict())
    for other in (
        (copy.deepcopy(converted), pickle.loads(pickle.dumps(nn.ModuleList([converted])))[0])
        if name not in ("own", "linear")
        else (copy.deepcopy(converted),)
    ):
        assert torch.equal(other(x), expected)
    nmfx.save_checkpoint(converted, tmp_path / "c.safetensors")
    loaded = nmfx.load_checkpoint(tmp_path / "c.safetensors", copy.deepcopy(model))
    assert torch.equal(loaded(x), expected)
    assert nmfx.verify(loaded, example_input=x).received == 1


def test_frozen_masks_survive_a_checkpoint(tmp_path: Path) -> None:
    model, x = build("scaled")
    converted = nmfx.transform(model, "2:4", example_input=x, training="fixed")
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.copy_(torch.randn_like(parameter))
    nmfx.save_checkpoint(converted, tmp_path / "c.safetensors")
    loaded = nmfx.load_checkpoint(tmp_path / "c.safetensors", copy.deepcopy(model))
    assert torch.equal(loaded(x), converted(x))


@pytest.mark.parametrize("name", LAYERS)
def test_an_all_ones_mask_changes_no_bit(name: str) -> None:
    model, x = build(name)
    types = [type(module) for module in model.modules()]
    assert conversion_difference(model, nmfx.find_sites(model, x), Example((x,))) == 0
    assert [type(module) for module in model.modules()] == types


def test_a_layer_that_does_more_cannot_be_baked() -> None:
    class Doubling(Standardising):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model, x = nn.Sequential(Doubling(8, 12, 3)), torch.randn(2, 8, 9, 9)
    converted = nmfx.transform(model, "2:4", example_input=x)
    assert nmfx.verify(converted, example_input=x).received == 1
    with pytest.raises(NmfxError, match="Doubling: its forward pass does more"):
        nmfx.bake(converted)


@pytest.mark.parametrize("name", ["test_nfnet", "test_byobnet"])
def test_the_fx_view_is_the_model(name: str) -> None:
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    converted = nmfx.transform(model, "2:4", example_input=x)
    view: Any = nmfx.to_graph(converted, x)
    assert torch.equal(view(x), converted(x))
