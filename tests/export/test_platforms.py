"""Platforms: what their entries say, what contradicts them, and what the platforms' own tools make of an export."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tflite import one_layer
from torch import nn

from nmfx.demo.digits import load_demo
from nmfx.errors import NmfxError
from nmfx.models.census import find_sites
from nmfx.models.site import Site
from nmfx.passes.transform import transform
from nmfx.scheme import Scheme
from nmfx.settings.choices import Choices
from nmfx.settings.formats import FORMATS
from nmfx.settings.option import section
from nmfx.settings.platforms import PLATFORMS
from nmfx.settings.reference import MARK, PLACES, platforms
from nmfx.settings.search import SearchSettings
from nmfx.settings.stages import ExportSettings
from nmfx.sparsity.pattern import Pattern
from nmfx.stages.runs import runs_on

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


class Layers(nn.Module):
    """One of each kind: what platforms tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = nn.Conv2d(32, 64, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.grouped = nn.Conv2d(64, 60, 1, groups=4)
        self.up = nn.ConvTranspose2d(60, 64, 2, stride=2)
        self.fc = nn.Linear(64, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.grouped(self.depthwise(self.conv(self.stem(x)))))
        return self.head(self.fc(x.mean((2, 3))))


def sites() -> dict[str, Site]:
    found = find_sites(Layers(), torch.empty(1, 3, 8, 8))
    return {site.name.removesuffix(".weight"): site for site in found}


REASONS = {  # by platform: sites that never run sparse, and a word of the reason
    "nmfx": {},
    "tensorrt": {"stem": "in=3", "depthwise": "one input channel", "up": "conv_transpose2d"},
    "ethos-u85": {"depthwise": "one input channel", "up": "conv_transpose2d"},
    "coreml": {"depthwise": "one input channel"},
    "openvino": dict.fromkeys(("stem", "conv", "depthwise", "grouped", "up"), "only matrix products") | {"head": "out=10"},
    "onnxruntime": dict.fromkeys(("stem", "conv", "depthwise", "grouped", "up", "fc", "head"), "no sparse kernels"),
}


@pytest.mark.parametrize("name", PLATFORMS)
def test_what_no_pattern_makes_faster(name: str) -> None:
    found = {site: why for site, one in sites().items() if (why := PLATFORMS[name].runs(one))}
    assert found.keys() == REASONS[name].keys()
    for site, word in REASONS[name].items():
        assert word in found[site], site


@pytest.mark.parametrize(
    ("name", "gains", "gains_nothing"),
    [
        ("tensorrt", ["2:4", "1:4", "1:2", "2:8", "1:16", "2:16", "2:4x4"], ["4:16", "3:4", "2:6", "1:3", "8:16"]),
        ("ethos-u85", ["2:4", "1:4", "2:16"], ["4:16", "3:4"]),
        ("coreml", ["1:4", "2:4", "2:16", "8:16", "1:2"], ["3:4", "2:32", "1:3", "9:16"]),
        ("openvino", ["1:4", "2:16", "7:16"], ["2:4", "3:4", "8:16"]),
    ],
)
def test_patterns_that_gain(name: str, gains: list[str], gains_nothing: list[str]) -> None:
    takes = PLATFORMS[name].takes
    assert [one for one in gains + gains_nothing if not takes(Pattern(one))] == gains


def test_every_entry_is_whole() -> None:
    for name, one in PLATFORMS.items():
        assert one.format in FORMATS, name
        assert one.sources, name
        assert all(map(Pattern, one.patterns)), name
        assert not any(one.takes(Pattern(pattern)) for pattern in one.patterns), name
    assert PLACES.read_text().partition(MARK)[:2] == (platforms().removesuffix(MARK), MARK), (
        "python -m nmfx.settings.reference writes it"
    )


@pytest.mark.parametrize(
    ("tree", "error"),
    [
        ({"platform": "tensorrt", "m": "16"}, "'platform' tensorrt: 4:16 may keep more than 2 of 4.*leave 'm' out"),
        ({"platform": "tensorrt", "patterns": ["2:4", "3:4"]}, "3:4 may keep more than 2 of 4.*leave 'patterns' out"),
        ({"platform": "coreml", "m": "32"}, "1:32: M has to be a factor of 16"),
        ({"platform": "openvino", "patterns": ["2:4"]}, "more than half of the weights have to be zeros"),
        ({"platform": "ethos-u85", "layout": "flat"}, "whole groups within one row.*leave 'layout' at strict"),
        ({"platform": "tensorrt", "remainder": "short"}, "leave 'remainder' at dense"),
        ({"platform": "tensorrt", "target_latency": "2x"}, "times are those of nmfx's own runtime"),
        ({"platform": "tensort"}, "expected one of nmfx, .* found 'tensort' .did you mean 'tensorrt'"),
        ({"platform": "tensorrt", "pattern": "2:4"}, "'platform' says nothing beside 'pattern'"),
    ],
)
def test_what_contradicts_a_platform(tree: dict[str, object], error: str) -> None:
    with pytest.raises(NmfxError, match=error):
        section(tree, SearchSettings, "f.yaml")


def test_python_is_told_too() -> None:
    for cls in (SearchSettings, ExportSettings):
        with pytest.raises(NmfxError, match=r"unknown platform 'tensort' .did you mean 'tensorrt'"):
            cls(platform="tensort")


def test_patterns_of_a_platform_are_offered() -> None:
    assert SearchSettings(platform="tensorrt").choices_there.patterns == (Pattern("2:4"),)
    assert SearchSettings(platform="ethos-u85", choices=Choices(vector=4)).choices_there.patterns == (Pattern("2:4x4"),)
    assert SearchSettings(platform="tensorrt", choices=Choices(patterns=("1:4",))).choices_there.patterns == ("1:4",)
    for name in (None, "nmfx", "coreml"):
        assert SearchSettings(platform=name).choices_there == Choices()


def test_groups_of_another_layout_do_not_run() -> None:
    """A published scheme may cut groups across rows: no platform but ours reads those."""
    found = find_sites(Layers(), torch.empty(1, 3, 8, 8))
    flat = Scheme({"stem.weight": "2:4", "conv.weight": "2:4"}, layout="flat")
    said = {run.site: run.why for run in runs_on("ethos-u85", found, flat, Path()).sites if not run.sparse}
    assert said["stem.weight"] == "groups of 4 cross rows of 3"
    assert "conv.weight" not in said


def test_search_and_export_for_a_platform(nmfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")  # all columns
    out = nmfx("search", "--for", "tensorrt")
    assert "TensorRT on NVIDIA GPUs" in out
    assert "gains nothing on tensorrt: one input channel: stem.conv.weight" in out
    assert "nmfx export digits.nmfx --for tensorrt" in out
    scheme = Scheme.load("digits.nmfx/scheme.yaml", find_sites(load_demo(trained=True)))
    assert set(scheme.values()) == {Pattern("2:4")}
    assert len(scheme) == 5
    out = nmfx("export", "--for", "tensorrt")
    assert "5 of 6 sites run sparse; rule only" in out
    assert re.search(r"stem\.conv\.weight +16x1x3x3 +dense +dense +dense in the scheme \(one input channel\)", out)
    assert re.search(r"classifier\.weight +10x64 +2:4 +sparse +10 channels do not divide by 16", out)
    assert Path("digits.nmfx/export/digits.onnx").is_file()
    found = json.loads(nmfx("export", "--for", "onnxruntime", "--force", "--json"))
    assert [run["sparse"] for run in found["runs"]["sites"]] == [False] * 6
    assert {one["kind"] for one in found["files"]} == {"scheme", "published", "checkpoint", "onnx"}
    assert "nothing of DigitsNet runs faster sparse there" in nmfx("search", "--for", "onnxruntime", "--force", fails=True)


def test_a_recipe_is_for_a_platform(nmfx: Run) -> None:
    recipe = "model: {name: digits}\nsearch: {platform: tensorrt}\nexport: {platform: tensorrt, opset: 19}\n"
    Path("mine.yaml").write_text(recipe)
    out = nmfx("run", "mine.yaml")
    assert "tensor cores (Ampere and later): 5 of 6 sites run sparse" in out
    assert Path("mine.nmfx/export/digits.onnx").is_file()
    assert nmfx("run", "mine.yaml").count("skipped") == 3
    Path("mine.yaml").write_text(recipe.replace("opset: 19", "opset: 20"))
    out = nmfx("run", "mine.yaml")
    assert out.count("skipped") == 2
    assert "changed: opset 19 -> 20" in out
    Path("mine.yaml").write_text(recipe.replace("search: {platform: tensorrt", "search: {platform: tensorrt, m: 16"))
    assert "mine.yaml: search: 'platform' tensorrt: 4:16 may keep" in nmfx("run", "mine.yaml", fails=True)


def test_our_own_runtime_says_what_it_measured(nmfx: Run) -> None:
    nmfx("convert", "digits", "--pattern", "2:16")
    found = json.loads(nmfx("export", "--for", "nmfx", "--json"))["runs"]
    assert found["checked"].startswith("measured")
    assert {run["site"] for run in found["sites"] if run["pattern"] == "2:16"} >= {"block3.conv.weight"}
    for run in found["sites"]:
        assert run["sparse"] == run["why"].startswith("sparse"), run


@pytest.mark.skipif(importlib.util.find_spec("ethosu") is None, reason="ethos-u-vela is not installed")
@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (64, 32, 1, 1), (512, 256)], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:16", "4:16", "dense"])
def test_vela_compiles_what_we_call_sparse(shape: tuple[int, ...], pattern: str, tmp_path: Path) -> None:
    """Arm's compiler on weights of the pattern, in int8: it writes sparse weights where we say so."""
    torch.manual_seed(0)
    layer = nn.Conv2d(shape[1], shape[0], shape[2:]) if len(shape) == 4 else nn.Linear(shape[1], shape[0])
    with torch.no_grad():  # no kept weight is rounded to zero: those would make more patterns sparse than the mask
        layer.weight.copy_(torch.where(layer.weight < 0, -1, 1) * (0.5 + torch.rand(shape)))
    x = torch.empty(1, shape[1], 8, 8) if len(shape) == 4 else torch.empty(1, shape[1])
    model = nn.Sequential(layer)
    masked = model if pattern == "dense" else transform(model, pattern, example_input=x)
    weight = (masked[0].weight.detach() * 80).round().clamp(-127, 127).to(torch.int8).numpy()
    (tmp_path / "one.tflite").write_bytes(one_layer(weight))
    options = ["--accelerator-config", "ethos-u85-256", "--verbose-register-command-stream", "--output-dir", str(tmp_path)]
    command = [sys.executable, "-m", "ethosu.vela", str(tmp_path / "one.tflite"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = set(re.findall(r"weight_sparsity = (\w+)", done.stdout))
    says = pattern != "dense" and not PLATFORMS["ethos-u85"].takes(Pattern(pattern))
    assert found == {"WEIGHT_SPARSITY_SPARSE_2_4" if says else "WEIGHT_SPARSITY_NONE"}


@pytest.mark.skipif(importlib.util.find_spec("coremltools") is None, reason="coremltools is not installed")
def test_core_ml_stores_what_we_call_sparse(nmfx: Run) -> None:
    """The lines of docs/platforms.md, run: every sparse site becomes a sparse constant of Core ML."""
    nmfx("convert", "digits", "--pattern", "4:16")
    nmfx("export")
    (code,) = re.findall(r"```python\n(.*?)```", PLACES.read_text(), re.S)
    code += """
operations = [
    one
    for function in sparse.get_spec().mlProgram.functions.values()
    for block in function.block_specializations.values()
    for one in block.operations
]
found = [one.outputs[0].type.tensorType.dimensions for one in operations if one.type == "constexpr_sparse_to_dense"]
print("shapes", sorted([size.constant.size for size in sizes] for sizes in found))
"""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], env={**clean, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = [[32, 16, 3, 3], [32, 32, 3, 3], [64, 32, 3, 3], [64, 64, 1, 1], [10, 64]]
    assert f"shapes {sorted(wanted)}" in done.stdout
    assert Path("digits.mlpackage").is_dir()
