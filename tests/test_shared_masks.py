"""Masks that rows share, everywhere: transform, verify, schemes, checkpoints, search, training, correction, commands."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import searched
from sparsity.test_vector import Everything
from torch import Tensor, nn

import nmfx
from nmfx.errors import CheckpointError, NmfxError, SchemeError, SearchError, VerificationError
from nmfx.files.sealed import read_metadata, read_sealed, write_sealed
from nmfx.masking.sites import masked_sites
from nmfx.models.census import find_sites
from nmfx.passes.baking import bake
from nmfx.passes.correction import correct
from nmfx.scheme import Scheme
from nmfx.search.domino_loop import DominoSearch
from nmfx.search.finder import SearchResult, find_scheme
from nmfx.search.problem import make_problem
from nmfx.settings.choices import Choices
from nmfx.sparsity.mask import check_groups, make_mask
from nmfx.sparsity.packing import packed_sizes
from nmfx.sparsity.pattern import Pattern

EXAMPLE = torch.empty(1, 4, 2, 2)


def everything(vector: int = 4, n: int = 1, m: int = 2) -> tuple[nn.Module, nn.Module, Scheme]:
    """A dense model, its converted copy, and the scheme."""
    torch.manual_seed(0)
    dense = Everything().eval()
    sites = find_sites(dense, EXAMPLE)
    scheme = Scheme.uniform(sites, Pattern(n, m, vector))
    return dense, nmfx.transform(dense, scheme, sites=sites), scheme


def assert_shared(model: nn.Module) -> None:
    """Every masked weight holds at most N of M, at the same places in rows that share."""
    for site in masked_sites(model):
        assert site.spec.grouping.vector == site.spec.pattern.vector
        check_groups(site.name, site.value, site.spec.pattern.n, site.spec.grouping)
        assert int(site.mask.sum()) == site.spec.grouping.kept(site.spec.pattern.n)


@pytest.mark.parametrize("vector", [1, 2, 4, 8])
def test_transform_and_verify(vector: int) -> None:
    dense, model, scheme = everything(vector)
    assert len(scheme) == 9
    assert nmfx.verify(model, example_input=torch.randn(1, 4, 2, 2)).sites == 9
    assert_shared(model)
    assert set(nmfx.transform(dense, f"1:2x{vector}", example_input=EXAMPLE).state_dict()) == set(dense.state_dict())
    plain = bake(model)
    assert nmfx.verify(plain, scheme, example_input=EXAMPLE).groups == nmfx.verify(model, example_input=EXAMPLE).groups
    assert nmfx.verify(plain, Scheme.uniform(find_sites(dense, EXAMPLE), "1:2"), example_input=EXAMPLE).sites == 9
    alone = bake(everything(1)[1])
    if vector > 1:
        with pytest.raises(VerificationError, match=f"{vector} rows that share a mask"):
            nmfx.verify(alone, scheme, example_input=EXAMPLE)


def test_scheme_files(tmp_path: Path) -> None:
    dense, _, scheme = everything(4)
    sites = find_sites(dense, EXAMPLE)
    scheme.save(tmp_path / "s.yaml", sites)
    assert 'stem.weight: "1:2x4"' in (tmp_path / "s.yaml").read_text()
    assert dict(Scheme.load(tmp_path / "s.yaml", sites)) == dict(scheme)
    assert scheme.counts() == "1:2x4 x 9"
    net = nn.Sequential(nn.Linear(8, 8))
    sites = find_sites(net, torch.empty(1, 8))
    with pytest.raises(SchemeError, match=r"0\.weight: the published format has no masks that rows share \(2:4x4\); save as"):
        Scheme.uniform(sites, "2:4x4").to_published(sites)


@pytest.mark.parametrize("vector", [1, 4, 8])
def test_checkpoint_round_trip(vector: int, tmp_path: Path) -> None:
    dense, model, scheme = everything(vector)
    file = tmp_path / "m.safetensors"
    nmfx.save_checkpoint(model, file)
    assert json.loads(read_metadata(file)["nmfx"])["version"] == (1 if vector == 1 else 2)
    loaded = nmfx.load_checkpoint(file, copy.deepcopy(dense))
    others = {site.name: site for site in masked_sites(loaded)}
    for one in masked_sites(model):
        other = others.pop(one.name)
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.value, other.value)
        assert one.spec.pattern == other.spec.pattern
        assert one.spec.grouping.leaders == other.spec.grouping.leaders
    assert not others
    assert_shared(loaded)
    _, tensors = read_sealed(file, "a checkpoint", 2)
    sizes = {s.name: packed_sizes(1, s.spec.grouping)[1] for s in masked_sites(model)}
    assert {name: len(tensors[f"{name}:positions"]) for name in sizes} == sizes
    assert dict(nmfx.export.checkpoint.read_checkpoint(file)[0].scheme) == dict(scheme)


@pytest.mark.parametrize(
    "outputs", [None, [5, 36], [12, 1], [0, 36], [12, 0], "x"], ids=["none", "run", "step", "no run", "no step", "text"]
)
def test_a_header_that_lies_is_refused(outputs: Any, tmp_path: Path) -> None:
    dense, model, _ = everything(4)
    file = tmp_path / "m.safetensors"
    nmfx.save_checkpoint(model, file)
    content, tensors = read_sealed(file, "a checkpoint", 2)
    content["sites"]["stem.weight"]["outputs"] = outputs
    write_sealed(file, content, tensors)
    with pytest.raises(CheckpointError, match=r"stem\.weight"):
        nmfx.load_checkpoint(file, dense)


METHODS = ["uniform", "erk", "knapsack", "domino"]


def found(method: str, vector: int, **options: Any) -> tuple[nn.Module, SearchResult]:
    model, sites = searched("timm")
    return model, find_scheme(model, sites=sites, method=method, target=0.6, m=8, vector=vector, **options)


@pytest.mark.parametrize("vector", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_search(method: str, vector: int) -> None:
    model, result = found(method, vector)
    scheme, sites = result.scheme, result.sites
    assert {pattern.vector for pattern in scheme.values()} == {vector}
    assert result.totals.sparsity >= 0.6
    energy = dropped = 0.0
    for site in sites:
        weight = dict(model.named_parameters())[site.name].detach()
        if site.name not in result.dense_reasons:
            energy += float(weight.square().sum(dtype=torch.float64))
        if site.name in scheme:
            mask = make_mask(weight, scheme[site.name].n, scheme.grouping(site))
            dropped += float(weight[~mask].square().sum(dtype=torch.float64))
    assert result.loss == pytest.approx(dropped / energy, rel=1e-4)
    assert result.loss > found(method, 1)[1].optimum  # sharing costs
    assert_shared(nmfx.transform(model, scheme, sites=sites))


def test_bytes_count_positions_once() -> None:
    _, sites = searched("timm")
    costs = [make_problem(sites, target=0.5, budget="bytes", m=16, vector=v).costs for v in (1, 2, 8)]
    assert all(a >= b >= c for one in zip(*costs, strict=True) for a, b, c in zip(*one, strict=True))
    assert costs[0] != costs[1] != costs[2]


@pytest.mark.parametrize("sensitivity", ["activation", "corrected", "gradient", "measured"])
def test_sensitivities_see_the_shared_choice(sensitivity: str) -> None:
    model, sites = searched("digits")
    generator = torch.Generator().manual_seed(0)
    data = [(torch.rand(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)) for _ in range(8)]
    options: dict[str, Any] = {"sites": sites, "sensitivity": sensitivity, "data": data, "target": 0.6, "m": 8}
    one, four = (find_scheme(model, vector=vector, **options) for vector in (1, 4))
    assert {pattern.vector for pattern in four.scheme.values()} == {4}
    if sensitivity in ("activation", "corrected"):
        assert four.summed > one.summed
    assert_shared(nmfx.transform(model, four.scheme, sites=four.sites))


def test_choices() -> None:
    assert Choices(patterns=("2:4x4", "1:4x4")).shared == (4,)  # type: ignore[arg-type]
    assert Choices(patterns=("2:4x4", "1:4")).shared == (1, 4)  # type: ignore[arg-type]
    assert (Choices().shared, Choices(vector=8).shared, Choices(vector=[4, 1]).shared) == ((1,), (8,), (1, 4))  # type: ignore
    with pytest.raises(SearchError, match="patterns say how many rows share; leave vector out"):
        _ = Choices(patterns=("2:4x4", "1:4"), vector=4).shared  # type: ignore[arg-type]
    with pytest.raises(SearchError, match="vector = 3: expected how many adjacent outputs share a mask: one of 1, 2, 4, 8"):
        Choices(vector=3)
    model, sites = searched("timm")
    result = find_scheme(model, sites=sites, patterns=("2:4x4", "1:4x4"), target=0.5)
    assert set(result.scheme.values()) == {Pattern("2:4x4"), Pattern("1:4x4")}


@pytest.mark.parametrize("before", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_within_a_sparse_start(method: str, before: int) -> None:
    model, sites = searched("timm")
    start = Scheme.uniform(sites, Pattern(4, 8, before))
    result = find_scheme(model, sites=sites, within=start, method=method, target=0.7, m=8, vector=4)
    assert {p.vector for p in result.scheme.values()} <= {4, before}
    assert all(result.scheme[name].density <= pattern.density for name, pattern in start.items())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped, self.fc = nn.Conv2d(8, 10, 3), nn.Conv2d(10, 12, 1, groups=2), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.grouped(torch.relu(self.conv(x)))).mean((2, 3)))


def test_domino_in_the_loop() -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(16, 8, 6, 6)
    search = DominoSearch(
        model, 0.5, example_input=x, m=4, vector=4, remainder="short", vote_every=1, penalty_every=1, decay=1.0
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    while not search.done:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        search.step()
        optimizer.step()
        assert_shared(model)
        assert search.t < 2000
    scheme = search.scheme
    assert {p.vector for p in scheme.values()} == {4}
    assert scheme.totals(search.sites).sparsity >= 0.5
    start = Scheme.uniform(search.sites, "3:4", remainder="short")
    search.detach()
    with pytest.raises(SearchError, match="would lose weights at once"):
        DominoSearch(model, 0.7, example_input=x, m=4, vector=4, remainder="short", within=start)


@pytest.mark.parametrize("training", ["sr-ste", "ste", "fixed"])
def test_training_keeps_rows_together(training: str) -> None:
    torch.manual_seed(0)
    dense, x = Small(), torch.randn(16, 8, 6, 6)
    model = nmfx.transform(dense, {"*": "1:2x4"}, example_input=x, training=training)
    before = {site.name: site.mask.clone() for site in masked_sites(model)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        now = list(masked_sites(model))
        weights = {site.name: (site.parameter.detach().clone(), site.parameter.grad, site.mask.clone()) for site in now}
        optimizer.step()
        for site in masked_sites(model):  # SR-STE pulls what the shared mask drops
            weight, grad, mask = weights[site.name]
            pull = 2e-4 * weight * ~mask if training == "sr-ste" else 0.0
            assert torch.allclose(site.parameter, weight - 0.5 * (grad + pull), atol=1e-7)
        assert_shared(model)
    changed = any(not torch.equal(site.mask, before[site.name]) for site in masked_sites(model))
    assert changed == (training != "fixed")


@pytest.mark.parametrize("score", ["input-norm", "gradient"])
def test_scores(score: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, x = Small().eval(), torch.randn(16, 8, 6, 6)
    data = [(x, torch.randint(6, (16,)))]
    model = nmfx.transform(dense, {"*": "1:2x4"}, example_input=x, score=score, data=data)
    assert_shared(model)
    nmfx.save_checkpoint(model, tmp_path / "m.safetensors")
    assert_shared(nmfx.load_checkpoint(tmp_path / "m.safetensors", Small()))


def test_compiled_reads_are_the_same() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    model = nmfx.transform(Small().eval(), {"*": "1:2x4"}, example_input=x)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert torch.allclose(exported(x), model(x), atol=1e-6)


@pytest.mark.parametrize("method", ["admm", "sweep", "magnitude"])
@pytest.mark.parametrize("vector", [2, 4, 8])
def test_correction_chooses_shared_masks(method: str, vector: int) -> None:
    torch.manual_seed(0)
    dense, model, _ = everything(vector)
    batches = [torch.randn(8, 4, 2, 2) for _ in range(8)]

    def error(network: nn.Module) -> float:
        with torch.no_grad():
            return float(sum((network(x) - dense(x)).square().sum() for x in batches))

    before, masks = error(model), {site.name: site.mask.clone() for site in masked_sites(model)}
    records = correct(model, batches, dense=dense, method=method)
    assert any(one.chosen.startswith("corrected") for one in records), [str(one) for one in records]
    assert_shared(model)
    assert nmfx.verify(model, example_input=batches[0]).sites == 9
    assert all(one.after <= one.before for one in records if one.chosen.startswith("corrected"))
    if vector < 8:  # of 8 rows of random numbers next to nothing is right
        assert error(model) < 0.9 * before
    if method != "magnitude":
        assert any(not torch.equal(site.mask, masks[site.name]) for site in masked_sites(model))


class Projections(nn.Module):
    """Three projections in one weight whose name does not say so: vectors of 4 rows cross from one to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = nn.Parameter(torch.randn(15, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (nn.functional.linear(x, part) for part in self.joined.chunk(3))
        return torch.relu(q + k) * v


@pytest.mark.parametrize("method", ["admm", "sweep"])
def test_masks_stay_where_rows_share_with_another_product(method: str) -> None:
    torch.manual_seed(0)
    dense, mixed = Projections().eval(), torch.randn(8, 8)
    batches = [torch.randn(32, 8) @ mixed for _ in range(8)]
    model = nmfx.transform(dense, {"*": "2:4x4"}, example_input=batches[0])
    (site,) = masked_sites(model)
    assert site.spec.grouping.run == (15, 8)
    mask = site.mask.clone()
    records = correct(model, batches, dense=dense, method=method)
    assert records[0].chosen.startswith("corrected"), str(records[0])
    assert torch.equal(site.mask, mask)
    assert_shared(model)


@torch.no_grad()
def test_what_a_sweep_chooses_is_what_is_shared() -> None:
    """Masks chosen span by span are shared by the rows of the whole weight, whatever its outputs lie like."""
    from nmfx.masking.weight import MaskSpec
    from nmfx.passes.fitting import solve
    from nmfx.passes.gathering import products_of
    from nmfx.passes.network import Network
    from nmfx.sparsity.correction import Quadratic, Scaled

    dense, model, _ = everything(4)
    specs: dict[str, MaskSpec] = {site.name: site.spec for site in masked_sites(model)}
    network, seen = Network(dense, {}), set()
    for name, product, moments in products_of(network, [torch.randn(8, 4, 2, 2) for _ in range(8)]):
        values = product.matrix(product.weight).float()
        problem = Quadratic.of(Scaled(moments), values, 0.01)
        for method in ("sweep", "admm"):
            result = solve(method, problem, values, product, network.weights[name], specs[name])
            product.weight.copy_(product.tensor(result))
            if product.weight.numel() == network.weights[name].numel():
                seen.add(name)
                check_groups(name, network.weights[name], 1, specs[name].grouping)
    assert seen >= {"stem.weight", "grouped.weight", "up.weight", "up_grouped.weight", "qkv.weight", "mix"}


def test_what_is_asked_of_nothing_says_so() -> None:
    with pytest.raises(NmfxError, match="one of 1, 2, 4, 8"):
        nmfx.transform(Small(), "2:4x3", example_input=torch.empty(1, 8, 6, 6))
