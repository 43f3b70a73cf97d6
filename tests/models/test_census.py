"""Laws of the census: weights are found by use, with the rows and MACs of pen and paper; nothing is lost in silence."""

from __future__ import annotations

import math

import awkward
import pytest
import timm
import torch
from awkward import MODELS, build, models, snapshot
from torch import Tensor, nn

from nmfx.errors import SchemeError, TraceError
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.passes.transform import transform

# name -> kind, rows, MACs per sample, by hand: MACs are positions x weights
EXPECTED: dict[str, dict[str, tuple[str, tuple[int, int, int], int]]] = {
    "residual": {
        "stem.weight": ("conv2d", (8, 3, 9), 36 * 8 * 27),
        "conv1.weight": ("conv2d", (8, 8, 9), 36 * 8 * 72),
        "conv2.weight": ("conv2d", (8, 8, 9), 36 * 8 * 72),
        "fc.weight": ("linear", (4, 8, 1), 32),
    },
    "grouped": {
        "grouped.weight": ("conv2d", (12, 4, 9), 9 * 12 * 36),
        "depthwise.weight": ("conv2d", (12, 1, 9), 9 * 12 * 9),
        "pointwise.weight": ("conv2d", (8, 12, 1), 9 * 8 * 12),
    },
    "transposed": {  # every *input* position meets every weight: 3 x 3, then 7 x 7
        "up1.weight": ("conv_transpose2d", (1, 8, 12 * 9), 9 * 8 * 12 * 9),
        "up2.weight": ("conv_transpose2d", (2, 6, 2 * 4), 49 * 12 * 2 * 4),
    },
    "tied": {"embed.weight": ("linear", (12, 8, 1), 5 * 96)},
    "twice": {"again.weight": ("linear", (8, 8, 1), 2 * 64), "alias.weight": ("linear", (4, 8, 1), 32)},
    "functional": {"inner.kernel": ("linear", (12, 8, 1), 96), "qkv.weight": ("linear", (16, 12, 1), 192)},
    "attention": {
        "attention.in_proj_weight": ("linear", (24, 8, 1), 5 * 192),
        "attention.out_proj.weight": ("linear", (8, 8, 1), 5 * 64),
        "mlp.weight": ("linear", (8, 8, 1), 5 * 64),
    },
    "transformer": {
        "layer.self_attn.in_proj_weight": ("linear", (24, 8, 1), 5 * 192),
        "layer.self_attn.out_proj.weight": ("linear", (8, 8, 1), 5 * 64),
        "layer.linear1.weight": ("linear", (16, 8, 1), 5 * 128),
        "layer.linear2.weight": ("linear", (8, 16, 1), 5 * 128),
    },
    "cross-attention": {
        "cross.q_proj_weight": ("linear", (8, 8, 1), 5 * 64),
        "cross.k_proj_weight": ("linear", (8, 4, 1), 3 * 32),
        "cross.v_proj_weight": ("linear", (8, 12, 1), 3 * 96),
        "cross.out_proj.weight": ("linear", (8, 8, 1), 5 * 64),
    },
    "lstm": {
        "lstm.weight_ih_l0": ("linear", (16, 8, 1), 5 * 128),
        "lstm.weight_hh_l0": ("linear", (16, 4, 1), 5 * 64),
        "head.weight": ("linear", (4, 4, 1), 16),
    },
    "standardised": {"conv.weight": ("conv2d", (8, 4, 9), 36 * 8 * 36), "head.weight": ("linear", (4, 8, 1), 32)},
    "einsum": {
        "projections.query": ("matmul", (2, 8, 4), 5 * 64),
        "projections.out": ("matmul", (1, 8, 12), 5 * 96),  # heads and head features are contracted together
    },
    "products": {"bank.flat": ("matmul", (1, 8, 12), 5 * 96), "bank.heads": ("matmul", (3, 12, 4), 5 * 144)},
    "transposing": {"bank.0": ("matmul", (1, 8, 12), 96)},
    "query": {"q.weight": ("linear", (8, 8, 1), 4 * 64 // 2)},  # once for the whole batch of two
    "bilinear": {"pair.weight": ("bilinear", (5 * 4, 8, 1), 160)},
    "experts": {
        "routing.weight": ("linear", (3, 4, 1), 12),
    },
    "auxiliary": {
        "body.weight": ("linear", (8, 8, 1), 64),
        "head.weight": ("linear", (4, 8, 1), 32),
        "aux.weight": ("linear", (4, 8, 1), 0),  # MACs are of the eval forward
    },
    "listed": {"weights.0": ("linear", (8, 8, 1), 64), "weights.1": ("linear", (4, 8, 1), 32)},
    "conv1d": {"0.weight": ("conv1d", (8, 4, 3), 6 * 96), "2.weight": ("conv1d", (4, 8, 1), 6 * 32)},
    "conv3d": {"0.weight": ("conv3d", (8, 4, 27), 27 * 8 * 4 * 27), "2.weight": ("conv3d", (4, 8, 1), 27 * 32)},
    "keywords": {"proj.weight": ("linear", (8, 8, 1), 64), "extra.weight": ("linear", (8, 4, 1), 32)},
    "scripted": {"head.weight": ("linear", (4, 8, 1), 32)},
    "branching": {"conv.weight": ("conv2d", (4, 8, 9), 4 * 4 * 72)},
    "joined": {"q.weight": ("linear", (8, 8, 1), 64), "k.weight": ("linear", (4, 8, 1), 32)},
    "buffered": {"fc.weight": ("linear", (8, 8, 1), 64)},
    "tables": {"head.weight": ("linear", (4, 8, 1), 6 * 32)},
}
EXPECTED["half"] = EXPECTED["residual"]

SKIPPED = {  # name -> a word of the reason
    "standardised": {"conv.gain": "scale"},
    "experts": {"conv.weight": "zeros do not reach the operation: activations mix it"},
    "scripted": {"frozen.weight": "TorchScript"},
    "query": {"query": "matmul"},
    "tables": {
        "words.weight": "embedding",
        "pos_embed": "added",
        "cls_token": "joined",
        "scale": "multiplied",
        "bias_table": "index",
        "norm.weight": "normalisation",
        "norm.bias": "normalisation",
        "unused.weight": "never read",
        "rel_pos": "position table",
    },
}


@models()
def test_sites_are_what_pen_and_paper_give(name: str) -> None:
    model, example = build(name)
    sites = find_sites(model, example)
    assert {site.name: (site.kind, site.rows, site.macs) for site in sites} == EXPECTED[name]
    assert sites.model == type(model).__name__
    assert not sites.notes
    assert sites.weights == sum(math.prod(site.shape) for site in sites)
    assert sites.macs == sum(macs for _, _, macs in EXPECTED[name].values())


@models()
def test_every_parameter_is_a_site_or_skipped_with_the_reason(name: str) -> None:
    model, example = build(name)
    sites = find_sites(model, example)
    parameters = dict(model.named_parameters())
    many = [key for key, parameter in parameters.items() if parameter.dim() > 1]
    skipped = {skip.name: skip for skip in sites.skipped}
    assert sorted([site.name for site in sites] + list(skipped)) == sorted(many)
    assert skipped.keys() == SKIPPED.get(name, {}).keys()
    for key, word in SKIPPED.get(name, {}).items():
        assert word in skipped[key].reason
        assert skipped[key].weights == parameters[key].numel()
        with pytest.raises(SchemeError, match=f"{key}: not a site .skipped: .*{word}"):
            sites[key]


@models()
def test_shapes_owners_and_order_are_the_models(name: str) -> None:
    model, example = build(name)
    sites = find_sites(model, example)
    parameters = dict(model.named_parameters())
    assert [site.name for site in sites] == [key for key in parameters if key in sites]
    for site in sites:
        parameter = parameters[site.name]
        assert site.shape == tuple(parameter.shape)
        assert math.prod(site.rows) == site.weights == parameter.numel()
        assert site.bytes == parameter.numel() * parameter.element_size()
        assert all(model.get_submodule(path)._parameters[attr] is parameter for path, attr in site.owners)
        assert site.axis is None or (
            site.shape[site.axis] == site.length and parameter.stride(site.axis) == math.prod(site.shape[site.axis + 1 :])
        )


@models([name for name in MODELS if name not in ("scripted", "query")])  # query runs once a batch
def test_the_batch_of_the_example_does_not_matter(name: str) -> None:
    model, example = build(name)
    half = lambda tensor: tensor[:1]  # noqa: E731
    single = Example(tuple(map(half, example.args)), {key: half(tensor) for key, tensor in example.kwargs.items()})
    assert find_sites(model, single) == find_sites(model, example)


@models()
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_model_is_left_alone(name: str, train: bool) -> None:
    model, example = build(name)
    model.train(train)
    before = snapshot(model)
    find_sites(model, example)
    assert snapshot(model) == before


@models([name for name in MODELS if name != "scripted"])
def test_a_converted_model_has_the_same_sites(name: str) -> None:
    model, example = build(name)
    sites = find_sites(model, example)
    converted = transform(model, {"*": "1:2"}, sites=sites)
    awkward.run(converted, example)
    before = snapshot(converted)
    assert find_sites(converted, example) == sites
    assert snapshot(converted) == before


def test_a_module_called_twice_is_one_site() -> None:
    sites = find_sites(*build("twice"))
    assert (sites["again.weight"].calls, sites["alias.weight"].calls) == (2, 1)
    assert sites["alias.weight"].owners == (("alias", "weight"),)


def test_a_tied_weight_is_one_site_with_two_owners() -> None:
    site = find_sites(*build("tied"))["embed.weight"]
    assert site.owners == (("embed", "weight"), ("decoder", "weight"))
    assert site.calls == 1  # the embedding looks it up, the decoder reads it as a weight


def test_train_only_heads_say_so() -> None:
    sites = find_sites(*build("auxiliary"))
    assert [site.train_only for site in sites] == [False, False, True]
    assert sites["aux.weight"].calls == 1


def test_conv_groups_and_axes() -> None:
    sites = [*find_sites(*build("grouped")), *find_sites(*build("transposed"))]
    assert [(site.conv_groups, site.length, site.axis) for site in sites] == [
        (2, 4, 1),
        (12, 1, 1),
        (1, 12, 1),
        (1, 8, 0),
        (2, 6, None),  # six of the twelve rows of the first dimension
    ]


def test_half_precision_halves_the_bytes() -> None:
    assert [s.bytes * 2 for s in find_sites(*build("half"))] == [s.bytes for s in find_sites(*build("residual"))]


def test_memory_format_does_not_change_the_rows() -> None:
    model, example = build("branching")  # runs on the CPU, where the copy keeps its strides
    sites = find_sites(model, example)
    assert find_sites(model.to(memory_format=torch.channels_last), example) == sites


def test_memory_format_does_not_change_the_rows_on_meta() -> None:
    model, example = build("residual")
    sites = find_sites(model, example)
    assert find_sites(model.to(memory_format=torch.channels_last), example) == sites


def test_a_model_on_meta_keeps_no_memory() -> None:
    with torch.device("meta"):
        model = awkward.Residual()
    sites = find_sites(model, torch.empty(2, 3, 6, 6))
    assert sites == find_sites(*build("residual"))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_frozen_parameters_are_sites() -> None:
    model, example = build("residual")
    sites = find_sites(model, example)
    assert find_sites(model.requires_grad_(False), example) == sites


def test_an_input_that_does_not_fit_says_so() -> None:
    model, _ = build("residual")
    before = snapshot(model)
    with pytest.raises(TraceError, match=r"Residual: the forward pass fails on an input of 2x5x6x6.*example_input="):
        find_sites(model, torch.zeros(2, 5, 6, 6))
    assert snapshot(model) == before


def test_a_model_that_cannot_train_says_so() -> None:
    class EvalOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("targets should not be none")
            return self.fc(x)

    sites = find_sites(EvalOnly(), torch.randn(1, 8))
    assert [site.name for site in sites] == ["fc.weight"]
    assert "train mode does not run" in sites.notes[0]


def test_attention_fast_path_is_as_it_was() -> None:
    enabled = torch.backends.mha.get_fastpath_enabled()
    find_sites(*build("transformer"))
    assert torch.backends.mha.get_fastpath_enabled() is enabled


def test_fingerprint_tells_models_apart() -> None:
    prints = {name: find_sites(*build(name)).fingerprint for name in ("residual", "grouped", "functional", "joined")}
    assert len(set(prints.values())) == 4
    assert find_sites(*build("half")).fingerprint == prints["residual"]  # the same sites, in another precision


def test_an_unknown_name_says_so() -> None:
    sites = find_sites(*build("twice"))
    assert "again.weight" in sites
    assert "nothing" not in sites
    with pytest.raises(SchemeError, match="nothing: not a site"):
        sites["nothing"]


FAMILIES = ["resnet", "vit", "vit_relpos", "efficientnet", "convnext", "nfnet", "maxvit", "mambaout"]


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_of_timm_are_covered(family: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"test_{family}").eval()
    sites = find_sites(model)
    layers = {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert {site.name for site in sites} >= layers.keys()  # no less than an isinstance swap would see
    many = {key for key, parameter in model.named_parameters() if parameter.dim() > 1}
    assert {site.name for site in sites} | {skip.name for skip in sites.skipped} == many
    assert not {site.name for site in sites} & {skip.name for skip in sites.skipped}
    for key, layer in layers.items():
        assert sites[key].length == layer.weight.shape[1]


def test_a_parameter_that_the_forward_pass_replaces_is_named() -> None:
    class Shrinking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.inner.weight = nn.Parameter(self.inner.weight * 0.99)
            return self.inner(x)

    with pytest.raises(TraceError, match=r"inner\.weight: the forward pass puts another parameter in its place"):
        find_sites(Shrinking(), torch.empty(2, 8))


def test_complex_weights_are_skipped() -> None:
    sites = find_sites(nn.Linear(8, 8, dtype=torch.complex64), torch.zeros(2, 8, dtype=torch.complex64))
    assert [(s.name, s.reason.partition(":")[0]) for s in sites.skipped] == [("weight", "complex numbers")]
