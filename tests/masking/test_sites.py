"""Masked sites of a model, and the one way to change what is asked of them."""

from __future__ import annotations

import torch
from torch import nn

from nmfx.masking.owner import mask_attribute
from nmfx.masking.sites import freeze, masked_sites, respec
from nmfx.masking.weight import MaskSpec, mask_name
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask
from nmfx.sparsity.pattern import Pattern

SPEC = MaskSpec("0.weight", Pattern("2:4"), Grouping((8, 16, 1), 4), decay=0.0)


def tied() -> nn.Sequential:
    """Two linears over one masked weight."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(16, 8))
    model[1].weight = model[0].weight
    mask_attribute(model[0], "weight", SPEC)
    mask_attribute(model[1], "weight", SPEC, (model[0], "weight"))
    return model


def test_another_pattern_is_read_at_once_by_every_owner() -> None:
    model = tied()
    respec(masked_sites(model), pattern=Pattern("1:4"))
    for site in masked_sites(model):
        assert site.spec.pattern == Pattern("1:4")
        assert torch.equal(site.mask, make_mask(site.parameter, 1, SPEC.grouping))
        assert torch.equal(site.value != 0, site.mask)


def test_another_rule_counts_at_the_next_read() -> None:
    model = tied()
    for decay, dropped_train in ((0.0, True), (None, False), (0.0, True)):
        respec(masked_sites(model), keep_masks=True, decay=decay)
        model.zero_grad()
        model[0].weight.sum().backward()
        site = next(masked_sites(model))
        assert site.parameter.grad is not None
        assert bool(site.parameter.grad[~site.mask].any()) == dropped_train


def test_masks_are_kept_until_the_weight_changes() -> None:
    model = tied()
    freeze(model)
    with torch.no_grad():
        next(masked_sites(model)).parameter.normal_()
    held = next(masked_sites(model)).value.clone() != 0
    respec(masked_sites(model), keep_masks=True, frozen=False)
    assert torch.equal(next(masked_sites(model)).mask, held)
    respec(masked_sites(model), frozen=False)
    assert torch.equal(next(masked_sites(model)).mask, make_mask(next(masked_sites(model)).parameter, 2, SPEC.grouping))


def test_freezing_holds_one_mask_for_all_owners_of_a_weight() -> None:
    model = tied()
    model[0].weight.sum().backward()
    weight = next(masked_sites(model)).parameter
    weight.data.copy_(torch.randn(8, 16))  # without a trace, as fused optimisers write
    freeze(model)
    expected = make_mask(weight, 2, SPEC.grouping)
    for module in model:
        assert torch.equal(module.weight != 0, expected)
        assert torch.equal(module.get_buffer(mask_name("weight")), expected)
