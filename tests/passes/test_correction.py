"""correct: closer to the dense network, exactly N in a group, and what cannot be corrected is said."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

import nmfx
from nmfx.demo.resnet import CifarResNet
from nmfx.errors import NmfxError
from nmfx.masking.sites import masked_sites
from nmfx.models.census import find_sites
from nmfx.passes import layerwise, resuming
from nmfx.passes.correction import correct
from nmfx.passes.fitting import solve
from nmfx.passes.gathering import products_of
from nmfx.passes.lockstep import Run
from nmfx.passes.network import Network
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme
from nmfx.sparsity.correction import Quadratic, Scaled
from nmfx.sparsity.mask import check_groups


class Kinds(nn.Module):
    """A convolution of every kind, a projection, an attention, and a weight that a matmul reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.grouped, self.up = nn.Conv2d(16, 16, 3, 1, 1, groups=2), nn.ConvTranspose2d(16, 16, 2, 2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.line, self.matrix = nn.Conv1d(16, 16, 3, padding=1), nn.Parameter(torch.randn(16, 16) / 4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.grouped(F.relu(self.norm(self.stem(x)))))).flatten(2).mT  # batch positions 16
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((self.line(x.mT).mT @ self.matrix).relu().mean(1))


def standardised() -> nn.Module:
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), StdConv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4))


def small_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=48, num_classes=4)


MODELS = {
    "kinds": (Kinds, (3, 16, 16)),
    "residuals": (lambda: CifarResNet(1), (3, 32, 32)),
    "timm vit": (small_vit, (3, 64, 64)),
    "standardised weights": (standardised, (3, 16, 16)),
}


def pictures(size: tuple[int, ...], count: int = 64) -> list[Tensor]:
    """Smooth ones: correlated as real ones are."""
    x = torch.randn(count, size[0], 5, 5, generator=torch.Generator().manual_seed(3))
    return list(F.interpolate(x, size[1:], mode="bilinear").split(8))


def converted(name: str, pattern: str = "2:8") -> tuple[nn.Module, nn.Module, list[Tensor], nmfx.Sites]:
    torch.manual_seed(0)
    make, size = MODELS[name]
    model, batches = make().eval(), pictures(size)
    nmfx.recalibrate_bn(model, batches)
    sites = nmfx.find_sites(model, batches[0][:1])
    scheme = {site.name: pattern for site in sites if site.length % 8 == 0}
    return model, nmfx.transform(model, scheme, sites=sites), batches, sites


def distance(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - dense(x)).square().sum()) for x in batches)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["admm", "sweep"])
def test_outputs_come_back_to_the_dense_network(name: str, method: str) -> None:
    model, masked, batches, _ = converted(name)
    before = distance(masked, model, batches)
    records = correct(masked, batches, method=method)
    named = [one.name for one in records]
    assert set(nmfx.scheme_of(masked)) <= set(named)
    assert distance(masked, model, batches) < before * 0.7
    plain = nmfx.bake(masked)
    for site in masked_sites(masked):
        if not site.spec.derived:
            assert torch.equal(plain.get_parameter(site.spec.name), site.value)
            assert torch.equal(site.parameter, site.value)  # what is dropped is zero


def test_the_same_twice_and_the_mode_is_kept() -> None:
    _, masked, batches, _ = converted("kinds")
    other = copy.deepcopy(masked).train()
    first, second = correct(masked, batches), correct(other, iter([(x, torch.zeros(len(x))) for x in batches]))
    assert [str(one) for one in first] == [str(one) for one in second]
    assert other.training
    for one, two in zip(masked.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_a_network_that_is_sparse_already_does_not_change() -> None:
    _, masked, batches, sites = converted("residuals")
    plain = nmfx.bake(masked)
    again = nmfx.transform(plain, nmfx.scheme_of(masked), sites=sites)
    correct(again, batches)
    for key, value in nmfx.bake(again).state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-3, atol=1e-3 * float(value.abs().max()))


def test_fixed_masks_are_those_that_were_chosen() -> None:
    model, _, batches, sites = converted("kinds")
    fixed = nmfx.transform(model, {"stem.weight": "1:3", "head.weight": "2:8"}, sites=sites, training="fixed")
    correct(fixed, batches)
    for site in masked_sites(fixed):
        assert site.spec.frozen
        assert not site.parameter[~site.mask].any()


def test_bad_input_leaves_the_model_as_it_was() -> None:
    model, masked, batches, _ = converted("kinds")
    before = copy.deepcopy(masked.state_dict())
    for wrong, message in (
        ({"method": "adm"}, "did you mean 'admm'"),
        ({"batches": []}, "no batches"),
        ({"batches": None}, "expected batches"),
        ({"batches": ["abc"]}, "expected batches of tensors"),
        ({"batches": torch.zeros(8, 3, 16, 16)}, "expected batches, as a list"),
        ({"dense": nn.Conv2d(3, 4, 3)}, "give the dense version"),
        ({"memory": 0}, "expected bytes"),
        ({"memory": math.nan}, "expected bytes"),
        ({"memory": "4"}, "expected bytes"),
    ):
        given = {"batches": batches} | wrong
        with pytest.raises(NmfxError, match=message):
            correct(masked, **given)
    with pytest.raises(NmfxError, match="transform it first"):
        correct(model, batches)
    with pytest.raises(Exception, match="expected input"):
        correct(masked, [torch.randn(2, 4, 16, 16)])
    assert all(torch.equal(value, before[key]) for key, value in masked.state_dict().items())


def test_pictures_that_take_another_way_are_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if bool(x.sum() > 0) else self.b(x)

    masked = nmfx.transform(Branching(), "2:4", example_input=torch.ones(1, 8))
    with pytest.raises(NmfxError, match="take different ways"):
        correct(masked, [torch.ones(4, 8), -torch.ones(4, 8)])


class Tied(nn.Module):
    """A table that is the weight of a product as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.line, self.out = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.line(self.table(x)).relu())


def test_a_table_that_is_a_weight_as_well_stays() -> None:
    torch.manual_seed(0)
    model, batches = Tied().eval(), [torch.randint(0, 20, (16, 5)) for _ in range(8)]
    masked = nmfx.transform(model, "2:4", example_input=batches[0])
    before = distance(masked, model, batches)
    records = {one.name: one.chosen for one in correct(masked, batches)}
    assert records["table.weight"] == "plain: it is a table as well, read by index"
    assert records["line.weight"].startswith("corrected")
    assert distance(masked, model, batches) < before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pictures_that_are_not_finite_are_refused(value: float) -> None:
    _, masked, batches, _ = converted("residuals")
    before = copy.deepcopy(masked.state_dict())
    batches[-1][0, 0, 0, 0] = value
    with pytest.raises(NmfxError, match="infinite or NaN"):
        correct(masked, batches)
    assert all(torch.equal(one, before[key]) for key, one in masked.state_dict().items())


def test_one_batch_is_cut_and_one_picture_corrects_nothing() -> None:
    model, masked, batches, _ = converted("kinds")
    before = distance(masked, model, batches)
    correct(masked, [torch.cat(batches), torch.empty(0, 3, 16, 16)])
    assert distance(masked, model, batches) < 0.7 * before
    _, again, _, _ = converted("kinds")
    assert {one.chosen for one in correct(again, [batches[0][:1]])} == {"plain: no pictures can be held back; give more"}


@pytest.mark.parametrize("scale", [0.0, 1e-20])
def test_pictures_that_say_nothing_leave_batch_norms_in_reach(scale: float) -> None:
    model, masked, batches, _ = converted("residuals")
    before = distance(masked, model, batches)
    correct(masked, [scale * x for x in batches])
    assert distance(masked, model, batches) < 4 * before


def test_settings_of_the_process_change_nothing() -> None:
    _, first, batches, _ = converted("kinds")
    _, second, _, _ = converted("kinds")
    correct(first, batches)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            correct(second, batches)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_named_arguments_and_buffers_of_the_model() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, *, x: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return self.line(x) + y

    model, batches = Counting(), [{"x": torch.randn(16, 8), "y": torch.randn(16, 8)} for _ in range(8)]
    masked = nmfx.transform(model, "2:4", example_input=batches[0])
    (record,) = correct(masked, batches)
    assert record.chosen.startswith("corrected")
    assert record.after < record.before
    assert float(masked.calls) == 0


def test_what_stays_plain_keeps_the_mask_of_its_score() -> None:
    model, _, batches, sites = converted("standardised weights")
    data = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in batches]
    masked = nmfx.transform(model, {"6.weight": "2:8"}, sites=sites, score="input-norm", data=data)
    with torch.no_grad():
        before = masked(batches[0])
        correct(masked, [batches[0][:1]])  # too few to correct anything
        assert torch.equal(masked(batches[0]), before)


def test_batches_that_do_not_fit_in_memory_join_later() -> None:
    model, masked, batches, sites = converted("residuals")
    before, many = distance(masked, model, batches), pictures((3, 32, 32), 128)
    few = nmfx.transform(model, nmfx.scheme_of(masked), sites=sites)
    correct(few, many, memory=1.0)
    correct(masked, many)
    assert distance(few, model, batches) < before * 0.7
    assert any(not torch.equal(a, b) for a, b in zip(few.state_dict().values(), masked.state_dict().values(), strict=True))


class Stopping:
    """Told of each weight that is done; stops the process after so many."""

    def __init__(self, most: float = math.inf) -> None:
        self.most, self.told = most, 0

    def __call__(self, share: float, line: str = "") -> None:
        self.told += 1
        if self.told > self.most:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "memory"), [("kinds", 1.5e9), ("residuals", 1.0)])
def test_a_correction_that_is_stopped_goes_on_to_the_same_result(
    name: str, memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "SHARE", 0)  # written after every weight
    _, masked, _, sites = converted(name)
    batches, others = pictures(MODELS[name][1], 96), []
    for _ in range(2):
        others.append(nmfx.transform(masked, nmfx.scheme_of(masked), sites=sites))
    whole, path = Stopping(), tmp_path / "state.safetensors"
    records = correct(masked, batches, memory=memory, progress=whole)
    start = copy.deepcopy(others[0].state_dict())
    for most in (1, 3, 2):  # stopped three times
        with pytest.raises(KeyboardInterrupt):
            correct(others[0], batches, memory=memory, checkpoint=path, progress=Stopping(most))
    assert all(torch.equal(value, start[key]) for key, value in others[0].state_dict().items())
    rest = Stopping()
    again = correct(others[0], batches, memory=memory, checkpoint=path, progress=rest)
    assert rest.told == whole.told - 6
    assert [str(one) for one in again] == [str(one) for one in records]
    for one, two in zip(masked.state_dict().values(), others[0].state_dict().values(), strict=True):
        assert torch.equal(one, two)
    correct(others[1], batches, memory=memory, checkpoint=path, progress=Stopping(0))  # nothing is left to do
    for one, two in zip(masked.state_dict().values(), others[1].state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_only_the_same_correction_goes_on(tmp_path: Path) -> None:
    _, masked, batches, sites = converted("kinds")
    before, path = copy.deepcopy(masked.state_dict()), tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        correct(masked, batches, checkpoint=path, progress=Stopping(2))
    other = nmfx.transform(masked, {"grouped.weight": "4:8"}, sites=sites)
    for network, given, message in (
        (masked, {"seed": 1}, "settings .seed 0 -> 1"),
        (masked, {"method": "sweep"}, "settings .method admm -> sweep"),
        (masked, {"batches": [x + 1 for x in batches]}, "settings .pictures .* -> "),
        (masked, {"dense": nmfx.bake(masked)}, "settings .dense weights .* -> "),
        (other, {}, "settings .scheme .* -> "),
    ):
        with pytest.raises(NmfxError, match=message):
            correct(network, **({"batches": batches, "checkpoint": path} | given))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(NmfxError, match="not a correction to resume"):
        correct(masked, batches, checkpoint=path)
    assert all(torch.equal(value, before[key]) for key, value in masked.state_dict().items())


class Shortcut(nn.Module):
    """A shortcut that masking spoils, and a product after it, with a bias or a batch norm, that can make up for it."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.norm(self.second(x))


@pytest.mark.parametrize("norm", [False, True])
def test_a_product_makes_up_for_what_its_shortcut_lost(norm: bool) -> None:
    torch.manual_seed(0)
    model = Shortcut(norm).eval()
    batches = pictures((8, 8, 8))
    nmfx.recalibrate_bn(model, batches)
    masked = nmfx.transform(model, {"first.weight": "1:8"}, sites=nmfx.find_sites(model, batches[0]))
    correct(masked, batches)
    # first gives 16 multiples of 8 inputs, so no more can be had of x than it says; second sees it all, and is dense
    with torch.no_grad():
        x = torch.cat([masked.first(batch) for batch in batches]).movedim(1, -1).reshape(-1, 16)
        y = torch.cat([model(batch) for batch in batches]).movedim(1, -1).reshape(-1, 16)
        found = torch.cat([masked(batch) for batch in batches]).movedim(1, -1).reshape(-1, 16)
    one = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    best = one @ torch.linalg.lstsq(one, y.double()).solution
    assert float((found - y).square().mean()) < 1.1 * float((best - y).square().mean()) + 1e-3 * float(y.var())


def test_nothing_is_kept_of_shortcuts_that_batches_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, masked, _, _ = converted("residuals")
    left: list[int] = []

    def cancel(run: Run) -> None:
        left.append(len(run.kept))
        original(run)

    original = Run.cancel
    monkeypatch.setattr(Run, "cancel", cancel)
    correct(masked, pictures((3, 32, 32), 128), memory=1.0)
    assert left
    assert not any(left)


def test_recurrent_layers_keep_their_weights_or_come_nearer() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    model, batches = Recurrent(), list(torch.randn(128, 6, 32).split(16))
    sites = nmfx.find_sites(model, batches[0])
    masked = nmfx.transform(model, "2:4", sites=sites)
    before = distance(masked, model, batches)
    correct(masked, batches)
    assert distance(masked, model, batches) < before


def test_biases_take_up_means() -> None:
    model, masked, batches, _ = converted("kinds")
    correct(masked, batches)
    with torch.no_grad():
        answers, wanted = (torch.cat([net(x) for x in batches]).mean(0) for net in (masked, model))
    torch.testing.assert_close(answers, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))


def wide() -> nn.Module:
    """A first linear as VGG's: more columns than second moments are kept for at once."""
    return nn.Sequential(nn.Conv2d(3, 36, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36 * 16 * 16, 8))


@pytest.mark.parametrize("pattern", ["2:8", "1:4x4"])
def test_a_weight_of_many_columns_is_corrected_in_blocks(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "BLOCK", 512)  # for speed
    torch.manual_seed(0)
    model, batches = wide().eval(), pictures((3, 16, 16), 128)
    masked = nmfx.transform(model, {"3.weight": pattern}, sites=nmfx.find_sites(model, batches[0]))
    before, other = distance(masked, model, batches), pictures((3, 16, 16), 160)[16:]
    before_other = distance(masked, model, other)
    records = {one.name: one for one in correct(masked, batches)}
    assert records["3.weight"].chosen.endswith("in 18 blocks of columns")
    assert records["3.weight"].after < 0.5 * records["3.weight"].before
    assert distance(masked, model, batches) < 0.3 * before
    assert distance(masked, model, other) < 0.6 * before_other
    (site,) = masked_sites(masked)
    check_groups("3.weight", site.value, site.spec.pattern.n, site.spec.grouping)


@pytest.mark.parametrize("name", ["kinds", "timm vit"])
def test_small_blocks_come_near_what_all_columns_together_reach(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, masked, batches, sites = converted(name)
    before, other = distance(masked, model, batches), nmfx.transform(model, nmfx.scheme_of(masked), sites=sites)
    correct(masked, batches)
    monkeypatch.setattr(layerwise, "MOST_COLUMNS", 47)
    monkeypatch.setattr(layerwise, "BLOCK", 48)
    records = correct(other, batches)
    assert any("blocks" in one.chosen for one in records)
    whole, parts = (distance(network, model, batches) for network in (masked, other))
    assert parts < whole + 0.5 * (before - whole)


def test_one_block_of_all_columns_is_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masked, batches, sites = converted("kinds")
    other = nmfx.transform(model, nmfx.scheme_of(masked), sites=sites)
    correct(masked, batches)
    monkeypatch.setattr(layerwise, "MOST_COLUMNS", 0)
    records = correct(other, batches)
    assert sum("in 1 blocks" in one.chosen for one in records) > 4
    for one, two in zip(masked.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3 * float(two.detach().abs().max()))


def test_many_columns_in_groups_that_cross_rows_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense, batches = nn.Sequential(nn.Conv2d(3, 8, 4)).eval(), [torch.randn(8, 3, 8, 8) for _ in range(8)]
    sites = find_sites(dense, batches[0])
    masked = transform(dense, Scheme.uniform(sites, "2:8", layout="flat"), sites=sites)
    monkeypatch.setattr(layerwise, "MOST_COLUMNS", 40)
    (record,) = correct(masked, batches)
    assert record.chosen == "plain: more than 40 columns, in groups that cross rows"


@pytest.mark.parametrize("method", ["admm", "sweep", "magnitude"])
@torch.no_grad()
def test_groups_that_cross_rows_keep_their_n(method: str) -> None:
    torch.manual_seed(0)
    dense, batches = nn.Sequential(nn.Conv2d(3, 8, 4)).eval(), [torch.randn(8, 3, 8, 8) for _ in range(8)]
    sites = find_sites(dense, batches[0])
    (site,) = masked_sites(transform(dense, Scheme.uniform(sites, "2:8", layout="flat"), sites=sites))
    network = Network(dense, {})
    ((name, product, moments),) = products_of(network, batches)
    values = product.matrix(product.weight).float()
    found = solve(method, Quadratic.of(Scaled(moments), values, 0.01), values, product, network.weights[name], site.spec)
    check_groups(name, product.tensor(found), 2, site.spec.grouping)
