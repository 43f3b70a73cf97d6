"""Cases that users who tried to break nmfx found: each is one kind, said in a line."""

from __future__ import annotations

import copy
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import nmfx
from nmfx.errors import CheckpointError, ModelError, NmfxError, SchemeError, SearchError, VerificationError
from nmfx.export.plain import save_baked
from nmfx.models.building import load_weights
from nmfx.models.census import find_sites

X = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """Its outputs depend on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.calls.add_(1)


class Clamped(nn.Module):
    """Every value becomes the upper limit, which is below the lower one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).clamp(2, -2)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()).eval()


def standardised() -> nn.Module:
    return nn.Sequential(Standardised(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1)).eval()


@pytest.fixture
def masked() -> nn.Module:
    return nmfx.transform(small(), "1:4", example_input=X)


def test_a_model_that_writes_its_buffers_is_not_compiled() -> None:
    with pytest.raises(ModelError, match="calls"):
        nmfx.compile(nmfx.transform(Counting().eval(), "1:4", example_input=X), X)


def test_a_clamp_the_wrong_way_round_is_pytorchs() -> None:
    model = nmfx.transform(Clamped().eval(), "1:4", example_input=X)
    assert torch.equal(nmfx.compile(model, X)(X), torch.full((2, 16, 6, 6), -2.0))


def test_threads_compile_copy_and_meet_new_sizes(masked: nn.Module) -> None:
    compiled = nmfx.compile(masked, X)

    def work(number: int) -> bool:
        if number % 3 == 0:
            return nmfx.compile(masked, X)(X).shape == (2, 16, 6, 6)
        if number % 3 == 1:
            return copy.deepcopy(compiled)(X).shape == (2, 16, 6, 6)
        x = torch.randn(2, 16, 9 + number, 8)
        with torch.no_grad():
            return torch.allclose(compiled(x), masked(x), atol=1e-5)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(9)))


@pytest.mark.parametrize(
    "call",
    [
        lambda model: nmfx.compile(model, X, batch=True),
        lambda model: nmfx.compile(model, X, batch=2.5),
        lambda model: nmfx.compile(model, X, shapes=None),
        lambda model: nmfx.compile(model, X.to("meta")),
        lambda model: nmfx.compile(model, X.to_sparse()),
        lambda model: nmfx.compile(model, torch.nested.as_nested_tensor([X[0], X[1]], layout=torch.jagged)),
        lambda model: nmfx.compile(model, X).state_dict(),
    ],
    ids=["batch=True", "batch=2.5", "shapes=None", "meta", "sparse", "nested", "state_dict"],
)
def test_compile_refuses_what_it_cannot_mean(masked: nn.Module, call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(NmfxError, match="compile"):
        call(masked)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_files_are_replaced(masked: nn.Module, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "device":
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except OSError:
            pytest.skip("devices cannot be made here")
    else:
        os.mkfifo(path) if kind == "fifo" else path.mkdir()
    before = os.lstat(path).st_mode
    with pytest.raises(NmfxError, match=f"{kind}: cannot be written: a folder, pipe or device"):
        nmfx.save_checkpoint(masked, path)
    assert os.lstat(path).st_mode == before


def test_folded_weights_are_not_saved_as_if_the_original_model_could_read_them(tmp_path: Path) -> None:
    model = nmfx.transform(standardised(), "2:4", example_input=X)
    with pytest.raises(CheckpointError, match="0 was a Standardised"):
        save_baked(nmfx.bake(model), tmp_path / "baked.safetensors")
    nmfx.save_checkpoint(model, tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match="baked model"):
        nmfx.load_checkpoint(tmp_path / "whole.safetensors", nmfx.bake(model))
    assert torch.equal(nmfx.load_checkpoint(tmp_path / "whole.safetensors", standardised())(X), model(X))


def test_a_budget_of_bytes_counts_standardised_weights_whole() -> None:
    model = standardised()
    sites = find_sites(model, X)
    assert [site.derived for site in sites] == [True, False]
    result = nmfx.find_scheme(model, target=0.05, budget="bytes", sites=sites)
    assert result.lefts[0] >= 0
    assert "0.weight" not in result.scheme  # nothing is saved on it
    with pytest.raises(SearchError, match="out of reach"):
        nmfx.find_scheme(model, target=0.5, budget="bytes", sites=sites)


def test_a_fused_model_is_not_baked_frozen_or_saved_as_sparse(tmp_path: Path) -> None:
    model = nmfx.transform(timm.create_model("repvgg_a0", num_classes=3).eval(), "2:4", example_input=torch.randn(1, 3, 64, 64))
    fused = timm.utils.model.reparameterize_model(model)
    for use in (nmfx.bake, nmfx.freeze, lambda m: nmfx.save_checkpoint(m, tmp_path / "x.safetensors")):
        with pytest.raises(VerificationError, match="lost their masks"):
            use(fused)


def test_a_new_classifier_is_saved(tmp_path: Path) -> None:
    model = nmfx.transform(timm.create_model("test_resnet", num_classes=3).eval(), "2:4")
    model.reset_classifier(7)
    nmfx.save_checkpoint(model, tmp_path / "x.safetensors")
    assert nmfx.bake(model)(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_weights_with_nan_are_refused(tmp_path: Path) -> None:
    model = small()
    state = model.state_dict()
    state["0.bias"] = torch.full((16,), float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ModelError, match=r"0\.bias holds NaN"):
        load_weights(small(), tmp_path / "nan.pt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": 5}, "data: expected batches"),
        ({"m": 16.5}, "m = 16.5"),
        ({"limits": "params"}, "limits: expected budgets by name"),
        ({"method": "spdy", "data": [(X, torch.zeros(2, dtype=torch.long))] * 2, "options": {"seconds": "a"}}, "seconds = 'a'"),
        ({"method": "spdy", "data": [(X, torch.zeros(2, dtype=torch.long))] * 2, "options": {"seconds": -1}}, "seconds = -1"),
    ],
    ids=["data", "m", "limits", "seconds=a", "seconds=-1"],
)
def test_find_scheme_says_what_it_expected(options: dict[str, object], said: str) -> None:
    with pytest.raises(SearchError, match=said):
        nmfx.find_scheme(small(), example_input=X, **options)  # type: ignore[arg-type]


def test_verify_is_told_an_example_by_its_name(masked: nn.Module) -> None:
    with pytest.raises(SchemeError, match="example_input="):
        nmfx.verify(masked, X)  # type: ignore[arg-type]
