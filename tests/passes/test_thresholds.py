"""Laws of the score buffers: the thresholds of domino.md section 3, there for the time of a search, and then gone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from awkward import MODELS, build, models, run, same, snapshot
from torch import Tensor, nn

from nmfx.errors import NmfxError
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.passes.thresholds import (
    attach_thresholds,
    detach_thresholds,
    sorted_magnitudes,
    thresholds_attached,
    thresholds_of,
    weight_of,
)
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme
from nmfx.search.finder import find_scheme
from nmfx.sparsity.layout import Grouping

CONVERTIBLE = [name for name in MODELS if name != "scripted"]


def groups_by_hand(weight: Tensor, rows: tuple[int, int, int], m: int) -> list[list[float]]:
    """Magnitudes of every group in descending order; short groups are filled up with zeros."""
    lines = weight.detach().double().abs().view(rows)
    outer, length, inner = rows
    cuts = [(o, start, k) for o in range(outer) for k in range(inner) for start in range(0, length, m)]
    groups = [sorted(lines[o, start : start + m, k].tolist(), reverse=True) for o, start, k in cuts]
    return [group + [0.0] * (m - len(group)) for group in groups]


def lower_half(group: list[float]) -> float:
    """The mean of the smaller half of a group in descending order."""
    count = max(1, len(group) // 2)
    return math.fsum(group[-count:]) / count


def groupings(sites: Sites, m: int) -> dict[str, Grouping]:
    return {site.name: Grouping(site.rows, m) for site in sites}


@pytest.mark.parametrize("m", [2, 4, 5, 16])
@pytest.mark.parametrize("name", ["residual", "attention", "transposed", "half"])
def test_thresholds_and_counts_are_their_definition(name: str, m: int) -> None:
    model, example = build(name)
    sites = find_sites(model, example)
    with thresholds_attached(model, sites, groupings(sites, m)):
        for site in sites:
            threshold, count = thresholds_of(model, site)
            expected = groups_by_hand(weight_of(model, site), site.rows, m)
            means = [lower_half(group) or lower_half([value for value in group if value]) for group in expected]
            torch.testing.assert_close(threshold.double().sort()[0], torch.tensor(means, dtype=torch.float64).sort()[0])
            above = [sum(value > mean * (1 + 1e-6) for value in group) for group, mean in zip(expected, means, strict=True)]
            assert sorted(count.tolist()) == sorted(above)
            assert threshold.shape == count.shape == (len(expected),)
            assert (threshold.requires_grad, count.dtype) == (False, torch.uint8)


@pytest.mark.parametrize("flat", [False, True], ids=["strict", "flat"])
def test_sorted_magnitudes_hold_every_weight_once(flat: bool) -> None:
    weight = torch.randn(16, 3, 3, 3)
    ordered = sorted_magnitudes(weight, Grouping((16, 3, 9), 4, flat))
    assert ordered.shape == (4, 108 if flat else 144)
    assert torch.equal(ordered, ordered.sort(dim=0, descending=True)[0])
    assert torch.equal(ordered[ordered > 0].sort()[0], weight.abs().flatten().sort()[0])


@models(CONVERTIBLE)
def test_no_trace_is_left(name: str) -> None:
    model, example = build(name)
    sites = find_sites(model, example)
    expected = run(copy.deepcopy(model), example)
    keys, buffers, before = list(model.state_dict()), len(list(model.buffers())), snapshot(model)
    with thresholds_attached(model, sites, groupings(sites, 4)):
        assert list(model.state_dict()) == keys
        assert len(list(model.buffers())) == buffers + 2 * len(sites)
        scored_copy = copy.deepcopy(model)
    assert snapshot(model) == before
    assert same(run(scored_copy, example), expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit], ids=lambda error: error.__name__)
def test_no_trace_is_left_when_the_body_raises(error: type[BaseException]) -> None:
    model, example = build("residual")
    sites, before = find_sites(model, example), snapshot(model)
    with pytest.raises(error), thresholds_attached(model, sites, groupings(sites, 4)):
        raise error
    assert snapshot(model) == before


class Taken(nn.Module):
    """Its second linear has a buffer of its own under a name that the scores want."""

    def __init__(self, suffix: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.register_buffer(f"weight{suffix}", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("suffix", ["_threshold", "_count"])
def test_a_name_that_is_taken_is_refused_and_left_alone(suffix: str) -> None:
    model = Taken(suffix)
    sites, before = find_sites(model, torch.empty(1, 8)), snapshot(model)
    with (
        pytest.raises(NmfxError, match=rf"second\.weight: the module already has an attribute 'weight{suffix}'"),
        thresholds_attached(model, sites, groupings(sites, 4)),
    ):
        pass
    assert snapshot(model) == before
    with pytest.raises(NmfxError, match="already has an attribute"):
        find_scheme(model, method="domino", target=0.5, m=4, sites=sites)
    assert snapshot(model) == before


def test_scores_of_a_converted_model_are_those_of_its_dense_weights() -> None:
    model, example = build("residual")
    sites = find_sites(model, example)
    masked = transform(model, Scheme.uniform(sites, "1:4", remainder="short"), sites=sites)
    run(masked, example)
    for name in (site.name for site in sites):
        results: list[Any] = []
        for each in (model, masked):
            with thresholds_attached(each, sites, groupings(sites, 4)):
                results.append(thresholds_of(each, sites[name]))
        assert same(*results)


def test_scores_move_with_the_model_and_are_detached_by_hand() -> None:
    model, example = build("residual")
    sites, before = find_sites(model, example), snapshot(model)
    attach_thresholds(model, sites, groupings(sites, 4))
    threshold, _ = thresholds_of(model, sites["fc.weight"])
    assert dict(model.named_buffers())["fc.weight_threshold"] is threshold
    assert "fc.weight_threshold" not in model.state_dict()
    with pytest.raises(NmfxError, match="already has an attribute"):
        attach_thresholds(model, sites, groupings(sites, 4))
    detach_thresholds(model, sites)
    detach_thresholds(model, sites)  # once more is no error
    assert snapshot(model) == before
