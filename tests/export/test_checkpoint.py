"""Laws of the checkpoint: what is loaded is what was saved, bit for bit; what is not whole is refused and changes nothing."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import resource
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from awkward import build, run, same, snapshot
from awkward import models as awkward_models
from cases import cases
from torch import Tensor, nn

from nmfx.demo.digits import load_demo
from nmfx.errors import CheckpointError, NmfxError
from nmfx.export.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from nmfx.files.sealed import read_sealed, write_sealed
from nmfx.masking.owner import is_masked
from nmfx.masking.sites import masked_sites
from nmfx.models.census import find_sites
from nmfx.models.site import Sites
from nmfx.models.source import Source, find_source
from nmfx.passes.baking import bake
from nmfx.passes.transform import scheme_of, transform
from nmfx.passes.verification import verify
from nmfx.scheme import Scheme

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, so that -0 differs from 0 and a NaN equals itself."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.dtype == torch.bool else tensor.view(INTEGERS[tensor.element_size()])


def facts(model: nn.Module) -> dict[str, Any]:
    """All that a checkpoint must give back: bits of every weight as it is read, masks, and how each mask trains."""
    found: dict[str, Any] = {name: bits(tensor) for name, tensor in bake(model).state_dict().items()}
    for site in masked_sites(model):
        name = f"{site.path}.{site.attr}"
        found[f"{name} mask"], found[f"{name} spec"] = site.mask, replace(site.spec, name="")
    return found


def assert_same_facts(found: nn.Module, expected: nn.Module) -> None:
    mine, theirs = facts(found), facts(expected)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(mine[key], value) if isinstance(value, Tensor) else mine[key] == value, key


def state_of(model: nn.Module) -> dict[str, Any]:
    """A snapshot of a model whose masks are up to date, whatever the random numbers do."""
    facts(model)
    return {key: value for key, value in snapshot(model).items() if key != "random numbers"}


def randomise(model: nn.Module) -> nn.Module:
    """Statistics of batch normalisation as a trained model has them."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    return model.eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "torchvision mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=12), (3, 64, 64)),
    "timm resnet": (lambda: timm.create_model("test_resnet"), (3, 64, 64)),
    "timm vit": (lambda: timm.create_model("test_vit", num_classes=5), (3, 160, 160)),
    "timm convnext, 1 channel": (lambda: timm.create_model("test_convnext", in_chans=1), (1, 64, 64)),
    "timm efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=0), (3, 64, 64)),
    "demo": (lambda: load_demo(trained=True), (1, 8, 8)),
}
POLICIES: dict[str, Callable[[Any], Scheme]] = {
    "2:4": lambda sites: Scheme.uniform(sites, "2:4"),
    "short": lambda sites: Scheme.uniform(sites, "1:16", remainder="short"),
    "flat": lambda sites: Scheme.uniform(sites, "3:8", layout="flat"),
    "mixed": lambda sites: Scheme({s.name: f"{1 + i % 7}:8" for i, s in enumerate(sites) if s.length % 8 == 0}),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@cache
def sites_for(name: str) -> Sites:
    make, size = NETWORKS[name]
    return find_sites(make(), torch.empty(1, *size))


def network(name: str, policy: str = "2:4", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A converted network."""
    model, sites = randomise(NETWORKS[name][0]()), sites_for(name)
    return transform(model.to(dtype), POLICIES[policy](sites), sites=sites, inplace=True, **options)


@pytest.mark.parametrize(
    ("name", "dtype", "policy"),
    [
        *((name, "fp32", "mixed") for name in NETWORKS),
        *((name, "fp32", policy) for name in ("timm resnet", "demo") for policy in POLICIES if policy != "mixed"),
        *((name, dtype, "short") for name in ("timm vit", "timm efficientnet") for dtype in ("fp16", "bf16")),
    ],
)
def test_a_network_comes_back_by_itself(name: str, dtype: str, policy: str, tmp_path: Path) -> None:
    model = network(name, policy, DTYPES[dtype])
    before = state_of(model)
    save_checkpoint(model, tmp_path / "model.safetensors")
    assert state_of(model) == before
    loaded = load_checkpoint(str(tmp_path / "model.safetensors"))
    assert_same_facts(loaded, model)
    assert scheme_of(loaded) == scheme_of(model)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert not any(module.training for module in loaded.modules())
    verify(loaded)
    x = torch.randn(1, *NETWORKS[name][1], dtype=DTYPES[dtype])
    with torch.no_grad():
        assert same([loaded(x)], [model(x)])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("state", ["dense", "converted", "otherwise"])
@pytest.mark.parametrize("name", ["torchvision mobilenet", "timm vit", "demo"])
def test_a_network_is_loaded_into_a_given_one(name: str, state: str, tmp_path: Path) -> None:
    model = network(name)
    save_checkpoint(model, tmp_path / "model.safetensors")
    given = {
        "dense": lambda: NETWORKS[name][0](),
        "converted": lambda: network(name),
        "otherwise": lambda: network(name, "short"),
    }[state]()
    parameters = [id(p) for p in given.parameters()]
    loaded = load_checkpoint(tmp_path / "model.safetensors", given)
    assert loaded is given
    assert [id(p) for p in given.parameters()] == parameters, "an optimiser keeps its parameters"
    assert_same_facts(given, model)


@awkward_models(
    ["residual", "grouped", "transposed", "tied", "twice", "functional", "attention", "lstm", "listed", "products", "half"]
)
@pytest.mark.parametrize("training", ["sr-ste", "fixed"])
def test_awkward_models_come_back(name: str, training: Any, tmp_path: Path) -> None:
    model, example = build(name)
    sites = find_sites(model, example)
    masked = transform(model, Scheme.uniform(sites, "1:4", remainder="short"), sites=sites, training=training, decay=0.125)
    save_checkpoint(masked, tmp_path / "model.safetensors", info={"method": "by hand"})
    header, _ = read_checkpoint(tmp_path / "model.safetensors")
    assert (header.source, header.info, header.model) == (
        None,
        {"method": "by hand"},
        f"{type(model).__module__}.{type(model).__qualname__}",
    )
    assert header.scheme.layout == scheme_of(masked).layout
    loaded = load_checkpoint(tmp_path / "model.safetensors", build(name)[0])
    assert_same_facts(loaded, masked)
    for train in (False, True):
        assert same(run(loaded, example, train=train), run(masked, example, train=train))
    with pytest.raises(CheckpointError, match=r"not of timm or torchvision; build it and call load_checkpoint\(path, model\)"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_a_tied_weight_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    model, example = build("tied")
    masked = transform(model, "2:4", example_input=example)
    header = save_checkpoint(masked, tmp_path / "model.safetensors")
    _, tensors = read_checkpoint(tmp_path / "model.safetensors")
    assert sorted(tensors) == ["embed.weight:positions", "embed.weight:values"]
    assert header.aliases == {"decoder.weight": "embed.weight"}
    loaded = load_checkpoint(tmp_path / "model.safetensors", build("tied")[0])
    assert loaded.embed._parameters["weight"] is loaded.decoder._parameters["weight"]


def test_the_scheme_of_a_tied_weight_fits_its_own_model(tmp_path: Path) -> None:
    model, example = build("tied")
    sites = find_sites(model, example)
    save_checkpoint(transform(model, "2:4", sites=sites), tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors", build("tied")[0])
    for scheme in (read_checkpoint(tmp_path / "model.safetensors")[0].scheme, scheme_of(loaded)):
        assert list(scheme) == ["embed.weight"]
        scheme.check(sites)


class Pair(nn.Module):
    """Two linears, tied or not: the keys are the same."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_what_was_tied_may_be_loaded_apart(tmp_path: Path) -> None:
    model = transform(Pair(tied=True), "2:4", example_input=torch.empty(1, 8))
    save_checkpoint(model, tmp_path / "pair.safetensors")
    loaded, x = load_checkpoint(tmp_path / "pair.safetensors", Pair(tied=False)), torch.randn(3, 8)
    assert same([loaded(x)], [model(x)])


def test_what_was_apart_is_not_loaded_tied(tmp_path: Path) -> None:
    save_checkpoint(transform(Pair(tied=False), "2:4", example_input=torch.empty(1, 8)), tmp_path / "pair.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight|b\.weight"):
        load_checkpoint(tmp_path / "pair.safetensors", Pair(tied=True))


def test_zeros_signs_and_nans_keep_their_bits(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0] = torch.tensor([-0.0, 0.0, -0.0, 0.0, 1.0, -0.0, -2.0, 0.0])
        model[0].weight[1, 2] = float("nan")
        model[0].weight[2, :4] = torch.tensor([float("inf"), -float("inf"), 1.0, 1e-45])
    masked = transform(model, {"0.weight": "2:4"}, example_input=torch.empty(1, 8))
    save_checkpoint(masked, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 2)))
    assert_same_facts(loaded, masked)
    assert torch.signbit(loaded[0].weight[0, 0])


def test_the_memory_format_does_not_show(tmp_path: Path) -> None:
    model = network("timm resnet").to(memory_format=torch.channels_last)
    save_checkpoint(model, tmp_path / "model.safetensors")
    assert_same_facts(load_checkpoint(tmp_path / "model.safetensors"), model)


def test_a_plain_model_is_kept_as_it_is(tmp_path: Path) -> None:
    model = randomise(timm.create_model("test_resnet"))
    header = save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert (header.sites, len(header.scheme)) == ({}, 0)
    assert not any(is_masked(module) for module in loaded.modules())
    assert_same_facts(loaded, model)


def test_a_trained_model_is_saved_as_it_is_read_and_trains_on(tmp_path: Path) -> None:
    model, example = build("residual")
    masked = transform(model, "2:4", example_input=example, decay=0.01)
    for each in (masked, None):
        each = each or load_checkpoint(tmp_path / "model.safetensors", build("residual")[0]).train()
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        run(each, example, train=True)[0].square().sum().backward()
        optimizer.step()
        save_checkpoint(each, tmp_path / "model.safetensors")
        assert_same_facts(load_checkpoint(tmp_path / "model.safetensors", build("residual")[0]), each)
        assert scheme_of(each) == scheme_of(masked)


# Where a model came from.


@pytest.mark.parametrize(
    ("make", "source"),
    [
        (lambda: find_source("timm:test_resnet").build(), Source("timm", "test_resnet")),
        (lambda: timm.create_model("test_vit", num_classes=3), Source("timm", "test_vit", {"num_classes": 3})),
        (lambda: torchvision.models.resnet18(num_classes=3), Source("torchvision", "resnet18", {"num_classes": 3})),
        (lambda: load_demo(trained=False), Source("demo", "digits")),
    ],
    ids=["built here", "timm", "torchvision", "demo"],
)
def test_the_header_says_how_to_build_it(make: Callable[[], nn.Module], source: Source, tmp_path: Path) -> None:
    assert save_checkpoint(make(), tmp_path / "model.safetensors").source == source
    assert read_checkpoint(tmp_path / "model.safetensors")[0].source == source


def google_net() -> nn.Module:
    """As torchvision's pretrained builder makes it."""
    return torchvision.models.googlenet(init_weights=False, transform_input=True, aux_logits=False)


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "pooling": lambda: timm.create_model("test_resnet", global_pool="max"),
    "activation": lambda: timm.create_model("test_resnet", act_layer="silu"),
    "stride": lambda: timm.create_model("test_resnet", output_stride=8),
    "reset": lambda: (m := timm.create_model("test_resnet"), m.reset_classifier(1000, "max"), m)[-1],
    "dilation": lambda: torchvision.models.resnet.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], replace_stride_with_dilation=[False, True, True]
    ),
    "input": google_net,
}
UNSEEN = (
    "identify() compares keys and shapes only: arguments that change neither are lost, and the model that load_checkpoint "
    "rebuilds computes something else"
)


@cases(VARIANTS)
def test_a_model_that_cannot_be_rebuilt_is_not_rebuilt_wrong(name: str, tmp_path: Path) -> None:
    model = randomise(VARIANTS[name]())
    save_checkpoint(model, tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 96, 96)
    try:
        loaded = load_checkpoint(tmp_path / "model.safetensors")
    except CheckpointError:
        return
    with torch.no_grad():
        assert same([loaded(x)], [model(x)])


def test_a_changed_model_must_be_given(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    model.fc = nn.Sequential(nn.Linear(model.num_features, 8), nn.Linear(8, 2))
    save_checkpoint(model, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ResNet, changed, or built with arguments"):
        load_checkpoint(tmp_path / "model.safetensors")


# The size of the file.


@pytest.mark.parametrize("pattern", ["2:4", "4:16", "1:16", "8:32"])
def test_the_file_holds_values_positions_and_the_rest(pattern: str, tmp_path: Path) -> None:
    model = torchvision.models.resnet18()
    sites = find_sites(model)
    scheme = Scheme.uniform(sites, pattern)
    save_checkpoint(transform(model, scheme, sites=sites, inplace=True), tmp_path / "model.safetensors")
    n, m = scheme["fc.weight"].n, scheme["fc.weight"].m
    packed = sum(sites[name].weights for name in scheme)
    rest = sum(t.numel() * t.element_size() for name, t in model.state_dict().items() if name not in scheme)
    expected = packed * n / m * 4 + packed / m * math.ceil(math.log2(math.comb(m, n))) / 8 + rest
    assert expected <= (tmp_path / "model.safetensors").stat().st_size <= expected * 1.01


# What is not whole.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A small checkpoint, and where its tensors begin."""
    path = tmp_path_factory.mktemp("whole") / "demo.safetensors"
    save_checkpoint(network("demo"), path)
    content = path.read_bytes()
    return content, 8 + struct.unpack("<Q", content[:8])[0]


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Check that a content is refused: a CheckpointError naming the file, a given model left alone. Gives the message."""
    given = network("demo", "short")
    before, path = state_of(given), tmp_path / "bad.safetensors"

    def check(content: bytes | None, model: nn.Module | None = given) -> str:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, model)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    yield check
    assert state_of(given) == before


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, "header - 1", "header", "header + 1", "half", "-1000", "-1"], ids=str)
def test_a_truncated_file_is_refused(length: Any, whole: tuple[bytes, int], refused: Callable[..., str]) -> None:
    content, start = whole
    lengths = {"header - 1": start - 1, "header": start, "header + 1": start + 1, "half": len(content) // 2}
    assert "truncated" in refused(content[: lengths.get(length, int(length) if str(length).lstrip("-").isdigit() else 0)])


@pytest.mark.parametrize("name", ["appended", "cut inside", "zeros", "repeated", "reversed"])
def test_a_rearranged_file_is_refused(name: str, whole: tuple[bytes, int], refused: Callable[..., str]) -> None:
    content, start = whole
    middle = (start + len(content)) // 2
    refused(
        {
            "appended": content + b"\0",
            "cut inside": content[:middle] + content[middle + 4 :],
            "zeros": content[:middle] + bytes(512) + content[middle + 512 :],
            "repeated": content + content,
            "reversed": content[:start] + content[start:][::-1],
        }[name]
    )


def test_one_bit_flipped_in_the_header_is_seen(whole: tuple[bytes, int], tmp_path: Path) -> None:
    content, start = whole
    rng, path = random.Random(0), tmp_path / "bad.safetensors"
    for position in [*range(60), *rng.sample(range(60, start), 400)]:
        spoilt = bytearray(content)
        spoilt[position] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_one_bit_flipped_in_the_data_is_seen(whole: tuple[bytes, int], refused: Callable[..., str]) -> None:
    content, start = whole
    rng = random.Random(1)
    for position in [start, len(content) - 1, *rng.sample(range(start, len(content)), 60)]:
        spoilt = bytearray(content)
        spoilt[position] ^= 1 << rng.randrange(8)
        assert "altered since it was written" in refused(bytes(spoilt))


def test_foreign_files_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(3)}
    assert "not a checkpoint of nmfx; load it with --weights" in refused(safetensors.torch.save(tensors))
    assert "header is damaged" in refused(safetensors.torch.save(tensors, {"nmfx": "3"}))
    assert "header is damaged" in refused(safetensors.torch.save(tensors, {"nmfx": "{"}))
    assert "version 99" in refused(safetensors.torch.save(tensors, {"nmfx": json.dumps({"version": 99, "digest": ""})}))
    assert "not a safetensors file" in refused(b"PK\x03\x04 a zip file, as .pth files are")
    assert "not a safetensors file" in refused(bytes(1000))
    torch.save(tensors, tmp_path / "bad.safetensors")
    refused(None)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "file" / "under")


# Models that do not fit.


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = load_demo(trained=False)


STRANGERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another": (lambda: nn.Linear(3, 3), r"weight \(3, 3\) is missing"),
    "wrapped": (Wider, r"net\.stem\.conv\.weight \(16, 1, 3, 3\) is missing"),
    "classes": (
        lambda: _with(classifier=nn.Linear(64, 7)),
        "made for 10 classes, DigitsNet is built with 7",
    ),
    "less": (lambda: _with(classifier=nn.Identity()), r"classifier\.\w+ \(10,.*\) is not a weight of DigitsNet"),
    "more": (lambda: _with(extra=nn.Linear(2, 2)), r"extra\.weight \(2, 2\) is missing"),
    "masked": (lambda: transform(_with(classifier=nn.Linear(64, 7)), "2:4"), "made for 10 classes"),
}


def _with(**children: nn.Module) -> nn.Module:
    model = load_demo(trained=False).train()
    for name, child in children.items():
        model.register_module(name, child)
    return model


@cases(STRANGERS)
def test_a_model_that_does_not_fit_is_left_alone(
    name: str, whole: tuple[bytes, int], refused: Callable[..., str], tmp_path: Path
) -> None:
    make, message = STRANGERS[name]
    (tmp_path / "good.safetensors").write_bytes(whole[0])
    model = make()
    before = state_of(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "good.safetensors", model)
    assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_another_dtype_is_refused_or_kept(dtype: torch.dtype, whole: tuple[bytes, int], tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(whole[0])
    try:
        loaded = load_checkpoint(tmp_path / "good.safetensors", load_demo(trained=False).to(dtype))
    except CheckpointError:
        return
    assert_same_facts(loaded, load_checkpoint(tmp_path / "good.safetensors"))


def test_a_model_without_memory_is_refused_or_filled(whole: tuple[bytes, int], tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(whole[0])
    with torch.device("meta"):
        model = load_demo(trained=False)
    try:
        loaded = load_checkpoint(tmp_path / "good.safetensors", model)
    except CheckpointError:
        return
    assert_same_facts(loaded, load_checkpoint(tmp_path / "good.safetensors"))


# A digest that is right, over a header that is not.


class Hooked(nn.Module):
    """Its own loading fails, after some weights have been loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = load_demo(trained=False), nn.Linear(2, 2)
        self.last.register_load_state_dict_pre_hook(self.fail)

    @staticmethod
    def fail(*_: Any) -> None:
        raise ValueError("not today")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_model_whose_own_loading_fails_is_left_alone(tmp_path: Path) -> None:
    model, example = Hooked(), torch.randn(1, 1, 8, 8)
    save_checkpoint(transform(model, "2:16", example_input=example), tmp_path / "model.safetensors")
    before = state_of(model)
    with pytest.raises(CheckpointError, match=r"Hooked cannot be loaded into: .*not today"):
        load_checkpoint(tmp_path / "model.safetensors", model)
    assert state_of(model) == before


SITE = "block1.conv.weight"
SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no sites": (lambda c: c.pop("sites"), "missing required field `sites`"),
    "a list of sites": (lambda c: c.update(sites=[]), "sites: Expected `object`"),
    "decay of 1e308": (lambda c: c["sites"][SITE].update(decay=1e308), rf"{SITE}: decay: Expected `float` <= "),
    "decay of text": (lambda c: c["sites"][SITE].update(decay="1"), rf"{SITE}: decay: Expected `float"),
    "negative decay": (lambda c: c["sites"][SITE].update(decay=-1), rf"{SITE}: decay: Expected `float` >= 0"),
    "frozen maybe": (lambda c: c["sites"][SITE].update(frozen="maybe"), rf"{SITE}: frozen: Expected `bool`"),
    "no pattern": (lambda c: c["sites"][SITE].pop("pattern"), rf"{SITE}: .*missing required field `pattern`"),
    "another pattern": (lambda c: c["sites"][SITE].update(pattern="3:16"), rf"{SITE}: 3:16 over rows .* takes"),
    "no pattern at all": (lambda c: c["sites"][SITE].update(pattern="abc"), rf"{SITE}: pattern: 'abc' is not an N:M pattern"),
    "negative sizes": (lambda c: c["sites"][SITE].update(shape=[-32, -16, 3, 3]), rf"{SITE}: shape"),
    "sizes without end": (lambda c: c["sites"][SITE].update(shape=[2**63, 2]), rf"{SITE}: shape"),
    "a product without end": (lambda c: c["sites"][SITE].update(shape=[2**47] * 8, rows=[2**47] * 3), f"{SITE}: shape"),
    "as large as two": (
        lambda c: c["sites"][SITE].update(shape=[2**40, 2**40], rows=[2**40, 2**40, 1]),
        f"{SITE}: shape .* does not fit",
    ),
    "other rows": (lambda c: c["sites"][SITE].update(rows=[1, 1, 1]), f"{SITE}: shape .* does not fit rows"),
    "an unknown key": (lambda c: c["sites"][SITE].update(decya=1), f"{SITE}: .*unknown field `decya`"),
    "a site of nothing": (lambda c: c["sites"].update(x=c["sites"][SITE]), "x:positions is missing"),
    "a site less": (lambda c: c["sites"].pop(SITE), f"{SITE}:positions belongs to no site"),
    "an alias of nothing": (lambda c: c["aliases"].update(x="y"), "aliases: x and y cannot share"),
    "an alias of itself": (lambda c: c["aliases"].update(x="x"), "aliases: x and x cannot share"),
    "two of each other": (lambda c: c["aliases"].update(x="y", y="x"), "cannot share"),
    "an alias that is stored": (lambda c: c["aliases"].update({"classifier.bias": SITE}), "cannot share"),
    "info of numbers": (lambda c: c["info"].update(target=1), "info"),
    "a kind": (lambda c: c.update(kind="search"), "the state of a run to resume, not a checkpoint"),
}


@cases(SPOILT)
def test_a_right_digest_makes_no_right_header(
    name: str, whole: tuple[bytes, int], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "good.safetensors").write_bytes(whole[0])
    content, tensors = read_sealed(tmp_path / "good.safetensors", "a checkpoint", 1)
    change, message = SPOILT[name]
    change(content)
    write_sealed(tmp_path / "bad.safetensors", content, tensors)
    for model in ((), (None,)):
        assert re.search(message, refused(None, *model))


def test_positions_out_of_range_are_refused(whole: tuple[bytes, int], refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(whole[0])
    content, tensors = read_sealed(tmp_path / "good.safetensors", "a checkpoint", 1)
    write_sealed(tmp_path / "bad.safetensors", content, tensors | {f"{SITE}:positions": tensors[f"{SITE}:positions"] | 255})
    assert f"{SITE}: corrupt positions" in refused(None)


def test_a_decay_that_no_file_may_hold_is_not_saved(tmp_path: Path) -> None:
    model = transform(load_demo(trained=True), "2:16", example_input=torch.empty(1, 1, 8, 8), decay=1e30)
    with pytest.raises(CheckpointError, match="decay"):
        save_checkpoint(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


# Writing.


def test_an_old_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", network("demo")
    path.write_text("mine")
    with pytest.raises(NmfxError, match="exists already"):
        save_checkpoint(model, path, force=False)
    assert path.read_text() == "mine"
    save_checkpoint(model, path)
    assert_same_facts(load_checkpoint(path), model)
    assert list(tmp_path.iterdir()) == [path]


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def get_extra_state(self) -> Any:
        return {"steps": 3}


def test_what_safetensors_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="_extra_state: extra state of type dict"):
        save_checkpoint(Stateful(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_values_cannot_be_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(NmfxError, match="weight"):
        save_checkpoint(transform(model, "2:4", example_input=torch.empty(1, 8)), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """No file can grow beyond 4 kB; for this block only, as pytest's own output may go to a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_an_error_of_ours_and_keeps_the_old_file(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", network("demo")
    path.write_text("mine")
    with pytest.raises(NmfxError, match=r"model\.safetensors: cannot be written"), small_disk():
        save_checkpoint(model, path)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(NmfxError, match="cannot be written"):
        save_checkpoint(network("demo"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(network("demo"), tmp_path / "new" / "folders" / "model.safetensors")
    assert [path.name for path in (tmp_path / "new" / "folders").iterdir()] == ["model.safetensors"]


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    for name in "ab":
        torch.manual_seed(5)
        save_checkpoint(network("timm resnet"), tmp_path / name, info={"target": "0.5"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
