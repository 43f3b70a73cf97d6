"""Laws of transform: the model's own class and keys, its weights read through their masks, and trained as asked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from awkward import MODELS, build, models, run, same, snapshot
from cases import cases
from torch import Tensor, nn

from nmfx.errors import NmfxError, SchemeError, TraceError
from nmfx.masking.owner import is_masked, plain_class
from nmfx.masking.sites import masked_sites
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.models.site import Sites
from nmfx.passes.baking import bake
from nmfx.passes.transform import conversion_difference, scheme_of, transform
from nmfx.scheme import Scheme
from nmfx.sparsity.pattern import Pattern

CONVERTIBLE = [name for name in MODELS if name != "scripted"]  # deepcopy of a ScriptModule makes non-leaf parameters


def found(name: str) -> tuple[nn.Module, Example, Sites]:
    model, example = build(name)
    return model, example, find_sites(model, example)


def mask_by_hand(weight: Tensor, n: int, m: int, rows: tuple[int, int, int]) -> Tensor:
    """The N largest magnitudes of each M consecutive entries of every row, group by group, the earlier one on ties."""
    outer, length, inner = rows
    lines, mask = weight.detach().abs().double().reshape(rows), torch.zeros(rows, dtype=torch.bool)
    for o in range(outer):
        for k in range(inner):
            for start in range(0, length, m):
                group = lines[o, start : start + m, k].tolist()
                for i in sorted(range(len(group)), key=lambda i, group=group: (-group[i], i))[:n]:
                    mask[o, start + i, k] = True
    return mask.reshape(weight.shape)


def premasked(model: nn.Module, sites: Sites, scheme: Scheme) -> nn.Module:
    """A plain copy whose weights are zero wherever the masks found by hand drop them."""
    plain = copy.deepcopy(model)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, pattern in scheme.items():
            parameters[name].mul_(mask_by_hand(parameters[name], pattern.n, pattern.m, sites[name].rows))
    return plain


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The dense weight, as an optimiser finds it."""
    return dict(model.named_parameters())[name]


def gradients(model: nn.Module, example: Example) -> list[Tensor]:
    """Gradients of all parameters after one training step's backward, zeros where there is none."""
    model.zero_grad()
    outputs = run(model, example, train=True)
    sum(out.square().sum() for out in outputs).backward()  # type: ignore[union-attr]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


# What is a scheme.


class Net(nn.Module):
    """Sites of 8 inputs, 8 inputs, and of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.odd = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(torch.tanh(self.second(torch.tanh(self.first(x)))))


X = torch.linspace(-1, 1, 16).view(2, 8)
BOTH = {"first.weight": "2:4", "second.weight": "2:4"}
SPELLINGS: dict[str, Callable[[Path, Sites], Any]] = {
    "scheme": lambda path, sites: Scheme(BOTH),
    "uniform scheme": lambda path, sites: Scheme.uniform(sites, "2:4"),
    "text": lambda path, sites: "2:4",
    "spaced text": lambda path, sites: " 2 : 4 ",
    "pattern": lambda path, sites: Pattern(2, 4),
    "mapping": lambda path, sites: BOTH,
    "mapping of patterns": lambda path, sites: {name: Pattern(text) for name, text in BOTH.items()},
    "globs": lambda path, sites: {"odd.*": "1:1", "*": "2:4"},
    "yaml path": lambda path, sites: (Scheme(BOTH).save(path / "s.yaml"), path / "s.yaml")[1],
    "text of a yaml path": lambda path, sites: (Scheme(BOTH).save(path / "s.yaml", sites), str(path / "s.yaml"))[1],
    "published path": lambda path, sites: (Scheme(BOTH).save(path / "s.txt", sites), path / "s.txt")[1],
}


@cases(SPELLINGS)
def test_a_scheme_may_be_spelt(name: str, tmp_path: Path) -> None:
    model = Net()
    sites = find_sites(model, X)
    for options in ({"sites": sites}, {"example_input": X}):
        converted = transform(model, SPELLINGS[name](tmp_path, sites), **options)  # type: ignore[arg-type]
        assert scheme_of(converted) == Scheme(BOTH)
        assert converted.first.weight.count_nonzero() == 32


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (3, "got int"),
        (None, "got NoneType"),
        (["2:4"], "got list"),
        ("4:2", "did you mean '2:4'"),
        ("half", "half: no such file"),
        ({"nothing": "2:4"}, "no site matches 'nothing'"),
        ({"odd.weight": "2:4"}, r"odd\.weight: 2:4 needs the group axis \(in=3\)"),
        (Scheme({"odd.weight": "2:4"}), r"odd\.weight: 2:4 needs the group axis \(in=3\)"),
        (Scheme({"third.weight": "2:4"}), r"third\.weight: not a site"),
    ],
    ids=["int", "none", "list", "swapped", "no file", "glob", "site", "scheme", "stranger"],
)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_what_is_no_scheme_is_refused(scheme: Any, message: str, inplace: bool) -> None:
    model = Net()
    sites, before = find_sites(model, X), snapshot(model)
    with pytest.raises(NmfxError, match=message):
        transform(model, scheme, sites=sites, inplace=inplace)
    assert snapshot(model) == before


def test_an_unknown_way_to_train_is_refused() -> None:
    with pytest.raises(NmfxError, match=r"unknown training 'srste' .did you mean 'sr-ste'.*; known: sr-ste, ste, fixed"):
        transform(Net(), "2:4", example_input=X, training="srste")  # type: ignore[arg-type]


# The converted model.


@models(CONVERTIBLE)
def test_a_dense_scheme_changes_no_bit(name: str) -> None:
    model, example, sites = found(name)
    converted = transform(model, Scheme({site.name: "1:1" for site in sites}), sites=sites)
    assert not any(is_masked(module) for module in converted.modules())
    assert same(run(converted, example), run(model, example))
    assert same(gradients(converted, example), gradients(model, example))


@models(CONVERTIBLE)
def test_keys_and_classes_stay(name: str) -> None:
    model, _, sites = found(name)
    before = snapshot(model)
    converted = transform(model, Scheme.uniform(sites, "2:4", remainder="short"), sites=sites)
    assert snapshot(model) == before
    assert list(converted.state_dict()) == list(model.state_dict())
    assert same(converted.state_dict().values(), model.state_dict().values())
    assert [isinstance(c, type(m)) for c, m in zip(converted.modules(), model.modules(), strict=True)]
    assert [plain_class(m) for m in converted.modules()] == [type(m) for m in model.modules()]
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("remainder", ["dense", "short"])
@models([name for name in CONVERTIBLE if name != "standardised"])  # see masking/test_derived.py
def test_masked_equals_premasked(name: str, remainder: Any) -> None:
    model, example, sites = found(name)
    scheme = Scheme.uniform(sites, "1:4", remainder=remainder)
    plain = premasked(model, sites, scheme)
    converted = transform(model, scheme, sites=sites, training="fixed")
    assert same(run(converted, example), run(plain, example))
    weights = {site.spec.name: getattr(site.owner, site.attr) for site in masked_sites(converted)}
    assert set(weights) == set(scheme)
    assert same(weights.values(), [dict(plain.named_parameters())[key] for key in weights])
    # Kept weights have the gradients of the pre-masked model, dropped ones have none.
    expected = [
        grad * mask_by_hand(p, scheme[key].n, scheme[key].m, sites[key].rows) if key in scheme else grad
        for (key, p), grad in zip(model.named_parameters(), gradients(plain, example), strict=True)
    ]
    assert same(gradients(converted, example), expected)


@pytest.mark.parametrize("name", ["residual", "attention", "tied", "lstm", "functional"])
def test_converted_again_is_converted_once(name: str) -> None:
    model, example, sites = found(name)
    first = transform(model, Scheme.uniform(sites, "1:4", remainder="short"), sites=sites)
    run(first, example)
    for scheme in (
        Scheme.uniform(sites, "2:8", remainder="short"),
        Scheme({}),
        Scheme({next(iter(sites)).name: "1:2"}, short=True),
    ):
        again, once = (transform(m, scheme, sites=sites) for m in (first, model))
        assert scheme_of(again) == scheme_of(once)
        assert same(run(again, example), run(once, example))
        assert same(again.state_dict().values(), model.state_dict().values()), "dense weights survive a conversion"
    assert scheme_of(first).patterns == Scheme.uniform(sites, "1:4", remainder="short").patterns


def test_sites_are_found_on_a_converted_model() -> None:
    model, example, sites = found("residual")
    assert find_sites(transform(model, "1:4", sites=sites), example) == sites


@pytest.mark.parametrize("name", ["residual", "tied", "lstm", "attention"])
def test_a_copy_a_pickle_and_a_checkpoint_are_the_same(name: str) -> None:
    model, example, sites = found(name)
    converted = transform(model, "2:4", sites=sites)
    expected = run(converted, example)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert same(run(other, example), expected)
        assert scheme_of(other) == scheme_of(converted)
    torch.manual_seed(3)
    fresh = transform(build(name)[0], "2:4", sites=sites)
    fresh.load_state_dict(model.state_dict())  # the original's own checkpoint, strictly
    assert same(run(fresh, example), expected)


def test_inplace_converts_the_model_itself() -> None:
    model, example, sites = found("residual")
    expected = run(transform(model, "2:4", sites=sites), example)
    parameters = [id(p) for p in model.parameters()]
    assert transform(model, "2:4", sites=sites, inplace=True) is model
    assert [id(p) for p in model.parameters()] == parameters
    assert same(run(model, example), expected)


class Clash(Net):
    """Its second linear has something of its own under the name of the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.second.register_buffer("weight_mask", torch.ones(3))


@pytest.mark.parametrize(
    "inplace",
    [False, True],
    ids=["copy", "inplace"],
)
def test_a_conversion_that_fails_changes_nothing(inplace: bool) -> None:
    model = Clash()
    sites, before = find_sites(model, X), snapshot(model)
    with pytest.raises(NmfxError, match=r"second\.weight: its module already has an attribute 'weight_mask'"):
        transform(model, "2:4", sites=sites, inplace=inplace)
    assert snapshot(model) == before


@pytest.mark.parametrize("policy", ["strict", "short", "flat", "empty"])
def test_scheme_of_reads_the_scheme_back(policy: str) -> None:
    model, _, sites = found("residual")
    scheme = {
        "strict": Scheme({"conv1.weight": "2:4", "fc.weight": "1:8"}),
        "short": Scheme({"stem.weight": "1:2", "fc.weight": "1:16"}, short=True),
        "flat": Scheme({"stem.weight": "1:4", "fc.weight": "1:16"}, "flat"),
        "empty": Scheme({}),
    }[policy]
    assert scheme_of(transform(model, scheme, sites=sites)) == scheme


# Every reader of a weight sees it masked.


def test_a_tied_weight_is_masked_for_both_readers() -> None:
    model, example, sites = found("tied")
    converted = transform(model, "1:4", sites=sites)
    (site,) = sites
    assert site.owners == (("embed", "weight"), ("decoder", "weight"))
    table = model.embed.weight * mask_by_hand(model.embed.weight, 1, 4, site.rows)
    assert same([converted.embed.weight, converted.decoder.weight], [table, table])
    expected = F.linear(torch.tanh(F.embedding(example.args[0], table)), table)
    assert same(run(converted, example), [expected])
    assert converted.embed._parameters["weight"] is converted.decoder._parameters["weight"]
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.5)
    gradients(converted, example), optimizer.step()
    assert same([converted.embed.weight], [converted.decoder.weight])
    assert int(converted.embed.weight.count_nonzero()) == table.numel() // 4


def test_a_weight_read_by_a_parent_is_masked() -> None:
    model, example, sites = found("functional")
    converted = transform(model, "1:4", sites=sites)
    kernel, qkv = (w * mask_by_hand(w, 1, 4, (*w.shape, 1)) for w in (model.inner.kernel, model.qkv.weight))
    assert same(run(converted, example), [F.linear(F.linear(example.args[0], kernel), qkv)])


# Training.


class Reference:
    """The two linears of `Net` trained by the formulas of domino.md, section 8, without nmfx."""

    def __init__(self, net: Net, training: str, decay: float) -> None:
        self.net, self.training, self.decay = copy.deepcopy(net), training, decay
        self.fixed = {name: self.mask(name) for name in BOTH}

    def mask(self, name: str) -> Tensor:
        weight = parameter(self.net, name)
        return mask_by_hand(weight, 2, 4, (*weight.shape, 1))

    def step(self, x: Tensor, lr: float, momentum: float, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        masks = self.fixed if self.training == "fixed" else {name: self.mask(name) for name in BOTH}
        parameters = {name: p.detach() for name, p in self.net.named_parameters()}
        reads = {name: (p * masks[name] if name in masks else p.clone()).requires_grad_() for name, p in parameters.items()}
        loss = torch.func.functional_call(self.net, reads, (x,)).square().sum()
        for (name, parameter), grad in zip(parameters.items(), torch.autograd.grad(loss, list(reads.values())), strict=True):
            if name in masks and self.training == "fixed":
                grad = grad * masks[name]
            elif name in masks:
                grad = grad + self.decay * ~masks[name] * parameter
            buffers[name] = grad if name not in buffers else momentum * buffers[name] + grad
            parameter.sub_(lr * buffers[name])
        return masks


@pytest.mark.parametrize(
    ("training", "decay"),
    [("sr-ste", 0.25), ("sr-ste", 2e-4), ("ste", 0.0), ("fixed", 0.0)],
    ids=["sr-ste", "default", "ste", "fixed"],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["sgd", "momentum"])
def test_training_follows_the_formulas(training: Any, decay: float, momentum: float) -> None:
    net = Net().double()
    reference, buffers, moved = Reference(net, training, decay), {}, 0
    options = {} if decay == 2e-4 else {"decay": decay}
    model = transform(net, "2:4", example_input=X, training=training, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    masks = None
    for step in range(12):
        x = torch.randn(4, 8, dtype=torch.float64)
        before, masks = masks, {s.spec.name: s.mask.clone() for s in masked_sites(model)}
        moved += before is not None and any(not torch.equal(before[name], masks[name]) for name in BOTH)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        expected = reference.step(x, 0.1, momentum, buffers)
        assert same(masks.values(), expected.values()), step
        for (name, found), wanted in zip(model.named_parameters(), reference.net.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=lambda text, at=(step, name): f"{at}: {text}")
    assert (moved > 0) == (training != "fixed"), "masks follow the weights, unless they are fixed"


def test_fixed_masks_leave_dropped_weights_where_they_were() -> None:
    model, example, sites = found("residual")
    converted = transform(model, "1:4", sites=sites, training="fixed")
    masks = {s.spec.name: s.mask.clone() for s in masked_sites(converted)}
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    for _ in range(3):
        gradients(converted, example), optimizer.step()
    for name, mask in masks.items():
        now, before = parameter(converted, name).detach(), parameter(model, name).detach()
        assert torch.equal(now[~mask], before[~mask])
        assert not torch.equal(now[mask], before[mask])


def test_sr_ste_decays_what_it_drops() -> None:
    """Without a gradient from the loss, kept weights stand still and dropped ones shrink by 1 - lr * decay."""
    model = transform(Net(), "2:4", example_input=X, decay=0.5)
    weight, mask = parameter(model, "first.weight"), next(iter(masked_sites(model))).mask.clone()
    before = weight.detach().clone()
    (model(X) * 0).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.where(mask, before, before * 0.75))


# The proof of exactness.


@models(CONVERTIBLE)
def test_the_conversion_is_exact_and_undone(name: str) -> None:
    model, example, sites = found(name)
    run(model, example)
    before = snapshot(model)
    assert conversion_difference(model, sites, example) == 0
    after = snapshot(model)
    assert after == before


def test_the_modes_of_a_models_parts_survive() -> None:
    model, example, sites = found("residual")
    model.train()
    model.bn1.eval()  # a frozen batch normalisation
    conversion_difference(model, sites, example)
    assert [module.training for module in (model, model.bn0, model.bn1)] == [True, True, False]


def test_a_converted_model_cannot_be_compared() -> None:
    model, example, sites = found("residual")
    with pytest.raises(SchemeError, match="converted already"):
        conversion_difference(transform(model, "2:4", sites=sites), sites, example)


class Drifting(nn.Module):
    """Gives another answer at every call, whatever its weights."""

    def __init__(self, drift: list[float]) -> None:
        super().__init__()
        self.fc, self.drift, self.calls = nn.Linear(8, 4), drift, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) + self.drift[self.calls % 2]


@pytest.mark.parametrize(
    "drift",
    [
        [0.0, 0.5],
        [0.0, float("nan")],
    ],
    ids=["number", "nan"],
)
def test_a_difference_is_seen(drift: list[float]) -> None:
    model = Drifting(drift)
    sites = find_sites(model, X)
    assert conversion_difference(model, sites, Example((X,))) != 0


# The fx view.

TRACED = [
    "residual",
    "grouped",
    "transposed",
    "functional",
    "attention",
    "listed",
    "standardised",
    "buffered",
    "conv3d",
    "joined",
]


@pytest.mark.parametrize("name", TRACED)
def test_as_graph_is_the_converted_model(name: str) -> None:
    model, example, sites = found(name)
    converted = transform(model, "2:4", sites=sites)
    view = transform(model, "2:4", example_input=example, as_graph=True)
    assert isinstance(view, torch.fx.GraphModule)
    assert list(view.state_dict()) == list(model.state_dict())
    for train in (False, True, False):
        assert same(run(view, example, train=train), run(converted, example, train=train))
    assert same(gradients(view, example), gradients(converted, example))
    view.eval()
    for site in sites:
        for path, attr in site.owners:
            assert site.name not in scheme_of(converted) or is_masked(view.get_submodule(path)), attr
    called = {node.target for node in view.graph.nodes if node.op == "call_module"}
    read = {node.target for node in view.graph.nodes if node.op == "get_attr"}
    for site in sites:
        assert {site.name, *(path for path, _ in site.owners)} & (called | read) or "attention" in site.name


def test_as_graph_of_what_cannot_be_traced_says_so() -> None:
    model, example, sites = found("branching")
    with pytest.raises(TraceError, match=r"Branching: torch\.fx cannot trace it at the root"):
        transform(model, "2:4", sites=sites, example_input=example, as_graph=True)


# A network of timm.


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, Sites, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    return model, find_sites(model, x), x


def test_a_converted_timm_model_is_still_one(resnet: tuple[nn.Module, Sites, Tensor]) -> None:
    model, sites, x = resnet
    scheme = Scheme.uniform(sites, "2:4", keep_dense=["conv1*"])
    converted = transform(model, scheme, sites=sites)
    assert isinstance(converted, type(model))
    assert list(converted.state_dict()) == list(model.state_dict())
    plain = premasked(model, sites, scheme)
    with torch.no_grad():
        assert same([converted(x), converted.forward_features(x)], [plain(x), plain.forward_features(x)])
        assert same([converted.forward_head(converted.forward_features(x))], [plain(x)])
    converted.reset_classifier(7)
    assert converted(x).shape == (2, 7)
    assert not is_masked(converted.get_classifier())
    assert "fc.weight" not in scheme_of(converted)
    assert len(scheme_of(converted)) == len(scheme) - 1
    converted.reset_classifier(0)
    plain.reset_classifier(0)
    with torch.no_grad():
        assert same([converted(x)], [plain(x)])


def test_a_converted_timm_model_trains(resnet: tuple[nn.Module, Sites, Tensor]) -> None:
    model, sites, x = resnet
    converted = transform(model, "2:4", sites=sites).train()
    optimizer = torch.optim.SGD(converted.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(converted(x), torch.tensor([1, 2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert same([bake(converted).eval()(x)], [converted.eval()(x)])


def test_writes_through_the_attribute_reach_the_parameter() -> None:
    model = transform(Net(), "2:4", example_input=X)
    with torch.no_grad():
        model.first.weight.copy_(torch.arange(64.0).view(8, 8))
        model.second.weight.mul_(2)
    nn.init.ones_(model.odd.weight)
    assert torch.equal(parameter(model, "first.weight").detach(), torch.arange(64.0).view(8, 8))
    assert torch.equal(model.first.weight[0].detach(), torch.tensor([0.0, 0, 2, 3, 0, 0, 6, 7]))
