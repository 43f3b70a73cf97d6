"""nmfx.compile(..., precision="int8"): integers bit for bit, near the float32 model, and plain about what it cannot."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from cases import cases
from pictures import calibration, labelled, lite0
from torch import Tensor, fx, nn
from torch.nn import functional as F

import nmfx
from nmfx.errors import ModelError, NmfxError
from nmfx.runtime.chain import Chain
from nmfx.runtime.compiled import CompiledModel
from nmfx.runtime.kernel import library
from nmfx.runtime.kernel.library import load_kernel
from nmfx.runtime.layers import KernelLayer
from nmfx.runtime.layout.blocks import HEIGHTS, block, check_blocks, row_sums, unblock
from nmfx.runtime.program import Program
from nmfx.runtime.quantized.layers import quantize_weight
from nmfx.runtime.quantized.ranges import Step, Values


@pytest.fixture(autouse=True)
def quick(quick_times: None) -> None:
    """Nothing here hangs on a clock."""


class Everything(nn.Module):
    """What a network in bytes is made of, and what has to stay float32 between."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.wide = nn.Conv2d(8, 24, 1)
        self.grouped, self.depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=4), nn.Conv2d(24, 24, 3, 2, 1, groups=24)
        self.narrow, self.shortcut = nn.Conv2d(24, 16, 1), nn.Conv2d(8, 16, 1, 2)
        self.dilated = nn.Conv2d(16, 16, 3, 1, 2, dilation=2)
        self.valid = nn.Conv2d(16, 12, 3)  # an output of another size: no window of planes
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.stem(x))))
        y = F.relu6(self.wide(x))
        y = self.narrow(F.relu(self.depthwise(F.relu(self.grouped(y)))))
        x = F.relu(y + self.shortcut(x))
        x = x + F.silu(self.dilated(x))  # a residual that skips what is computed in float32
        return self.head(F.hardswish(self.valid(x)).mean((2, 3)))


def settled(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def in_int8(model: nn.Module, x: Tensor, **how: Any) -> CompiledModel:
    assert load_kernel() == ""
    return nmfx.compile(model, x, precision="int8", **{"calibration": x, **how})


def chains(compiled: CompiledModel) -> list[Chain]:
    return [one for one in compiled.graph.modules() if isinstance(one, Chain)]


def chosen(compiled: CompiledModel) -> dict[str, str]:
    return {one.name: one.chosen for one in compiled.choices}


def plain(compiled: CompiledModel, x: Tensor) -> Tensor:
    """The outputs operator by operator in plain PyTorch, whose integers are float64."""
    for chain in chains(compiled):
        chain.program, kept = None, chain.program
        chain.__dict__["kept"] = kept
    found = compiled(x)
    for chain in chains(compiled):
        chain.program = chain.__dict__.pop("kept")
    return found


@pytest.mark.parametrize("size", [(32, 32), (61, 75), (224, 24)])
@torch.no_grad()
def test_the_kernel_equals_plain_integers_bit_for_bit(size: tuple[int, int]) -> None:
    model, x = settled(Everything()), torch.randn(3, 3, *size)
    compiled = in_int8(model, x)
    left = {name for name, how in chosen(compiled).items() if how != "int8"}
    assert left == {"valid.weight", "head.weight"}
    assert all(one.reason for one in compiled.choices if one.name in left)
    assert torch.equal(compiled(x), plain(compiled, x))
    assert compiled.agreement is not None
    assert compiled.agreement.difference < 0.03
    assert (compiled(x) - model(x)).norm() < 0.03 * model(x).norm()


@torch.no_grad()
def test_every_thread_and_pass_gives_the_same() -> None:
    model, x = settled(Everything()), torch.randn(5, 3, 40, 33)
    compiled = in_int8(model, x)
    wanted, threads = compiled(x), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.allclose(in_int8(model, x)(x), wanted, rtol=1e-4)  # the float32 parts may be computed otherwise
            assert torch.equal(compiled(x), wanted)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(compiled(torch.cat([x, x])), torch.cat([wanted, wanted]))
    assert torch.equal(compiled(x[:2]), wanted[:2])


@torch.no_grad()
def test_linear_layers_over_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 20), nn.ReLU()).eval()
    x = torch.randn(3, 37, 48)
    compiled = in_int8(model, x)
    assert set(chosen(compiled).values()) == {"int8"}
    assert torch.equal(compiled(x), plain(compiled, x))
    assert (compiled(x) - model(x)).norm() < 0.03 * model(x).norm()


@cases(["2:4", "2:16x4", "4:16x2", "1:8", "dense"], arg="pattern")
@torch.no_grad()
def test_patterns_keep_what_they_keep(pattern: str) -> None:
    model, x = settled(torchvision.models.resnet18(num_classes=7)), torch.randn(2, 3, 48, 48)
    if pattern != "dense":
        model = nmfx.transform(model, pattern, example_input=x)
    compiled = in_int8(model, x)
    assert torch.equal(compiled(x), plain(compiled, x))
    assert (compiled(x) - model(x)).norm() < 0.05 * model(x).norm()


@torch.no_grad()
def test_a_file_gives_the_same_and_holds_kept_weights_only(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 48, 48)
    model = nmfx.transform(settled(torchvision.models.resnet18(num_classes=7)), "2:16x4", example_input=x)
    compiled = in_int8(model, x)
    with pytest.raises(NmfxError, match=r"compile with an example of that size$"):
        compiled(torch.randn(2, 3, 64, 64))
    compiled.save(tmp_path / "one.nmfxc")
    loaded = nmfx.load_compiled(tmp_path / "one.nmfxc")
    assert torch.equal(loaded(x), compiled(x))
    kept = sum(one.kept for one in compiled.choices)
    assert (tmp_path / "one.nmfxc").stat().st_size < 2 * kept  # a byte for a weight, half a one for its column, the stem
    with pytest.raises(NmfxError, match="compile with an example of that size"):
        loaded(torch.randn(2, 3, 64, 64))


@torch.no_grad()
def test_real_weights_on_real_pictures() -> None:
    model, (x, labels) = lite0(), labelled()
    compiled = in_int8(model, x, calibration=calibration(4))
    assert [name for name, how in chosen(compiled).items() if how != "int8"] == ["classifier.weight"]
    found, wanted = compiled(x), model(x)
    assert (found.argmax(1) == wanted.argmax(1)).float().mean() >= 0.9
    assert (found.argmax(1) == labels).sum() >= (wanted.argmax(1) == labels).sum() - 1
    assert torch.equal(found, plain(compiled, x))


@torch.no_grad()
def test_sites_stay_float32_where_that_is_asked_for() -> None:
    model, x = settled(Everything()), torch.randn(2, 3, 32, 32)
    compiled = in_int8(model, x, float32=["stem.weight", "grouped.weight"])
    reasons = {one.name: one.reason for one in compiled.choices if one.chosen != "int8"}
    assert reasons["stem.weight"] == reasons["grouped.weight"] == "asked for"
    assert torch.equal(compiled(x), plain(compiled, x))
    everything = [one.name for one in compiled.choices]
    assert torch.allclose(in_int8(model, x, float32=everything)(x), model(x), atol=1e-5)
    with pytest.raises(ModelError, match=r"float32: nothing.weight is no site of this model, which has stem.weight"):
        in_int8(model, x, float32=["nothing.weight"])


def test_what_int8_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = settled(Everything()), torch.randn(2, 3, 32, 32)
    with pytest.raises(ModelError, match="needs calibration"):
        nmfx.compile(model, x, precision="int8")
    with pytest.raises(ModelError, match="expected precision='float32' or 'int8', got 'int4'"):
        nmfx.compile(model, x, precision="int4")
    with pytest.raises(
        ModelError, match=r"calibration: expected pictures of torch.float32 \(batch, 3, 32, 32\).*\(2, 3, 16, 16\)"
    ):
        in_int8(model, x, calibration=[torch.randn(2, 3, 16, 16)])
    with pytest.raises(ModelError, match="at least one batch of 2 pictures, as the example, got 1"):
        in_int8(model, x, calibration=x[:1])
    with pytest.raises(ModelError, match="finite pictures"):
        in_int8(model, x, calibration=x / 0)
    with pytest.raises(ModelError, match="calibration and float32 say nothing without precision='int8'"):
        nmfx.compile(model, x, calibration=x)
    monkeypatch.setattr(library, "_loaded", lambda: (None, "there is none"))
    with pytest.raises(ModelError, match="int8 needs the kernel: there is none"):
        nmfx.compile(model, x, precision="int8", calibration=x)


def test_calibration_takes_batches_with_labels() -> None:
    model, x = settled(Everything()), torch.randn(4, 3, 32, 32)
    batches = [(x[:3], torch.zeros(3)), [x[3:], None], x]
    one, other = in_int8(model, x[:2], calibration=batches), in_int8(model, x[:2], calibration=torch.cat([x, x]))
    assert torch.equal(one(x), other(x))


@torch.no_grad()
def test_constant_and_dead_activations() -> None:
    model = settled(Everything())
    model.wide.weight.data.zero_()  # type: ignore[union-attr, operator]
    model.wide.bias.data.fill_(-1.0)  # type: ignore[union-attr, operator]
    x = torch.zeros(2, 3, 32, 32)
    compiled = in_int8(model, x)
    assert torch.allclose(compiled(x), model(x), atol=0.05 * float(model(x).abs().max()))


@torch.no_grad()
def test_weights_by_output_channel() -> None:
    weight = torch.randn(6, 4, 3, 3) * torch.tensor([1e-6, 1.0, 1e3, 0.0, 5.0, 1e-30]).reshape(-1, 1, 1, 1)
    q, scales = quantize_weight(weight)
    assert q.dtype == torch.int8
    assert int(q.min()) >= -127
    back = q.double() * scales.reshape(-1, 1, 1, 1)
    assert bool(((back - weight).abs().flatten(1).amax(1) <= scales / 2 * (1 + 1e-9)).all())


def test_steps_hold_zero_exactly_and_ranges_are_of_least_error() -> None:
    for low, high in ((-1.0, 3.0), (0.0, 6.0), (2.0, 5.0), (-4.0, -1.0), (0.0, 0.0), (0.0, 1e-44)):
        step = Step.between(low, high)
        assert 0 <= step.zero <= 255
        assert step.byte(0.0) == step.zero
        assert bool(torch.tensor(1 / step.scale, dtype=torch.float32).isfinite())
    torch.manual_seed(0)
    x = torch.randn(20_000)
    x[0] = 200.0  # far out: a range of all values would have three steps for the rest
    values = Values()
    values.add(x)
    errors = {}
    for method in ("mse", "minmax"):
        step = values.step(method)
        errors[method] = float(
            (((x / step.scale).round() + step.zero).clamp(0, 255).sub(step.zero) * step.scale - x).square().sum()
        )
    assert errors["mse"] < errors["minmax"]


@pytest.mark.parametrize(("groups", "height"), list(itertools.product((1, 2, 6), HEIGHTS)))
def test_blocks_hold_every_weight_once(groups: int, height: int) -> None:
    torch.manual_seed(0)
    for density, inner, taps in itertools.product((0.0, 0.2, 1.0), (1, 5), (1, 9)):
        weight = torch.randint(-127, 128, (18, inner, taps)) * (torch.rand(18, inner, taps) < density)
        blocks = block(weight.to(torch.int8), groups, height)
        assert torch.equal(
            unblock(blocks.values, blocks.columns, blocks.blocks, height, weight.shape, groups), weight.to(torch.int8)
        )
        assert torch.equal(row_sums(blocks.values, blocks.blocks, height), weight.flatten(1).sum(1).int())
        check_blocks(blocks, 18, inner * taps, groups, True)
        for broken in ("rows", "columns", "starts"):
            table = blocks.blocks.clone()
            place = {"rows": 1, "columns": 3, "starts": 4}[broken]
            table[-1, place] += 1 << 20
            wrong = SimpleNamespace(**{**vars(blocks), "blocks": table})
            with pytest.raises(RuntimeError, match="expected blocks"):
                check_blocks(wrong, 18, inner * taps, groups, True)


def test_shared_columns_are_kept_once() -> None:
    weight = torch.randint(1, 127, (64, 48)).to(torch.int8)
    dense = block(weight)
    assert (dense.height, len(dense.columns)) == (4, 48)
    mask = torch.zeros(64, 48)
    mask[:, ::8] = 1
    assert block((weight * mask).to(torch.int8)).columns.shape == (8,)


@torch.no_grad()
def test_bytes_leave_and_enter_chains() -> None:
    """A program of part of a network, whose inputs and outputs are bytes."""
    torch.manual_seed(0)
    q, scales = quantize_weight(torch.randn(6, 4, 3, 3))
    blocks = block(q)
    options = {
        "out_channels": 6,
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "zero": 9,
    }
    options |= {"zero_out": 100, "residual_scale": 0.0, "low": 3, "high": 250, "height": blocks.height}
    tensors = {"values": blocks.values, "columns": blocks.columns, "blocks": blocks.blocks}
    tensors |= {"scales": (scales * 0.1).float(), "shifts": torch.randn(6)}
    root, graph = nn.Module(), fx.Graph()
    root.conv = KernelLayer("int8_conv2d", tensors, options)
    x = torch.randint(0, 256, (2, 4, 13, 9)).to(torch.uint8)
    given = graph.placeholder("x")
    made = graph.call_module("conv", (given,))
    graph.output(made)
    given.meta["val"], made.meta["val"] = x, root.conv(x)
    program = Program(fx.GraphModule(root, graph), threads=2).native()
    assert torch.equal(program([x])[0], root.conv(x))
