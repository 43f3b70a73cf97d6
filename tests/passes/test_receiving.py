"""Laws of verify: it looks at what products receive, and says when zeros do not reach them or masks are lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from awkward import MODELS, build, models
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import nmfx
from nmfx.errors import TraceError, VerificationError
from nmfx.masking.owner import mask_attribute, unmask
from nmfx.masking.sites import masked_sites
from nmfx.masking.weight import MaskSpec
from nmfx.models.example import Example
from nmfx.passes.receiving import received
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.pattern import Pattern


@models([name for name in MODELS if name != "scripted"])
def test_products_receive_the_zeros_of_every_site(name: str) -> None:
    model, example = build(name)
    sites = nmfx.find_sites(model, example)
    converted = nmfx.transform(model, nmfx.Scheme.uniform(sites, "1:4", remainder="short"), sites=sites)
    arrived = received(converted, example)
    for masked in masked_sites(converted):
        if not sites[masked.spec.name].train_only:
            expected = masked.value != 0
            assert torch.equal(arrived[id(masked.parameter)], expected), masked.spec.name
    checked = nmfx.verify(converted, example_input=example)
    assert checked.received == checked.sites - sum(site.train_only for site in sites)
    plain = nmfx.verify(nmfx.bake(converted), nmfx.scheme_of(converted), example_input=example)
    assert (plain, plain.received) == (checked, checked.received)


class Shifted(nn.Module):
    """Adds something to its weight, of which a census would know; here the mask is forced on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.shift = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight + self.shift)


def test_zeros_that_are_filled_on_the_way_are_seen() -> None:
    model, x = Shifted(), torch.randn(2, 8)
    mask_attribute(model.inner, "weight", MaskSpec("inner.weight", Pattern("2:4"), Grouping((8, 8, 1), 4)))
    with pytest.raises(VerificationError, match=r"zeros do not reach the operation.*inner\.weight: group 0"):
        nmfx.verify(model, example_input=x)


class Twice(nn.Module):
    """Reads its weight as it is, and something that is made of it."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.make = nn.Linear(8, 8), make

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.inner.weight), self.make(self.inner.weight))


@pytest.mark.parametrize(
    "make", [lambda w: w @ w.t(), lambda w: w.softmax(1), lambda w: w.sum(0, keepdim=True)], ids=["square", "softmax", "sum"]
)
def test_a_product_that_receives_no_zeros_beside_one_that_does_is_seen(make: Callable[[Tensor], Tensor]) -> None:
    model, x = Twice(make), torch.randn(2, 8)
    mask_attribute(model.inner, "weight", MaskSpec("inner.weight", Pattern("2:4"), Grouping((8, 8, 1), 4)))
    with pytest.raises(VerificationError, match=r"zeros do not reach the operation.*inner\.weight: group 0"):
        nmfx.verify(model, example_input=x)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8"])
def test_a_fused_model_has_lost_its_masks_and_says_so(name: str) -> None:
    model, x = timm.create_model(name, num_classes=8).eval(), torch.rand(1, 3, 64, 64)
    converted = nmfx.transform(model, "2:4", example_input=x)
    nmfx.verify(converted, example_input=x)
    fused: Any = reparameterize_model(converted)
    with pytest.raises(VerificationError, match=r"sites have lost their masks.*transform the fused model"):
        nmfx.verify(fused, example_input=x)
    anew = nmfx.transform(fused, "2:4", example_input=x)
    assert nmfx.verify(anew, example_input=x).received > 0


def test_one_lost_mask_is_named_in_a_copy_too() -> None:
    model, example = build("residual")
    converted = nn.Sequential(copy.deepcopy(nmfx.transform(model, {"conv*": "2:4"}, example_input=example)))
    unmask(converted[0].conv1, keep_masked=True)
    with pytest.raises(VerificationError, match=r"1 of 2 sites have lost.*\(0\.conv1\.weight\)"):
        nmfx.verify(converted, example_input=example)


def test_an_example_that_does_not_fit_is_an_error_and_a_guess_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, example = build("residual")
    converted = nmfx.transform(model, "2:4", example_input=example)
    with pytest.raises(TraceError, match="the forward pass fails on an input of 2x7"):
        nmfx.verify(converted, example_input=torch.randn(2, 7))
    attention, example = build("attention")  # no picture model: 1x3x224x224 does not fit
    with caplog.at_level("WARNING", "nmfx"):
        checked = nmfx.verify(nmfx.transform(attention, "2:4", example_input=example))
    assert (checked.received, len(checked.unseen)) == (0, checked.sites)
    assert "what products receive was seen for 0 of them only" in caplog.text
    assert str(checked) in caplog.text


def test_modes_and_numbers_stay() -> None:
    model, example = build("lstm")
    converted = nmfx.transform(model, "2:4", example_input=example).train()
    before = torch.get_rng_state()
    nmfx.verify(converted, example_input=example)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in converted.modules())


def test_channels_last_and_shared_memory() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)), torch.randn(1, 8, 9, 9)
    converted = nmfx.transform(model.to(memory_format=torch.channels_last), "2:4", example_input=x)  # type: ignore[call-overload]
    assert nmfx.verify(converted, example_input=x).received == 2
    memory = torch.randn(128)
    pair = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
    for linear, part in zip(pair, memory.split(64), strict=True):
        linear.weight = nn.Parameter(part.view(8, 8))  # type: ignore[assignment]
    arrived = received(nn.Sequential(*pair), Example((torch.randn(2, 8),)))
    assert all(bool(arrived[id(linear.weight)].all()) for linear in pair)
