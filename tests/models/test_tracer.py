"""Laws of the fx view: over the model's own modules, through the masks, exact, and right in both modes."""

from __future__ import annotations

import copy
import pickle

import awkward
import pytest
import torch
import torch.nn.functional as F
from awkward import MODELS, build, models, run, same, snapshot
from torch import Tensor, nn

from nmfx.errors import TraceError
from nmfx.masking.owner import is_masked
from nmfx.masking.sites import masked_sites
from nmfx.models.census import find_sites
from nmfx.models.example import Example
from nmfx.models.tracer import SiteGraph, to_graph, to_graphs, trace
from nmfx.passes.baking import bake
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme

TRACEABLE = [name for name in MODELS if name not in ("branching", "scripted")]  # branching asks for values in its root


def convert(name: str) -> tuple[nn.Module, nn.Module, Example]:
    """A model, the same with every site masked that can be, and an example of the input."""
    model, example = build(name)
    sites = find_sites(model, example)
    return model, transform(model, Scheme.uniform(sites, "2:4", remainder="short"), sites=sites), example


def nodes(view: SiteGraph, *ops: str) -> list[str]:
    return [str(node.target) for node in view.graph.nodes if node.op in ops]


@models(TRACEABLE)
def test_the_eval_graph_is_exact(name: str) -> None:
    _, converted, example = convert(name)
    view = to_graph(converted.eval(), example)
    assert not view.training
    assert same(run(view, example), run(converted, example))
    with torch.no_grad():
        for weight in converted.parameters():
            weight.normal_()
    assert same(run(view, example), run(bake(converted), example))  # the graph reads through the masks, as of now


@models([name for name in TRACEABLE if name != "standardised"])  # a module that is masked where it reads stays whole
def test_masking_does_not_change_the_graph(name: str) -> None:
    model, converted, _ = convert(name)
    plain, view = to_graph(model), to_graph(converted)
    for mode in (False, True):
        described = [[(n.op, str(n.target), len(n.all_input_nodes)) for n in v.graphs[mode].nodes] for v in (plain, view)]
        assert described[0] == described[1]


@pytest.mark.parametrize(
    ("name", "modules", "reads"),
    [
        ("residual", ["stem", "bn0", "conv1", "bn1", "conv2", "bn2", "fc"], []),
        ("twice", ["again", "again", "alias"], []),
        ("tied", ["embed", "decoder"], []),
        ("functional", [], ["inner.kernel", "qkv.weight"]),
        ("joined", [], ["q.weight", "k.weight", "q.bias", "k.bias"]),
        ("standardised", ["conv", "head"], []),
        ("einsum", [], ["projections.query", "projections.out"]),
        ("listed", [], ["weights.0", "weights.1"]),
        ("attention", ["norm", "attention", "mlp"], []),
        ("lstm", ["lstm", "head"], []),
        ("experts", ["routing", "conv"], []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_owners_are_leaves_and_functional_reads_go_through_the_mask(name: str, modules: list[str], reads: list[str]) -> None:
    _, converted, _ = convert(name)
    view = to_graph(converted.eval())
    assert nodes(view, "call_module") == modules
    assert nodes(view, "get_attr") == reads
    for site in masked_sites(converted):
        assert view.get_submodule(site.path) is site.owner
        assert f"{site.path}.{site.attr}" in reads or any(site.path.startswith(path) for path in modules)


@models(TRACEABLE)
def test_train_and_eval_switch_the_graph(name: str) -> None:
    _, converted, example = convert(name)
    view = to_graph(converted.train())
    twin = copy.deepcopy(converted)  # batch statistics move: a twin gives the expected values
    assert view.training
    for train in (True, False, True, False):
        assert same(run(view, example, train=train), run(twin, example, train=train))
        assert view.training is train


def test_functional_dropout_is_random_in_train_mode_only() -> None:
    _, converted, example = convert("functional")
    view = to_graph(converted)
    first = view.train()(*example.args)
    assert not torch.equal(view(*example.args), first)
    assert torch.equal(view.eval()(*example.args), view(*example.args))


def test_the_mode_at_birth_is_the_models() -> None:
    for train in (True, False):
        _, converted, _ = convert("functional")
        view = to_graph(converted.train(train))
        assert view.training is train
        assert view.graph is view.graphs[train]


@models(TRACEABLE)
def test_gradients_are_the_models(name: str) -> None:
    _, converted, example = convert(name)
    view, twin = to_graph(converted), copy.deepcopy(converted)
    for each in (view, twin):
        torch.stack([out.float().square().sum() for out in run(each, example, train=True)]).sum().backward()
    for (key, found), (other, expected) in zip(converted.named_parameters(), twin.named_parameters(), strict=True):
        assert key == other
        assert (found.grad is None) == (expected.grad is None)
        assert found.grad is None or torch.equal(found.grad, expected.grad), key  # type: ignore[arg-type]


@models(TRACEABLE)
def test_the_state_is_the_models(name: str) -> None:
    _, converted, _ = convert(name)
    view = to_graph(converted)
    assert list(view.state_dict()) == list(converted.state_dict())
    assert all(a is b for a, b in zip(view.parameters(), converted.parameters(), strict=True))
    view.load_state_dict(converted.state_dict(), strict=True)


@models([name for name in MODELS if name != "scripted"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_tracing_leaves_the_model_alone(name: str, train: bool) -> None:
    for model in convert(name)[:2]:
        example = MODELS[name][1]()
        run(model, example, train=train)
        before = snapshot(model)
        try:
            to_graph(model, example)
        except TraceError:
            assert name == "branching"
        assert snapshot(model) == before


def test_the_mode_of_each_module_is_left_alone() -> None:
    model, example = build("residual")
    model.train().bn1.eval()  # a frozen batch normalisation
    to_graph(model, example)
    assert not model.bn1.training


def test_a_read_of_a_buffer_follows_the_buffer() -> None:
    model, example = build("buffered")
    view = to_graph(model.eval(), example)
    assert nodes(view, "get_attr") == ["shift"]
    model.shift.add_(1)
    assert same(run(view, example), run(model, example))


def test_a_module_that_reads_a_buffer_is_no_leaf() -> None:
    view = to_graph(nn.Sequential(awkward.Buffered()))
    assert "0.fc" in nodes(view, "call_module")


def test_training_the_view_trains_the_model() -> None:
    _, converted, example = convert("residual")
    view = to_graph(converted.train())
    optimizer = torch.optim.SGD(view.parameters(), lr=0.1)
    before = converted.fc.weight.detach().clone()
    view(*example.args).square().sum().backward()
    optimizer.step()
    assert not torch.equal(converted.fc.weight, before)
    assert same(run(view, example), run(converted, example))


def test_a_deep_copy_is_independent() -> None:
    _, converted, example = convert("functional")
    view = to_graph(converted.train())
    twin = copy.deepcopy(view)
    assert isinstance(twin, SiteGraph)
    assert twin.training
    expected = run(view, example)
    assert same(run(twin, example), expected)
    assert same(run(twin, example, train=True), run(view, example, train=True))
    with torch.no_grad():
        for weight in twin.parameters():
            weight.normal_()
    assert same(run(view, example), expected)
    assert any(is_masked(module) for module in twin.modules())


def test_pickling_says_what_to_do_instead() -> None:
    _, converted, _ = convert("residual")
    with pytest.raises(TraceError, match="save_checkpoint"):
        pickle.dumps(to_graph(converted))


def test_a_root_that_holds_a_masked_weight_is_refused() -> None:
    model, example = awkward.OwnWeight(), Example((torch.randn(2, 8),))
    converted = transform(model, "2:4", example_input=example)
    with pytest.raises(TraceError, match="OwnWeight: the root itself holds a masked weight"):
        to_graph(converted)
    assert same(run(nn.Sequential(converted), example), run(to_graph(nn.Sequential(converted)), example))


def test_what_cannot_be_traced_says_so_and_is_converted_all_the_same() -> None:
    _, converted, example = convert("branching")
    with pytest.raises(TraceError, match=r"Branching: torch\.fx cannot trace it at the root"):
        to_graph(converted)
    assert same(run(converted, example), run(bake(converted), example))


def test_a_child_that_cannot_be_traced_becomes_a_leaf() -> None:
    model = nn.Sequential(awkward.Branching(), nn.ReLU(), nn.Conv2d(4, 4, 1))
    example = Example((torch.randn(2, 8, 4, 4),))
    converted = transform(model, "2:4", example_input=example)
    view = to_graph(converted.eval(), example)
    assert nodes(view, "call_module") == ["0", "1", "2"]
    assert is_masked(view.get_submodule("0.conv"))
    assert same(run(view, example), run(bake(converted), example))


class Optional(nn.Module):
    """A defaulted argument decides which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y = self.fc(x) * scale
        return y if mask is None else y * mask


class Constant(nn.Module):
    """Makes tensors out of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.arange(8.0) + torch.tensor([0.5])


class ShapeDependent(nn.Module):
    """Reads sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return self.fc(x.reshape(batch * length, 4)).reshape(batch, length, 4)


class TwoFaced(nn.Module):
    """Computes something else when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if isinstance(x, Tensor) else F.relu(self.fc(x))


def test_defaults_are_constants() -> None:
    model, example = Optional().eval(), Example((torch.randn(2, 8),))
    assert same(run(to_graph(model, example), example), run(model, example))


def test_constants_are_part_of_the_view_and_not_of_its_state() -> None:
    model, example = Constant(), Example((torch.randn(2, 8),))
    view = to_graph(model, example)
    for train in (False, True, False):
        assert same(run(view, example, train=train), run(model, example, train=train))
    assert list(view.state_dict()) == list(model.state_dict())
    assert not dict(model.named_buffers())
    assert same(run(copy.deepcopy(view), example), run(model, example))


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 7, 4), (5, 1, 4)], ids=str)
def test_other_sizes_than_the_examples(shape: tuple[int, ...]) -> None:
    model = ShapeDependent().eval()
    view = to_graph(model, torch.randn(2, 3, 4))
    example = Example((torch.randn(shape),))
    assert same(run(view, example), run(model, example))


def test_a_graph_that_computes_something_else_is_refused() -> None:
    model = TwoFaced()
    before = snapshot(model)
    with pytest.raises(TraceError, match="TwoFaced: its fx graph computes something else"):
        to_graph(model, torch.full((2, 8), -1.0))
    assert snapshot(model) == before


def test_trace_works_on_meta() -> None:
    with torch.device("meta"):
        model = awkward.Residual()
    graph = trace(model).graph
    assert next(str(node.target) for node in graph.nodes if node.op == "call_module") == "stem"


def test_as_graph() -> None:
    model, example = build("residual")
    view = transform(model.eval(), "2:4", example_input=example, as_graph=True)
    assert isinstance(view, SiteGraph)
    assert same(run(view, example), run(bake(transform(model, "2:4", example_input=example)), example))


@pytest.mark.filterwarnings("ignore")  # of torchvision's own
def test_a_detector_comes_apart_into_parts_that_are_exact() -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = transform(ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval(), "2:4")
    parts, x = to_graphs(model), torch.randn(1, 3, 320, 320)
    assert list(parts) == ["backbone", "head"]
    assert {id(p) for part in parts.values() for p in part.parameters()} == {id(p) for p in model.parameters()}
    with torch.no_grad():
        assert same(parts["backbone"](x).values(), model.backbone(x).values())


def test_a_model_that_traces_is_one_part() -> None:
    _, converted, _ = convert("residual")
    assert list(to_graphs(converted)) == [""]
