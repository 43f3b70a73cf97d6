"""What FSDP may share out by itself: the outermost entries of containers that are called once and share nothing."""

from __future__ import annotations

import pytest
import timm
import torch
from awkward import Mixed
from torch import nn

import nmfx
from nmfx.errors import NmfxError
from nmfx.masking.parallel import find_units, shard


def test_blocks_go_by_themselves() -> None:
    model = timm.create_model("resnet18").eval()
    names = {module: name for name, module in model.named_modules()}
    units = find_units(model, torch.zeros(1, 3, 64, 64))
    assert [names[unit] for unit in units] == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert not model.training


def test_what_others_use_stays_with_the_root() -> None:
    model = Mixed()
    assert find_units(model, torch.zeros(1, 3, 8, 8)) == [model.recurrent[0], model.own[0], model.own[2]]
    assert model.training


def test_a_scalar_cannot_be_shared_out() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(NmfxError, match="scale: a parameter without dimensions cannot be shared out; train with DDP"):
        shard(model, [])


def test_compile_does_not_go_with_it() -> None:
    with pytest.raises(NmfxError, match="compile without fsdp"):
        nmfx.Settings(parallel="fsdp", compile="eager")
