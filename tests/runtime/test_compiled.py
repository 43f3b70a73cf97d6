"""nmfx.compile: the same outputs as the model, whatever it is built of."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from outputs import right_or_refused
from pictures import labelled, lite0
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet

import nmfx
from nmfx.errors import ModelError, NmfxError
from nmfx.runtime.calls import steps_by_lanes
from nmfx.runtime.chain import Chain, link
from nmfx.runtime.compiled import CompiledModel, Lowered
from nmfx.runtime.kernel.library import NativeProgram, load_kernel
from nmfx.runtime.layers import DEPTHWISE, Depthwise, SparseConv2d, SparseLinear, sparse_layer
from nmfx.runtime.layout.tiles import FEW, TILES, Tile
from nmfx.runtime.lowering.exporting import Domain, copy_of, export
from nmfx.runtime.lowering.fusion import Sites, lower
from nmfx.runtime.measuring.choices import Choice, time_sites
from nmfx.runtime.measuring.timing import Times

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(quick_times: None) -> None:
    """Nothing here hangs on a clock."""


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, and batch norms that have seen something."""
    make = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=make)
            module.running_var.uniform_(0.5, 2.0, generator=make)
    return model.eval()


def all_sparse(model: nn.Module, x: Tensor, *, lanes: bool = False) -> CompiledModel:
    """Every site by the kernel, whatever is faster: what is tested must not hang on a clock."""
    return both_sparse(model, x, (lanes,))[0]


def both_sparse(model: nn.Module, x: Tensor, ways: tuple[bool, ...] = (False, True)) -> list[CompiledModel]:
    """The same without lanes and with them, of one export."""
    assert load_kernel() == ""
    plain = nmfx.bake(model).eval()
    graph, domain = export(plain, x)
    sites = lower(graph)
    return [_all_sparse(plain, copy_of(graph), domain, sites, len(x), lanes) for lanes in ways]


def _all_sparse(
    plain: nn.Module, graph: fx.GraphModule, domain: Domain, sites: Sites, batch: int, lanes: bool
) -> CompiledModel:
    choices = []
    for node, fused in sites:
        by_channel = lanes and fused.depthwise
        layer = Depthwise(fused, lanes=True) if by_channel else sparse_layer(fused, Tile(lanes=lanes))
        graph.add_submodule(str(node.target), layer)
        chosen = f"{DEPTHWISE}, lanes" if by_channel else str(Tile(lanes=lanes))
        choices.append(Choice(fused.name, tuple(fused.weight.shape), fused.kept, 0.0, 0.0, chosen))
    graph.recompile()
    return CompiledModel(Lowered(graph, domain, tuple(choices), batch), original=plain)


def by_lanes(compiled: CompiledModel) -> int:
    """Operators that work on lanes."""
    return sum(len(steps_by_lanes(module.graph)) for module in compiled.modules() if isinstance(module, Chain))


def linked_copy(compiled: CompiledModel, images: int = 0) -> CompiledModel:
    """The same by calls of chains, in passes of so many images."""
    graph = copy.deepcopy(compiled.graph)
    link(graph, images)
    original = compiled._original[0]
    return CompiledModel(Lowered(graph, compiled._first.domain, compiled.choices, compiled.batch, images), original=original)


def close(found: Tensor, wanted: Tensor) -> None:
    """Within fp32 of sums in another order."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


MODELS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(weights=None),
    "torchvision mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(weights=None),
    "torchvision googlenet": lambda: torchvision.models.googlenet(weights=None, init_weights=False),
    "torchvision regnet_x_400mf": lambda: torchvision.models.regnet_x_400mf(weights=None),
    "torchvision densenet121": lambda: torchvision.models.densenet121(weights=None),
    "timm efficientnet_lite0": lambda: timm.create_model("efficientnet_lite0"),
    "timm vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64),
    "timm convnext_atto": lambda: timm.create_model("convnext_atto"),
    "timm resnetv2_50x1 (standardised weights)": lambda: timm.create_model("resnetv2_50x1_bit", num_classes=10),
    "timm tf_efficientnet_lite0 (same padding)": lambda: timm.create_model("tf_efficientnet_lite0"),
    "timm swin_s3_tiny": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
    "timm mixer": lambda: timm.create_model("mixer_s32_224"),
}


LANES = (  # whose convolutions follow one another; ResNetV2's norms stand between all but those of its shortcuts
    "timm convnext_atto",
    "timm resnetv2_50x1 (standardised weights)",
    "torchvision resnet18",
    "torchvision mobilenet_v3_small",
    "torchvision googlenet",
    "torchvision regnet_x_400mf",
    "torchvision densenet121",
    "timm efficientnet_lite0",
    "timm tf_efficientnet_lite0 (same padding)",
)
SLOW = (  # like others, or large
    "torchvision densenet121",
    "timm resnetv2_50x1 (standardised weights)",
    "torchvision googlenet",
    "timm swin_s3_tiny",
    "timm efficientnet_lite0",
    "torchvision regnet_x_400mf",
    "timm mixer",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS])
def test_outputs_are_the_models(name: str) -> None:
    torch.manual_seed(0)
    model = settled(MODELS[name]())
    size = 224 if any(word in name for word in ("swin", "mixer")) else 64
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    scheme = nmfx.find_scheme(model, target=0.6, m=8, method="uniform", remainder="smaller", example_input=x).scheme
    converted = nmfx.transform(model, scheme, example_input=x)
    with torch.no_grad():
        wanted = converted(x)
        compiled, in_lanes = both_sparse(converted, x)
        found = compiled(x)
        close(found, wanted)
        for images in (0, 1):
            linked = linked_copy(compiled, images)
            assert torch.equal(linked(x), found)
            assert torch.equal(linked(x.flip(0)), found.flip(0))
            laid = linked_copy(in_lanes, images)
            close(laid(x), wanted)
            close(laid(x[:1]), wanted[:1])
            assert (by_lanes(laid) > 0) == (name in LANES)
    assert any(isinstance(module, SparseConv2d | SparseLinear) for module in compiled.modules())


def test_batch_norm_residual_and_clamp_are_fused() -> None:
    model = settled(torchvision.models.resnet50(weights=None))
    graph, domain = export(model, torch.zeros(2, 3, 64, 64))
    sites = lower(graph)
    kinds = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert domain.batches[0] != domain.batches[1]
    assert domain.apart
    assert len(sites) == 54
    assert [fused.residual for _, fused in sites].count(True) == 16
    assert [fused.low for _, fused in sites].count(0.0) == 49
    assert {torch.ops.nmfx.max_pool2d.default, torch.ops.nmfx.average.default} < set(kinds)
    assert len(kinds) == 3 + kinds.count(torch.ops.aten.sym_size.int)  # both poolings and a view
    names = dict(model.named_parameters())
    assert [fused.name for _, fused in sites] == [name for name in names if name.endswith("weight") and names[name].dim() > 1]


def test_compile_on_real_weights_and_pictures() -> None:
    model, x = lite0(), labelled()[0][:4, :, ::2, ::2]
    converted = nmfx.transform(model, nmfx.find_scheme(model, target=0.3, method="knapsack", example_input=x).scheme)
    compiled = nmfx.compile(converted, x, batch=2)
    with torch.no_grad():
        wanted = converted(x)
        close(compiled(x), wanted)
        close(compiled(x[:3]), wanted[:3])
        close(compiled(torch.cat([x, x[:1]])), torch.cat([wanted, wanted[:1]]))
    assert torch.equal(compiled(x).argmax(1), wanted.argmax(1))
    sparse = {name for name, parameter in nmfx.bake(converted).named_parameters() if (parameter == 0).float().mean() > 0.3}
    assert sparse <= {choice.name for choice in compiled.choices if choice.sparse is not None}


class Odd(nn.Module):
    """Shared weights, two outputs, a convolution whose result is used twice, dilation, groups and odd strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, (5, 3), (2, 1), (1, 2), bias=True)
        self.norm = nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 24, 3, 1, 2, dilation=2, groups=2)
        self.third = nn.Conv2d(24, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.first(x))
        y = self.second(x) + x  # x is used twice: its batch norm still folds, its clamp does not exist
        z = F.relu6(self.third(y) + self.third(y.flip(3)))
        y = self.third(z)
        return {"logits": self.head(z.mean((2, 3))), "again": self.head((y - y.relu()).mean((2, 3)))}


def test_awkward_modules() -> None:
    torch.manual_seed(0)
    model, x = settled(Odd()), torch.randn(3, 3, 17, 23)
    converted = nmfx.transform(model, {"second.weight": "1:4", "third.weight": "2:8", "head.weight": "1:4"}, example_input=x)
    with torch.no_grad():
        wanted, found = converted(x), all_sparse(converted, x)(x)
    assert found.keys() == wanted.keys()
    for key in wanted:
        close(found[key], wanted[key])


def test_outputs_of_any_kind_are_joined() -> None:
    class Several(Odd):
        def forward(self, x: Tensor) -> tuple[Tensor, None, dict[str, list[Tensor]]]:
            y = self.third(self.norm(self.first(x)))
            return y.mean((2, 3)), None, {"maps": [y, y + 1]}

    torch.manual_seed(0)
    model, x = settled(Several()), torch.randn(5, 3, 9, 9)
    compiled = nmfx.compile(model, x[:2], batch=2)
    with torch.no_grad():
        found, wanted = compiled(x), model(x)
    assert found[1] is None
    close(found[0], wanted[0])
    for one, other in zip(found[2]["maps"], wanted[2]["maps"], strict=True):
        close(one, other)


def test_the_model_is_left_alone_and_its_later_changes_are_its_own() -> None:
    torch.manual_seed(0)
    model, x = settled(Odd()).train(), torch.randn(3, 3, 17, 23)
    converted = nmfx.transform(model, {"third.weight": "2:8"}, example_input=x)
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    compiled = nmfx.compile(converted, x)
    assert converted.training
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())
    first = compiled(x)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert all(torch.equal(value, first[key]) for key, value in compiled(x).items())
    assert not compiled.train().training


def test_torch_compile_sees_the_operators() -> None:
    torch.manual_seed(0)
    model, x = settled(Odd()), torch.randn(3, 3, 17, 23)
    compiled = all_sparse(nmfx.transform(model, {"third.weight": "2:8"}, example_input=x), x)
    for graph in (compiled.graph, linked_copy(compiled).graph):
        again = torch.compile(graph, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            close(again(x)["logits"], compiled(x)["logits"])
        torch._dynamo.reset()


def test_residual_networks_are_one_chain() -> None:
    model, x = settled(ResNet(Bottleneck, [1, 2, 1, 1])), torch.randn(2, 3, 64, 64)
    linked = linked_copy(all_sparse(model, x))
    targets = [node.target for node in linked.graph.graph.nodes if node.op == "call_module"]
    assert targets == ["chain0"]
    assert linked(x[:0]).shape == (0, 1000)
    chain = linked.graph.chain0
    assert isinstance(chain, Chain)
    assert not any(isinstance(module, SparseConv2d) for name, module in linked.graph.named_children())


class Residuals(nn.Module):
    """Residuals that may be written over, and those that may not: the input itself, one read later, one that leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(32, 32, kernel, padding=kernel // 2) for kernel in (1, 3, 1, 3, 1, 1, 3)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b, c, d, e, f, g = self.convs
        first = (a(x) + x).relu()
        own = (c(first) + first).relu()
        later = (b(own) + own).relu()
        over = (d(later) + later).relu()
        apart = e(over) + over
        last = f(apart) + g(x)
        return last, apart, last.mean((2, 3))


def test_residuals_are_written_over_only_when_nobody_reads_them() -> None:
    torch.manual_seed(0)
    model, x = Residuals().eval(), torch.randn(3, 32, 13, 19)
    with torch.no_grad():
        wanted, compiled = model(x), all_sparse(model, x)
        plain = compiled(x)
        for images in (0, 1, 2):
            linked, before = linked_copy(compiled, images), x.clone()
            found, kept = linked(x), [one.clone() for one in linked(x)]
            linked(-x)  # results of a call outlive the next one
            assert torch.equal(x, before)
            for one, other, again, reference in zip(found, plain, kept, wanted, strict=True):
                assert torch.equal(one, other)
                assert torch.equal(one, again)
                close(one, reference)


def test_a_program_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RuntimeError, match="a program of this version"):
        NativeProgram(torch.tensor([1, 0, 1, 0, 99, 0, 0]), [], 1)([torch.zeros(1, 2)])
    with pytest.raises(RuntimeError, match="a program of int64"):
        NativeProgram(torch.zeros(3), [], 1)


def test_times_are_measured_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, _ = export(settled(Odd()), x := torch.randn(3, 3, 17, 23))
    sites, times = lower(graph), Times()
    first = time_sites(graph, sites, x, times)
    times.save()
    again = time_sites(graph, sites, x, Times())
    assert first == again
    Times().path.write_text("{")
    assert Times().known == {}


def test_without_a_kernel_it_is_right_and_says_so(tmp_path: Path) -> None:
    code = (
        "import pathlib, torch, nmfx\n"
        "from nmfx.runtime.kernel import library\n"
        f"library.FOLDER = pathlib.Path({str(tmp_path)!r})\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 8)).eval()\n"
        "x = torch.randn(1, 3, 10, 10)\n"
        "model = nmfx.transform(model, nmfx.find_scheme(model, target=0.5, example_input=x).scheme, example_input=x)\n"
        "compiled = nmfx.compile(model, x)\n"
        "assert torch.allclose(compiled(x), model(x), atol=1e-4)\n"
        "assert not any(choice.sparse for choice in compiled.choices)\n"
        "print(compiled.kernel)\n"
    )
    environment = os.environ | {"NMFX_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "install a wheel of nmfx that has one, or a C++ compiler" in run.stdout


def test_what_cannot_be_compiled() -> None:
    with pytest.raises(ModelError, match="expected a batch of pictures as a tensor, got dict"):
        nmfx.compile(Odd(), {})  # type: ignore[arg-type]

    class Branching(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) if x.sum() > 0 else self.first(-x)

    with pytest.raises(ModelError, match="Branching cannot be compiled: torch"):
        nmfx.compile(Branching(), torch.randn(2, 3, 9, 9))


def test_a_fixed_batch_size_is_said() -> None:
    class Fixed(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.norm(self.first(x))) + torch.ones(int(x.shape[0]), 1, 1, 1)

    model, x = settled(Fixed()), torch.randn(2, 3, 9, 9)
    compiled = nmfx.compile(model, x, shapes=0)
    with torch.no_grad():
        close(compiled(x), model(x))
    assert copy.deepcopy(compiled)(x).shape == compiled(x).shape
    assert compiled._first.domain.batches == (2, 2)
    with pytest.raises(NmfxError, match=r"sizes \(3, 9, 9\) in batches of 2, on cpu, got float32 \(3, 3, 9, 9\)"):
        compiled(torch.randn(3, 3, 9, 9))
    compiled = nmfx.compile(model, x)
    for count in (1, 2, 3, 4):
        with torch.no_grad():
            close(compiled(x := torch.randn(count, 3, 9, 9)), model(x))
    assert len(compiled.others) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_architectures_at_other_sizes_channels_and_batches(name: str) -> None:
    """Every site by the kernel, in chains by lanes, whatever is faster."""
    torch.manual_seed(0)
    size = 224 if any(word in name for word in ("swin", "mixer")) else 64
    model, x = settled(MODELS[name]()), torch.randn(2, 3, size, size)
    scheme = nmfx.find_scheme(model, target=0.6, m=8, method="uniform", remainder="smaller", example_input=x).scheme
    converted = nmfx.transform(model, scheme, example_input=x)
    compiled = linked_copy(all_sparse(converted, x, lanes=True))
    shapes = [(0, 3, size, size), (1, 3, size, size), (7, 3, size, size), (2, 1, size, size), (2, 4, size, size)]
    shapes += [(2, 3, 96, 96), (1, 3, 65, 72), (2, 3, 48, 80), (3, 3, 33, 34), (1, 3, 1, 1)]
    right = [shape for shape in shapes if right_or_refused(compiled, converted, torch.randn(shape))]
    assert shapes[1] in right
    assert shapes[2] in right


def test_tuning_quickly_or_fully_changes_no_outputs() -> None:
    assert FEW[True] <= set(TILES)
    assert FEW[False] <= {tile for tile in TILES if not tile.lanes}
    model, x = settled(Odd()), torch.randn(2, 3, 17, 23)
    quick, full = (nmfx.compile(model, x, tune=tune) for tune in ("quick", "full"))
    for one, other in zip(quick(x).values(), full(x).values(), strict=True):
        close(one, other)
    assert len(quick.choices) == len(full.choices)
    with pytest.raises(ModelError, match="expected tune='quick' or 'full', got 'best'"):
        nmfx.compile(model, x, tune="best")
