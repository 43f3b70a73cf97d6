"""Laws of ONNX files: names, free sizes, opset, weights beside the file, zeros that stay, outputs as PyTorch's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nmfx.errors import CheckpointError
from nmfx.export import onnx as saving
from nmfx.export.onnx import save_onnx
from nmfx.models.example import Example
from nmfx.passes.baking import bake
from nmfx.passes.transform import transform

SEED = 0


class Small(nn.Module):
    """Convolutions of any size, a linear layer: what a classifier is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.norm(self.conv1(x)).relu()).relu()
        return self.fc(x.mean((2, 3)))


class OneSize(nn.Module):
    """The linear layer fixes the size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


class Two(nn.Module):
    """Two inputs, outputs with names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"near": self.fc(left) + right, "far": self.fc(right)}


X = Example((torch.zeros(1, 4, 8, 8),))


def sparse(pattern: str = "2:4") -> nn.Module:
    torch.manual_seed(SEED)
    model = Small().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
    return bake(transform(model, pattern, example_input=X.args[0]))


def dims(values: Any) -> dict[str, list[Any]]:
    return {v.name: [dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in values}


def run(path: Path, **inputs: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


@pytest.mark.parametrize("free_size", [False, True])
def test_inputs_outputs_and_free_sizes_have_names(free_size: bool, tmp_path: Path) -> None:
    model, path = sparse(), tmp_path / "a.onnx"
    save_onnx(model, path, X, free_size=free_size)
    graph = onnx.load(path).graph
    assert dims(graph.input) == {"input": ["batch", 4, "height", "width"] if free_size else ["batch", 4, 8, 8]}
    assert dims(graph.output) == {"output": ["batch", 10]}
    for size in [(3, 4, 12, 20), (1, 4, 9, 8)] if free_size else [(1, 4, 8, 8), (5, 4, 8, 8)]:
        x = torch.randn(size)
        with torch.no_grad():
            np.testing.assert_allclose(run(path, input=x)[0], model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_several_inputs_and_outputs_have_those_of_the_forward_pass(tmp_path: Path) -> None:
    model, path = Two().eval(), tmp_path / "two.onnx"
    save_onnx(model, path, Example((torch.zeros(1, 8), torch.zeros(1, 8))))
    graph = onnx.load(path).graph
    assert dims(graph.input) == {"left": ["batch", 8], "right": ["batch", 8]}
    assert list(dims(graph.output)) == ["near", "far"]
    left, right = torch.randn(2, 3, 8)
    with torch.no_grad():
        for found, wanted in zip(run(path, left=left, right=right), model(left, right).values(), strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_one_size_is_not_called_free(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"OneSize takes inputs of one size only; leave --free-size out"):
        save_onnx(OneSize().eval(), tmp_path / "a.onnx", X, free_size=True)
    assert not list(tmp_path.iterdir())


def test_an_opset_is_kept_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    save_onnx(sparse(), path, X, opset=19)
    assert [one.version for one in onnx.load(path).opset_import if not one.domain] == [19]
    with pytest.raises(CheckpointError, match=r"Small cannot be said in ONNX opset 8, \d+ is the nearest"):
        save_onnx(sparse(), tmp_path / "b.onnx", X, opset=8)
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_large_weights_go_to_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "LARGEST", 10_000)
    model, path = sparse(), tmp_path / "a.onnx"
    save_onnx(model, path, X)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    assert path.stat().st_size < 20_000 < (tmp_path / "a.onnx.data").stat().st_size
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        np.testing.assert_allclose(run(path, input=x)[0], model(x).numpy(), rtol=1e-4, atol=1e-5)


def weights(path: Path) -> dict[str, np.ndarray]:
    """What convolutions and products read as weights, outputs first, by the node that reads them."""
    graph = onnx.load(path).graph
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    found = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        name = node.input[1]
        if name not in stored and made[name].op_type == "DequantizeLinear":
            name = made[name].input[0]
        weight = stored[name]
        flipped = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not any(one.name == "transB" and one.i for one in node.attribute)
        )
        found[node.name] = weight.T if flipped else weight
    return found


def two_of_four(weight: np.ndarray) -> bool:
    """TensorRT's own rule: for each output and kernel position, at most two of every four input channels."""
    kept = np.moveaxis(weight != 0, 1, -1)
    return bool((kept.reshape(-1, kept.shape[-1] // 4, 4).sum(-1) <= 2).all())


def test_zeros_are_exact(tmp_path: Path) -> None:
    model, path = sparse(), tmp_path / "a.onnx"
    save_onnx(model, path, X)
    found = weights(path)
    assert len(found) == 3
    assert all(map(two_of_four, found.values()))
    zeros = sum(int((weight == 0).sum()) for weight in found.values())
    assert zeros == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1) > 0


def quantised(path: Path) -> Path:
    """The file in int8 by ONNX Runtime, per channel, as QDQ."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        left = 4

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.left -= 1
            return {"input": torch.randn(2, 4, 8, 8).numpy()} if self.left >= 0 else None

    small = path.with_name("int8.onnx")
    quantize_static(
        path, small, Batches(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    return small


@pytest.mark.filterwarnings("ignore")
def test_two_of_four_survives_int8(tmp_path: Path) -> None:
    model, path = sparse(), tmp_path / "a.onnx"
    save_onnx(model, path, X)
    small = quantised(path)
    found = weights(small)
    assert len(found) == 3
    for weight in found.values():
        assert weight.dtype == np.int8
        assert two_of_four(weight)
    x = torch.randn(64, 4, 8, 8)
    with torch.no_grad():
        wanted = model(x).numpy()
    assert np.abs(run(small, input=x)[0] - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.parametrize("free_size", [False, True])
def test_openvino_gives_what_torch_gives(free_size: bool, tmp_path: Path) -> None:
    import openvino

    model, path = sparse(), tmp_path / "a.onnx"
    save_onnx(model, path, X, free_size=free_size)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in [(3, 4, 12, 20), (1, 4, 8, 8)] if free_size else [(1, 4, 8, 8), (5, 4, 8, 8)]:
        x = torch.randn(size)
        with torch.no_grad():
            np.testing.assert_allclose(compiled(x.numpy())["output"], model(x).numpy(), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_followed_is_said(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CheckpointError, match=r"Branches cannot be exported to ONNX"):
        save_onnx(Branches().eval(), tmp_path / "a.onnx", X)
