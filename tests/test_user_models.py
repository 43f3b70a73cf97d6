"""Models from outside the zoos: each converts, exactly, or is refused with a reason that names the module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import BilinearPair, Residual, Scripted, Tied, Twice, run, same
from cases import cases
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nmfx.errors import SchemeError, TraceError
from nmfx.export.checkpoint import load_checkpoint, save_checkpoint
from nmfx.masking.owner import is_masked
from nmfx.masking.sites import masked_sites
from nmfx.models.building import load_weights
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.models.site import Sites
from nmfx.passes.baking import bake
from nmfx.passes.transform import conversion_difference, scheme_of, transform
from nmfx.passes.verification import verify
from nmfx.scheme import Scheme


class EinsumAttention(nn.Module):
    """Queries, keys and values in one tensor of four dimensions; heads are joined by another einsum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, width, heads, width // heads) * 0.2)
        self.out = nn.Parameter(torch.randn(heads, width // heads, width) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("bnd,cdhe->cbhne", x, self.qkv)
        mixed = torch.softmax(q @ k.transpose(-2, -1), -1) @ v  # batch, heads, tokens, head features
        return torch.einsum("bhnk,hkd->bnd", mixed, self.out)


class Layer(nn.Module):
    """Attention and a gated perceptron, each after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), EinsumAttention(width, 2)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        value, gate = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(value * F.silu(gate))


class LanguageModel(nn.Module):
    """A hand-written transformer: the head is the table of words, read by a functional call in the root."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(24, 8), nn.Parameter(torch.randn(6, 8))
        self.layers = nn.ModuleList([Layer(8), Layer(8)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.words.weight)


def _double(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())


class UNet(nn.Module):
    """Down, and up again by transposed convolutions, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = _double(3, 8), _double(8, 16), _double(16, 16)
        self.up2, self.up1 = (
            nn.ConvTranspose2d(16, 16, 2, stride=2),
            nn.ConvTranspose2d(24, 8, 4, stride=2, padding=1, groups=2),
        )
        self.merge, self.head = _double(32, 24), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.up2(self.bottom(F.max_pool2d(second, 2)))
        x = self.up1(self.merge(torch.cat([x, second], 1)))
        return self.head(torch.cat([x, first], 1))


class Rebuilt(nn.Module):
    """Its weight is made anew in every forward: a direction, divided by its norm, times a length."""

    def __init__(self) -> None:
        super().__init__()
        self.direction, self.length = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.ones(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.length * self.direction / self.direction.norm(dim=1, keepdim=True))


class RebuiltParent(nn.Module):
    """A rebuilt weight by hand, and one by each of torch's own parametrisations."""

    def __init__(self) -> None:
        super().__init__()
        self.rebuilt, self.normed = Rebuilt(), parametrizations.weight_norm(nn.Linear(8, 16))
        self.spectral = parametrizations.spectral_norm(nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.spectral(torch.tanh(self.normed(torch.tanh(self.rebuilt(x)))))


class Shared(nn.Module):
    """One block at two places and called three times, and a second module that holds the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.early, self.late, self.twin = block, block, nn.Linear(8, 8)
        self.twin.weight = block[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(self.late(self.early(self.early(x))))


class Versioned(nn.Module):
    """Reads the version of its state dict, and refuses one without, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version should be 2, not {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def _float(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Example]:
    return lambda: Example((torch.randn(*shape).to(dtype),))


def _tokens() -> Example:
    return Example((torch.randint(12, (2, 5)),))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Example], tuple[str, ...]]] = {
    "language-model": (
        LanguageModel,
        _tokens,
        ("words.weight", "layers.0.attention.qkv", "layers.0.attention.out", "layers.0.up.weight", "layers.1.down.weight"),
    ),
    "tied": (Tied, _tokens, ("embed.weight",)),
    "u-net": (UNet, _float(2, 3, 8, 8), ("down2.0.weight", "up2.weight", "up1.weight", "head.weight")),
    "bilinear": (BilinearPair, lambda: Example((torch.randn(2, 4), torch.randn(2, 8))), ("pair.weight",)),
    "scripted": (Scripted, _float(2, 8), ("head.weight",)),
    "rebuilt": (
        RebuiltParent,
        _float(2, 16),
        ("rebuilt.direction", "normed.parametrizations.weight.original1", "spectral.parametrizations.weight.original"),
    ),
    "shared": (Shared, _float(2, 8), ("early.0.weight",)),
    "twice": (Twice, _float(2, 8), ("again.weight", "alias.weight")),
    "versioned": (Versioned, _float(2, 8), ("fc.weight",)),
    "float16": (lambda: Residual().half(), _float(2, 3, 6, 6, dtype=torch.float16), ("conv1.weight", "fc.weight")),
    "bfloat16": (lambda: Residual().bfloat16(), _float(2, 3, 6, 6, dtype=torch.bfloat16), ("conv1.weight", "fc.weight")),
    "float16-u-net": (lambda: UNet().half(), _float(2, 3, 8, 8, dtype=torch.float16), ("up2.weight", "up1.weight")),
    "bfloat16-language-model": (lambda: LanguageModel().bfloat16(), _tokens, ("words.weight", "layers.1.attention.qkv")),
}
PATTERN = "1:2"


def found(name: str) -> tuple[nn.Module, Example, Sites]:
    model, example = MODELS[name][0](), MODELS[name][1]()
    return model, example, find_sites(model, example)


def converted(name: str) -> tuple[nn.Module, nn.Module, Example]:
    """The model, the same with every site masked that can be, and an input."""
    model, example, sites = found(name)
    return model, transform(model, PATTERN, sites=sites), example


def gradients(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """Gradients of one training step, by name."""
    model.zero_grad()
    sum(out.float().square().sum() for out in run(model, example, train=True)).backward()  # type: ignore[union-attr]
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@cases(MODELS)
def test_its_weights_are_sites_and_take_the_pattern(name: str) -> None:
    _, masked, _ = converted(name)
    assert set(MODELS[name][2]) <= set(scheme_of(masked))
    for site in masked_sites(masked):
        value = getattr(site.owner, site.attr)
        assert value.count_nonzero() <= value.numel() // 2


@cases(MODELS)
def test_the_dense_conversion_is_exact(name: str) -> None:
    model, example, sites = found(name)
    assert conversion_difference(model, sites, example) == 0
    dense = transform(model, Scheme({site.name: "1:1" for site in sites}), sites=sites)
    assert not any(is_masked(module) for module in dense.modules())
    assert same(run(dense, example), run(model, example))


@cases(MODELS)
def test_masked_is_premasked(name: str) -> None:
    model, masked, example = converted(name)
    weights = {site.spec.name: getattr(site.owner, site.attr).detach().clone() for site in masked_sites(masked)}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(weights.get(key, parameter))
    assert same(run(masked, example), run(model, example))
    assert same(run(bake(masked), example), run(model, example))
    verify(masked)


@cases(MODELS)
def test_a_training_step_is_that_of_the_premasked(name: str) -> None:
    model, example, sites = found(name)
    masked = transform(model, PATTERN, sites=sites, training="ste")
    plain = bake(masked)
    first, second = gradients(masked, example), gradients(plain, example)
    assert first.keys() == second.keys() >= set(scheme_of(masked))
    assert same(first.values(), second.values())
    torch.optim.SGD(masked.parameters(), lr=0.1).step()
    verify(masked)


@cases(MODELS)
def test_a_checkpoint_comes_back(name: str, tmp_path: Path) -> None:
    _, masked, example = converted(name)
    save_checkpoint(masked, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors", MODELS[name][0]())
    assert scheme_of(loaded) == scheme_of(masked)
    assert list(loaded.state_dict()) == list(masked.state_dict())
    assert same(run(loaded, example), run(masked, example))


@cases(MODELS)
def test_a_deep_copy_is_equal_and_independent(name: str) -> None:
    _, masked, example = converted(name)
    expected = run(masked, example)
    twin = copy.deepcopy(masked)
    assert scheme_of(twin) == scheme_of(masked)
    assert same(run(twin, example), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert same(run(masked, example), expected)
    assert len(list(twin.parameters())) == len(list(masked.parameters()))


# What cannot be masked is named, with the reason.


def test_a_scripted_submodule_is_skipped_by_name() -> None:
    model, _, sites = found("scripted")
    assert {s.name: s.reason for s in sites.skipped} == {
        "frozen.weight": "inside a TorchScript module: its class cannot be swapped"
    }
    with pytest.raises(SchemeError, match=r"no site matches 'frozen\.weight' \(skipped: inside a TorchScript module"):
        transform(model, {"frozen.weight": PATTERN}, sites=sites)
    with pytest.raises(SchemeError, match=r"frozen\.weight: not a site \(skipped: inside a TorchScript module"):
        transform(model, Scheme({"frozen.weight": PATTERN}), sites=sites)


def test_a_model_of_scripted_modules_is_refused_by_name() -> None:
    model = nn.Sequential(Scripted().frozen, nn.ReLU())
    with pytest.raises(SchemeError, match=r"Sequential has no sites: .*; 0\.weight is skipped: inside a TorchScript module"):
        transform(model, PATTERN, example_input=torch.randn(2, 8))


def test_a_wholly_scripted_model_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still met
        model = torch.jit.script(Residual())
    with pytest.raises(TraceError, match="Residual is a TorchScript module"):
        transform(model, PATTERN, example_input=torch.randn(2, 3, 6, 6))


def test_parameters_of_a_copy_beside_a_scripted_module_can_be_trained() -> None:
    model, masked, _ = converted("scripted")
    for copied in (masked, bake(masked)):
        assert [p.is_leaf for p in copied.parameters()] == [True] * 4
        assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_table_of_positions_is_skipped_by_name() -> None:
    _, _, sites = found("language-model")
    assert {s.name: s.reason for s in sites.skipped} == {"positions": "added to activations (position, token or bias)"}


def test_an_einsum_that_sums_in_another_order_reads_a_site() -> None:
    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Parameter(torch.randn(2, 4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bnhe,hed->bnd", x, self.out)  # e is summed before h

    model, x = nn.Sequential(Out()), torch.randn(2, 5, 2, 4)
    (site,) = find_sites(model, x)
    assert (site.name, site.rows) == ("0.out", (2, 4, 8))
    masked = transform(model, PATTERN, example_input=x)
    assert same(masked(x), bake(masked)(x))


def test_a_hook_that_rebuilds_the_weight_of_its_module_is_masked_at_the_source() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old spelling of weight_norm
        model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(8, 8)), nn.ReLU())
    x = torch.randn(2, 8)
    model(x).sum().backward()  # leaves a computed weight behind, which deepcopy refuses
    masked = transform(model, PATTERN, example_input=x)
    assert list(scheme_of(masked)) == ["0.weight_v"]
    found = masked(x)
    assert masked[0].weight.count_nonzero() == 32
    assert torch.equal(found, bake(masked)(x))
    found.sum().backward()
    assert masked[0]._parameters["weight_v"].grad is not None


def test_a_model_without_a_version_in_its_file_is_loaded(tmp_path: Path) -> None:
    model = Versioned()
    save_file(dict(model.state_dict()), tmp_path / "dense.safetensors")
    other = Versioned()
    load_weights(other, tmp_path / "dense.safetensors")
    assert same(other.state_dict().values(), model.state_dict().values())
