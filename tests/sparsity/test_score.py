"""Laws of scores: what they rank by, in masks, training, searches and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmfx
from nmfx.errors import NmfxError
from nmfx.masking.sites import masked_sites
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.mask import make_mask, top_mask, update_mask
from nmfx.sparsity.score import SCORES

X, LABELS = torch.randn(64, 16) * torch.linspace(0.1, 3, 16), torch.arange(64) % 4


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def batches() -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(16), LABELS.split(16), strict=True))


def transformed(model: nn.Module, score: str, **options: Any) -> nn.Module:
    return nmfx.transform(model, "2:8", example_input=X, score=score, data=batches(), **options)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "grouping", [Grouping((6, 16, 9), 8), Grouping((6, 16, 9), 5), Grouping((6, 16, 9), 32, flat=True)], ids=str
)
def test_the_fast_mask_is_the_plain_one(score: str, grouping: Grouping) -> None:
    weight = torch.randn(6, 16, 3, 3)
    evidence = None if SCORES[score].needs == "nothing" else torch.rand(1, 16, 1) + 0.1
    mask, masked = torch.empty_like(weight, dtype=torch.bool), torch.empty_like(weight)
    update_mask(weight, 2, grouping, mask, masked, score, evidence)
    assert torch.equal(mask, make_mask(weight, 2, grouping, score, evidence))
    assert torch.equal(masked, torch.where(mask, weight, 0.0))


def test_input_norm_is_wanda() -> None:
    model = network()
    found = next(iter(masked_sites(transformed(model, "input-norm"))))
    score = model[0].weight.detach().abs() * X.norm(dim=0)
    assert torch.equal(found.mask, top_mask(score.view(32, 2, 8), 2, 2).view(32, 16))


def test_gradient_is_the_diagonal_fisher() -> None:
    model = network()
    found = next(iter(masked_sites(transformed(model, "gradient"))))
    squares = torch.zeros(32, 16)
    for x, label in batches():
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), label), [model[0].weight])
        squares += gradient.square() / 4
    score = model[0].weight.detach().square() * squares
    assert torch.equal(found.mask, top_mask(score.view(32, 2, 8), 2, 2).view(32, 16))


@pytest.mark.parametrize("score", ["input-norm", "gradient"])
def test_masks_follow_the_weights_by_their_score(score: str) -> None:
    model = transformed(network(), score)
    keys = list(model.state_dict())
    assert keys == list(network().state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [site.mask.clone() for site in masked_sites(model)]
    for x, label in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    changed = False
    for site, mask in zip(masked_sites(model), before, strict=True):
        spec = site.spec
        expected = make_mask(site.parameter.detach(), spec.pattern.n, spec.grouping, score, site.evidence)
        assert torch.equal(site.mask, expected)
        changed |= not torch.equal(mask, expected)
    assert changed


@pytest.mark.parametrize("score", SCORES)
def test_a_checkpoint_keeps_the_score(score: str, tmp_path: Path) -> None:
    model = transformed(network(), score)
    nmfx.save_checkpoint(model, tmp_path / "a.safetensors")
    loaded = nmfx.load_checkpoint(tmp_path / "a.safetensors", network())
    for one, other in zip(masked_sites(model), masked_sites(loaded), strict=True):
        assert other.spec == one.spec
        assert torch.equal(other.mask, one.mask)
        assert (one.evidence is None) == (score == "magnitude")
        assert one.evidence is None or torch.equal(one.evidence, other.evidence)
    assert torch.equal(loaded(X), model.eval()(X))


def test_magnitude_goes_without_saying(tmp_path: Path) -> None:
    """A file says what it said before there were other scores."""
    nmfx.save_checkpoint(transformed(network(), "magnitude"), tmp_path / "a.safetensors")
    assert b"score" not in (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("score", SCORES)
def test_a_search_loses_what_the_masks_of_its_score_drop(score: str) -> None:
    model = network()
    result = nmfx.find_scheme(model, example_input=X, target=0.5, m=8, score=score, sensitivity="weight", data=batches())
    masked = nmfx.transform(model, result.scheme, example_input=X, score=score, data=batches())
    kept = sum(float(site.value.detach().square().sum()) for site in masked_sites(masked))
    every = sum(float(model[i].weight.detach().square().sum()) for i in (0, 2))
    dense = sum(float(model[i].weight.detach().square().sum()) for i in (0, 2) if f"{i}.weight" not in result.scheme)
    assert result.loss == pytest.approx(1 - (kept + dense) / every, rel=1e-4)
    assert result.scheme.info.get("score", "magnitude") == score


def test_what_cannot_be_asked_says_why() -> None:
    with pytest.raises(NmfxError, match="unknown score 'gradeint' \\(did you mean 'gradient'"):
        transformed(network(), "gradeint")
    with pytest.raises(NmfxError, match="score 'input-norm' looks at pictures: give data="):
        nmfx.transform(network(), "2:8", example_input=X, score="input-norm")
    with pytest.raises(NmfxError, match="score 'gradient' needs labels"):
        nmfx.transform(network(), "2:8", example_input=X, score="gradient", data=[X])
