"""EfficientNet-Lite0, ImageNet weights, 20 labelled pictures: what one-shot N:M costs, and what calibration gives back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import SIDE, calibration, labelled, lite0
from torch import nn

from nmfx.export.checkpoint import load_checkpoint, save_checkpoint
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.models.site import Sites
from nmfx.passes.baking import bake
from nmfx.passes.statistics import recalibrate_bn
from nmfx.passes.transform import conversion_difference, transform
from nmfx.passes.verification import verify
from nmfx.scheme import Scheme
from nmfx.search.finder import SearchResult, find_scheme
from nmfx.settings.methods import METHODS
from nmfx.training.evaluation import evaluate

DENSITY = 0.5


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    with torch.no_grad():
        return lite0()


@pytest.fixture(scope="module")
def sites(dense: nn.Module) -> Sites:
    return find_sites(dense, torch.empty(1, 3, SIDE, SIDE))


@pytest.fixture(scope="module")
def found(dense: nn.Module, sites: Sites) -> dict[str, SearchResult]:
    methods = [method for method in METHODS if method != "spdy"]  # which looks at pictures
    return {method: find_scheme(dense, target=1 - DENSITY, method=method, sites=sites) for method in methods}


def top1(model: nn.Module) -> float:
    return evaluate(model, [labelled()]).top1


def calibrated(model: nn.Module, batches: int) -> float:
    assert recalibrate_bn(model, calibration()[:batches]) == batches
    return top1(model)


def test_rows_that_share_lose_more_and_are_stored_in_less(dense: nn.Module, sites: Sites, tmp_path: Path) -> None:
    losses, sizes = [], []
    for vector in (1, 2, 4, 8):
        result = find_scheme(dense, target=1 - DENSITY, sites=sites, vector=vector)
        model = transform(dense, result.scheme, sites=sites)
        save_checkpoint(model, tmp_path / f"{vector}.safetensors")
        losses.append(result.loss)
        sizes.append((tmp_path / f"{vector}.safetensors").stat().st_size)
        assert {pattern.vector for pattern in result.scheme.values()} == {vector}
        assert result.totals.sparsity >= 1 - DENSITY
    assert losses == sorted(losses)
    assert losses[3] > 1.5 * losses[0]
    assert sizes == sorted(sizes, reverse=True)
    assert verify(model).sites == len(result.scheme)
    assert verify(load_checkpoint(tmp_path / "4.safetensors", lite0())).sites > 0


def test_the_dense_network_knows_the_pictures(dense: nn.Module) -> None:
    found = evaluate(dense, [labelled()])
    assert found.top1 >= 0.85
    assert found.top5 >= 0.95
    assert found.samples == 20


def test_the_conversion_is_exact(dense: nn.Module, sites: Sites) -> None:
    assert conversion_difference(dense, sites, Example((labelled()[0][:4],))) == 0


def test_one_shot_collapses_and_calibration_brings_it_back(dense: nn.Module, sites: Sites) -> None:
    model = transform(dense, "2:4", sites=sites)
    assert top1(model) <= 0.10
    assert calibrated(model, 8) >= 0.30
    assert verify(model).sites == len(Scheme.uniform(sites, "2:4"))


def test_the_searches_keep_to_the_budget(found: dict[str, SearchResult], sites: Sites) -> None:
    for result in found.values():
        assert result.totals.kept <= DENSITY * sites.weights
        assert found["knapsack"].loss <= result.loss


def test_the_exact_choice_is_worth_its_name(dense: nn.Module, sites: Sites, found: dict[str, SearchResult]) -> None:
    scores = {m: calibrated(transform(dense, found[m].scheme, sites=sites), 4) for m in ("knapsack", "domino")}
    assert scores["knapsack"] >= scores["domino"] - 0.10
    assert scores["knapsack"] >= 0.40


def test_a_checkpoint_gives_the_same_logits(
    dense: nn.Module, sites: Sites, found: dict[str, SearchResult], tmp_path: Path
) -> None:
    model = transform(dense, found["knapsack"].scheme, sites=sites).eval()
    recalibrate_bn(model, calibration()[:2])
    header = save_checkpoint(model, tmp_path / "lite0.safetensors")
    assert str(header.source) == "timm:tf_efficientnet_lite0"
    with torch.no_grad():
        expected = model(labelled()[0])
        for loaded in (
            load_checkpoint(tmp_path / "lite0.safetensors"),
            load_checkpoint(tmp_path / "lite0.safetensors", lite0()),
        ):
            assert torch.equal(loaded(labelled()[0]), expected)
        assert torch.equal(bake(model)(labelled()[0]), expected)
    assert (tmp_path / "lite0.safetensors").stat().st_size < 0.65 * 4 * sum(p.numel() for p in dense.parameters())
