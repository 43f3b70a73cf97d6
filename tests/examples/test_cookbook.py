"""Laws of the cookbook: one run of each script, what it prints and what it leaves."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest
import torch
import torchvision

from nmfx import Scheme, bake, find_sites, load_checkpoint, load_compiled, scheme_of, transform, verify
from nmfx.demo.digits import load_demo
from nmfx.export.checkpoint import read_checkpoint
from nmfx.masking.sites import masked_sites

BUDGETS = ("params", "macs", "both")


def numbers(printed: str, head: str) -> list[float]:
    """The numbers behind the first line that begins with `head`; percentages and counts as they are written."""
    line = next(line for line in printed.splitlines() if line.startswith(head))
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", line[len(head) :])]


def test_own_loop_ends_with_the_score_it_saved(example, tmp_path):
    printed = example("own_loop.py", "--out", tmp_path)
    (dense, _), (tuned,) = numbers(printed, "dense:"), numbers(printed, "fine-tuned:")
    assert numbers(printed, "loaded:") == [tuned]
    assert "the same, bit for bit" in printed
    assert tuned >= max(90, dense - 4, *numbers(printed, "one-shot:"))

    sparse, sites, sparsity = numbers(printed, "scheme:")
    assert 0 < sparse < sites
    assert sparsity >= 75
    header, tensors = read_checkpoint(tmp_path / "sparse.safetensors")
    assert len(header.scheme) == sparse
    assert sum(t.numel() for name, t in tensors.items() if name.endswith(":values")) == numbers(printed, "verified:")[1]
    sizes = [(tmp_path / name).stat().st_size for name in ("sparse.safetensors", "dense.safetensors")]
    assert numbers(printed, "saved:") == sizes
    assert sizes[0] < sizes[1] / 2


def test_to_onnx_gives_what_torch_gives(example, tmp_path):
    import onnxruntime

    printed = example("to_onnx.py", "--out", tmp_path)
    model = bake(load_checkpoint(tmp_path / "digits.safetensors"))
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    assert numbers(printed, "zeros in weights:") == [zeros, zeros]
    assert zeros > 0.5 * sum(p.numel() for p in model.parameters())
    difference, largest = numbers(printed, "logits differ by")
    assert difference <= 1e-5 * largest
    torch_right, onnx_right, pictures = numbers(printed, "test digits read right:")
    assert torch_right == onnx_right >= 0.9 * pictures

    session = onnxruntime.InferenceSession(tmp_path / "digits.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)


def test_compiled_loads_as_it_was_saved(example, tmp_path):
    printed = example("compiled.py", "--out", tmp_path)
    model, loaded = load_demo(trained=True), load_compiled(tmp_path / "digits.nmfxc")
    assert printed.startswith(
        f"CompiledModel({numbers(printed, 'CompiledModel(')[0]:g} operators, {len(loaded.choices)} of them"
    )
    sites = {site.name for site in find_sites(model)}
    assert {choice.name for choice in loaded.choices} >= sites
    assert all(f"  {choice.name}: {choice.kept:,} weights, {choice.chosen}\n" in printed for choice in loaded.choices)
    kept = sum(choice.kept for choice in loaded.choices if choice.name in sites)
    assert kept <= 0.5 * sum(weight.numel() for name, weight in model.named_parameters() if name in sites)
    assert numbers(printed, "digits.nmfxc:") == [(tmp_path / "digits.nmfxc").stat().st_size]
    difference, largest = numbers(printed, "logits differ by")
    assert difference <= 1e-5 * largest
    assert "loaded: the same, bit for bit" in printed
    masked, compiled, pictures = numbers(printed, "test digits read right:")
    assert masked == compiled >= 0.9 * pictures


def test_mac_budget_holds_every_limit(example):
    printed = example("mac_budget.py")
    weights, macs = (dict(zip(BUDGETS, numbers(printed, f"all {unit}"), strict=True)) for unit in ("weights", "MACs"))
    assert max(weights["params"], weights["both"], macs["macs"], macs["both"]) <= 25
    assert min(weights["macs"], macs["params"]) > 25, "one limit does not imply the other"
    errors = {name: numbers(printed, f"budget {name} ")[0] for name in BUDGETS}
    assert errors["both"] == max(errors.values()), "two limits leave less choice than one"

    stages = [numbers(printed, f"{stage} ") for stage in ("conv1", "layer1", "layer2", "layer3", "layer4", "fc")]
    for column, totals in ((0, weights), (1, macs)):
        assert sum(stage[column] for stage in stages) == pytest.approx(100, abs=0.3), "shares, each rounded to 0.1"
        for budget, total in enumerate(totals.values(), start=2):
            assert sum(stage[column] * stage[budget] / 100 for stage in stages) == pytest.approx(total, abs=0.3)


def test_replay_comes_to_the_published_totals(example, tmp_path):
    printed = example("replay_scheme.py", "--out", tmp_path)
    assert printed.count("as published") == 4
    assert "published:" not in printed

    model = torchvision.models.resnet50()
    sites = find_sites(model)
    scheme = Scheme.load(tmp_path / "resnet50.yaml", sites)
    assert scheme.layout == "flat"
    for name, count in asdict(scheme.totals(sites)).items():
        assert numbers(printed, f"{name} ") == [count]

    sparse, dense = load_checkpoint(tmp_path / "sparse.safetensors"), load_checkpoint(tmp_path / "dense.safetensors")
    assert scheme_of(sparse).patterns == scheme.patterns
    assert numbers(printed, "verified:") == [verify(sparse).groups, len(scheme)]
    strict = transform(dense, Scheme(scheme.patterns), sites=sites)  # every masked width divides by 16
    for ours, theirs in zip(masked_sites(sparse), masked_sites(strict), strict=True):
        assert torch.equal(ours.mask, theirs.mask), ours.spec.name
    sizes = [(tmp_path / name).stat().st_size for name in ("sparse.safetensors", "dense.safetensors")]
    assert numbers(printed, "checkpoint:")[:2] == sizes
    assert sizes[0] < 0.25 * sizes[1]
