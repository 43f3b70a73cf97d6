"""Compiled models as files: the same outputs to the last bit, nothing to run in them, and one clear error for whatever is wrong."""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import nmfx
from nmfx.cli.main import main
from nmfx.errors import CheckpointError, NmfxError
from nmfx.files.sealed import read_sealed, write_sealed
from nmfx.runtime.chain import link
from nmfx.runtime.compiled import CompiledModel, Lowered
from nmfx.runtime.kernel.library import load_kernel, loaded
from nmfx.runtime.layers import Depthwise, sparse_layer
from nmfx.runtime.layout.tiles import Tile
from nmfx.runtime.lowering.exporting import export
from nmfx.runtime.lowering.fusion import lower
from nmfx.runtime.measuring.choices import Choice
from nmfx.runtime.saved.allowed import ATEN, is_functional, operator_named

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.fixture(autouse=True)
def quick(quick_times: None) -> None:
    """Nothing here hangs on a clock."""


def compiled(model: nn.Module, x: Tensor, *, lanes: bool = True, images: int = 0) -> CompiledModel:
    """Every site by the kernel, in chains, whatever is faster."""
    assert load_kernel() == ""
    graph, domain = export(model.eval(), x)
    choices = []
    for node, fused in lower(graph):
        tile = Tile(lanes=lanes)
        graph.add_submodule(str(node.target), Depthwise(fused, lanes=lanes) if fused.depthwise else sparse_layer(fused, tile))
        choices.append(Choice(fused.name, tuple(fused.weight.shape), fused.kept, 1e-3, 1e-3, str(tile)))
    graph.recompile()
    link(graph, images)
    return CompiledModel(Lowered(graph, domain, tuple(choices), len(x), images), original=model)


@torch.no_grad()
def thinned(model: nn.Module) -> nn.Module:
    """Most weights zero, so that files are small."""
    for value in model.parameters():
        value.mul_(torch.rand_like(value) < (0.1 if value.dim() > 1 else 1.0))
    return model


def parts(model: CompiledModel) -> list[str]:
    """Chains, and operators of layers, that a graph calls."""
    called = [model.graph.get_submodule(str(node.target)) for node in model.graph.graph.find_nodes(op="call_module")]
    return [getattr(one, "operator", type(one).__name__) for one in called]


class Small(nn.Module):
    """A stem, a residual, a depthwise convolution, a pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.one, self.by_channel, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 3, 1, 1)
        self.scale, self.head = nn.Parameter(torch.rand(3, 8).t()), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.two(self.by_channel(nn.functional.relu6(self.one(x)))).add(x).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        return self.head(nn.functional.hardswish(x.mean((2, 3)))) + self.scale.sum(1)[:4]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[CompiledModel, Tensor, Path]:
    x = torch.randn(2, 3, 16, 16)
    model = compiled(Small(), x)
    model.save(tmp_path / "small.nmfxc")
    return model, x, tmp_path / "small.nmfxc"


MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(weights=None),
    "mobilenet": lambda: timm.create_model("lcnet_035"),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2),
    "swin": lambda: SwinTransformer(56, embed_dim=24, depths=(2, 1), num_heads=(2, 2), num_classes=10),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_same_to_the_last_bit(name: str, tmp_path: Path) -> None:
    x, more = torch.randn(2, 3, 64, 64), torch.randn(5, 3, 64, 64)
    if name == "swin":
        x, more = x[..., :56, :56], more[..., :56, :56]
    for lanes in (False, True) if name == "resnet18" else (True,):
        model = compiled(thinned(MODELS[name]()), x.contiguous(), lanes=lanes, images=int(lanes))
        model.save(tmp_path / "file")
        loaded = nmfx.load_compiled(tmp_path / "file")
        assert parts(loaded) == parts(model)
        for pictures in (x, more):
            assert torch.equal(loaded(pictures), model(pictures))
        assert loaded.choices == model.choices
        assert (loaded.batch, loaded._first.images, loaded.machine) == (model.batch, model._first.images, model.machine)
        assert loaded._first.domain.apart == model._first.domain.apart


def test_a_compiled_model_says_what_it_is(saved: tuple[CompiledModel, Tensor, Path]) -> None:
    model, _, path = saved
    said = (
        "CompiledModel(12 operators, 5 of them sites, 5 of those sparse; float32 of sizes (3, 16, 16) in batches of {}; "
        f"passes of 2; kernel {loaded().name}; threads 1, ways chosen for 1)"
    )
    assert repr(model) == said.format("2 or more")
    assert repr(nmfx.load_compiled(path)) == said.format("2 to 4096")
    without = CompiledModel(model._first, kernel="none here")
    assert "; no kernel; " in repr(without)


def test_what_compile_gives_is_saved_and_saved_again(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = nmfx.compile(Small().to(memory_format=torch.channels_last).eval(), x)
    model.save(tmp_path / "one")
    loaded = nmfx.load_compiled(str(tmp_path / "one"))
    loaded.save(tmp_path / "two")
    for other in (loaded, nmfx.load_compiled(tmp_path / "two"), copy.deepcopy(loaded)):
        assert torch.equal(other(x), model(x))
        assert other.choices == model.choices
    with pytest.raises(NmfxError, match=r"compiled for float32 of sizes \(3, 16, 16\) in batches of 2 to 4096.*got .*17"):
        loaded(torch.randn(2, 3, 17, 16))
    with pytest.raises(NmfxError, match="got float64"):
        loaded(x.double())


class Thirds(nn.Module):
    """Branches on the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] % 3 == 0 else x + 1


def test_batches_are_those_that_the_graph_is_for(tmp_path: Path) -> None:
    model = nmfx.compile(nn.Sequential(nn.Conv2d(3, 4, 1), Thirds()).eval(), torch.randn(6, 3, 8, 8))
    model.save(tmp_path / "file")
    loaded = nmfx.load_compiled(tmp_path / "file")
    for size in (3, 6, 9, 300):
        x = torch.randn(size, 3, 8, 8)
        assert torch.equal(loaded(x), model(x))
    for size in (1, 4, 5000):
        with pytest.raises(NmfxError, match="compiled for"):
            loaded(torch.randn(size, 3, 8, 8))


class Trees(nn.Module):
    """Several outputs."""

    def forward(self, x: Tensor) -> Any:
        return OrderedDict(out=x.relu(), more=[x * 2, (x.sigmoid(), None)], last={"a": x.mean((2, 3))})


def test_outputs_stand_where_they_stood(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nmfx.compile(nn.Sequential(nn.Conv2d(3, 3, 1), Trees()).eval(), x)
    model.save(tmp_path / "file")
    found, wanted = nmfx.load_compiled(tmp_path / "file")(x), model(x)
    assert type(found) is type(wanted) is OrderedDict
    assert type(found["more"][1]) is tuple
    assert found["more"][1][1] is None
    for one, other in (
        (found["out"], wanted["out"]),
        (found["more"][0], wanted["more"][0]),
        (found["last"]["a"], wanted["last"]["a"]),
    ):
        assert torch.equal(one, other)


def test_nothing_is_unpickled(saved: tuple[CompiledModel, Tensor, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    model, x, path = saved
    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    assert torch.equal(nmfx.load_compiled(path)(x), model(x))


def test_it_needs_neither_timm_nor_torchvision_nor_a_compiler(saved: tuple[CompiledModel, Tensor, Path]) -> None:
    _, _, path = saved
    code = (
        "import sys, torch, nmfx\n"
        f"model = nmfx.load_compiled({str(path)!r})\n"
        "model(torch.zeros(2, 3, 16, 16))\n"
        "assert not model.kernel, model.kernel\n"
        "print([name for name in ('timm', 'torchvision', 'sympy', 'onnx') if name in sys.modules])\n"
    )
    there = {**os.environ, "CXX": "/nowhere/c++"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=there, timeout=600)
    assert done.stdout.strip() == "[]", done.stderr


def test_files_are_in_the_way_or_missing(saved: tuple[CompiledModel, Tensor, Path], tmp_path: Path) -> None:
    model, _, path = saved
    with pytest.raises(NmfxError, match="exists already"):
        model.save(path, force=False)
    before = path.read_bytes()
    model.save(path)
    assert path.read_bytes() == before
    with pytest.raises(NmfxError, match=f"{tmp_path}: cannot be written: a folder"):
        model.save(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        nmfx.load_compiled(tmp_path / "other.nmfxc")
    with pytest.raises(CheckpointError, match="not a regular file"):
        nmfx.load_compiled(tmp_path)
    with pytest.raises(CheckpointError, match=r"a compiled model, not a checkpoint; nmfx\.load_compiled"):
        nmfx.load_checkpoint(path)
    sparse = nmfx.transform(nn.Sequential(nn.Conv2d(4, 8, 1)), "2:4", example_input=torch.zeros(1, 4, 8, 8))
    nmfx.save_checkpoint(sparse, path)
    with pytest.raises(CheckpointError, match=r"not a compiled model, but another file of nmfx; nmfx\.load_checkpoint"):
        nmfx.load_compiled(path)


def test_other_operators_are_refused_by_name(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0(x)

    model = nmfx.compile(nn.Sequential(nn.Conv2d(3, 4, 1), Odd()).eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(CheckpointError, match=r"cannot be saved: its graph calls aten\.special_i0\.default"):
        model.save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_damage_is_noticed(saved: tuple[CompiledModel, Tensor, Path]) -> None:
    _, _, path = saved
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="altered since it was written"):
        nmfx.load_compiled(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        nmfx.load_compiled(path)
    path.write_bytes(whole.replace(b'\\"batch\\": 2', b'\\"batch\\": 3'))
    with pytest.raises(CheckpointError, match="altered since it was written"):
        nmfx.load_compiled(path)


def calls(content: dict[str, Any], operator: str) -> dict[str, Any]:
    """The node of a file that calls this operator."""
    return next(node for node in content["nodes"] if node.get("operator") == operator)


def layer(content: dict[str, Any], operator: str) -> dict[str, Any]:
    """The first layer by this operator."""
    return next(one for one in content["layers"] if one.get("operator") == operator)


def first(content: dict[str, Any], kind: str) -> dict[str, Any]:
    """The first node of a kind."""
    return next(node for node in content["nodes"] if node["is"] == kind)


# fmt: off
# ruff: noqa: E501 - a table
WRONG: dict[str, tuple[Change, str]] = {
    "version": (lambda c, t: c.update(version=2), "version 2"),
    "unknown key": (lambda c, t: c.update(code="x"), "unknown field `code`"),
    "operator of Python": (lambda c, t: calls(c, "aten.hardswish.default").update(operator="os.system"), "os.system is no operator"),
    "operator that writes": (lambda c, t: calls(c, "aten.hardswish.default").update(operator="aten.relu_.default"), "no operator"),
    "operator that reads files": (lambda c, t: calls(c, "aten.hardswish.default").update(operator="aten.from_file.default"), "no operator"),
    "operator by lanes": (lambda c, t: calls(c, "nmfx.average.default").update(operator="nmfx.rearrange.default"), "no operator"),
    "operator with weights": (lambda c, t: calls(c, "nmfx.average.default").update(operator="nmfx.sparse_linear.default"), "no operator"),
    "no argument": (lambda c, t: calls(c, "aten.hardswish.default").update(args=[]), "no argument self"),
    "another argument": (lambda c, t: calls(c, "aten.hardswish.default").update(kwargs={"out": 1}), "expected arguments self"),
    "twice": (lambda c, t: calls(c, "aten.hardswish.default").update(kwargs={"self": {"is": "node", "of": 0}}), "expected arguments self"),
    "wrong kind": (lambda c, t: calls(c, "aten.hardswish.default").update(args=["x"]), "self: expected Tensor, got 'x'"),
    "later node": (lambda c, t: calls(c, "aten.hardswish.default").update(args=[{"is": "node", "of": 99}]), "none before it"),
    "its own node": (lambda c, t: first(c, "site").update(inputs=[{"is": "node", "of": c["nodes"].index(first(c, "site"))}]), "none before it"),
    "two inputs": (lambda c, t: c["nodes"].append({"is": "input", "shape": None}), "expected one input"),
    "no outputs": (lambda c, t: c.update(outputs=None), "no outputs"),
    "layer that is missing": (lambda c, t: first(c, "site").update(layer=99), "layer 99 is missing"),
    "tensor that is missing": (lambda c, t: t.pop(next(iter(t))), "is missing"),
    "operator of a layer": (lambda c, t: layer(c, "sparse_conv2d").update(operator="rearrange"), "no operator of the kernel"),
    "option that is missing": (lambda c, t: layer(c, "sparse_conv2d")["options"].pop("groups"), "expected arguments"),
    "option of another kind": (lambda c, t: layer(c, "sparse_conv2d")["options"].update(groups=1.5), "groups: expected int"),
    "stride of zero": (lambda c, t: layer(c, "sparse_conv2d")["options"].update(stride=[0, 0]), "strides"),
    "kernel without end": (lambda c, t: layer(c, "sparse_conv2d")["options"].update(kernel=[1 << 30, 1 << 30]), "expected"),
    "chunk": (lambda c, t: layer(c, "sparse_conv2d")["options"].update(chunk=0), "chunks"),
    "tile": (lambda c, t: layer(c, "sparse_conv2d").update(lanes=[64, 99, False]), "tile"),
    "lanes": (lambda c, t: layer(c, "sparse_conv2d").update(lanes=True), "lanes"),
    "sizes": (lambda c, t: first(c, "input").update(shape=[-1, 3, 1 << 30, 1 << 30]), "too large"),
    "sizes of a batch": (lambda c, t: first(c, "input").update(shape=[-1, 3, -1, 16]), "only the first"),
    "sizes for a node": (lambda c, t: first(c, "input").update(shape=[-1, 4, 16, 16]), "pictures of the weight's channels"),
    "sizes without end": (lambda c, t: c["inputs"].update(shape=[2, 1 << 40, 1 << 40]), "is too large"),
    "dtype": (lambda c, t: c["inputs"].update(dtype="complex64"), "complex64"),
    "infinite choices": (lambda c, t: c.update(choices=[{}]), "choices"),
    "order": (lambda c, t: c["orders"].update({next(iter(t)): [5]}), "dimensions"),
}
# fmt: on


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_error_that_names_the_file(name: str, saved: tuple[CompiledModel, Tensor, Path]) -> None:
    _, _, path = saved
    content, tensors = read_sealed(path, "a compiled model", 1)
    change, said = WRONG[name]
    change(content, tensors)
    write_sealed(path, content, tensors)
    with pytest.raises(CheckpointError, match=r"small\.nmfxc") as error:
        nmfx.load_compiled(path)
    assert said in str(error.value), error.value


def test_packed_weights_are_looked_at_by_the_kernel(saved: tuple[CompiledModel, Tensor, Path]) -> None:
    _, x, path = saved
    content, tensors = read_sealed(path, "a compiled model", 1)
    name = next(one["tensors"]["columns"] for one in content["layers"] if one.get("operator") == "sparse_linear")
    tensors[name] = torch.full_like(tensors[name], 50)
    write_sealed(path, content, tensors)
    with pytest.raises(NmfxError, match=r"small\.nmfxc: .*columns"):
        nmfx.load_compiled(path)(x)


def test_sizes_are_not_computed_without_end(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0] * 4, 2, -1)

    x = torch.randn(2, 3, 4, 4)
    model = nmfx.compile(nn.Sequential(nn.Conv2d(3, 8, 1), Sized()).eval(), x)
    model.save(tmp_path / "file")
    assert torch.equal(nmfx.load_compiled(tmp_path / "file")(x), model(x))
    content, tensors = read_sealed(tmp_path / "file", "a compiled model", 1)
    calls(content, "mul")["args"][1] = 1 << 62
    write_sealed(tmp_path / "file", content, tensors)
    with pytest.raises(NmfxError, match="64 bits"):
        nmfx.load_compiled(tmp_path / "file")(x)


def test_statistics_of_other_channels_are_refused(tmp_path: Path) -> None:
    """PyTorch reads beyond them."""
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.BatchNorm2d(8)).eval()
    model = nmfx.compile(net, x)
    model.save(tmp_path / "file")
    assert torch.equal(nmfx.load_compiled(tmp_path / "file")(x), model(x))
    content, tensors = read_sealed(tmp_path / "file", "a compiled model", 1)
    tensors = {name: value[:0] if "running" in name else value for name, value in tensors.items()}
    write_sealed(tmp_path / "file", content, tensors)
    with pytest.raises(NmfxError, match="statistics of 8 channels"):
        nmfx.load_compiled(tmp_path / "file")(x)


def test_another_processor_is_warned_of(saved: tuple[CompiledModel, Tensor, Path], caplog: pytest.LogCaptureFixture) -> None:
    model, x, path = saved
    with caplog.at_level(logging.WARNING):
        nmfx.load_compiled(path)
    assert not caplog.records
    content, tensors = read_sealed(path, "a compiled model", 1)
    content["machine"].update(processor="model name : Another Processor; flags : none", vector=4)
    write_sealed(path, content, tensors)
    with caplog.at_level(logging.WARNING):
        loaded = nmfx.load_compiled(path)
    assert torch.equal(loaded(x), model(x))
    (record,) = caplog.records
    assert record.name.startswith("nmfx.runtime.saved")
    assert "was chosen on Another Processor (vectors of 4), this is" in record.getMessage()
    assert loaded.machine.vector == 4


@pytest.mark.parametrize("name", sorted(ATEN))
def test_allowed_operators_change_nothing(name: str) -> None:
    packet, overload = name.split(".")
    if not hasattr(getattr(torch.ops.aten, packet, None), overload):
        pytest.skip("of another PyTorch")
    _, operator = operator_named(f"aten.{name}")
    assert operator is not None
    assert is_functional(operator) or "dropout_p" in {argument.name for argument in operator._schema.arguments}
    assert not any(argument.alias_info and argument.alias_info.is_write for argument in operator._schema.arguments)
    assert not any(argument.name == "out" for argument in operator._schema.arguments)


def test_the_command_exports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "digits", "--pattern", "2:16"]) == 0
    assert main(["export", "--compiled"]) == 0
    assert "digits.nmfxc" in capsys.readouterr().out
    folder = Path("digits.nmfx/export")
    x = torch.rand(1, 1, 8, 8)
    found, wanted = nmfx.load_compiled(folder / "digits.nmfxc")(x), nmfx.load_checkpoint(folder / "digits.safetensors")(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert main(["inspect", str(folder / "digits.nmfxc")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "float32 1x8x8 in batches of 1" in said
    assert "chosen on: " in said
    for words in (["bench"], ["evaluate", "--data", "digits"], ["convert", "digits", "--force", "--weights"]):
        assert main([words[0], *words[1:], str(folder / "digits.nmfxc")]) == 1
        assert "a compiled model, not a checkpoint" in " ".join(capsys.readouterr().err.split())
    assert main(["export", "--compiled"]) == 1
    assert "exists already" in " ".join(capsys.readouterr().err.split())
    assert main(["export", "--compiled", "--force"]) == 0
    assert math.prod(found.shape) == 10
