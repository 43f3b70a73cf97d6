"""nmfx bench, and nmfx search --target-latency: what they say and write. Which numbers come out is the machine's business."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nmfx as library
from nmfx.cli.main import main
from nmfx.data.source import open_data
from nmfx.demo.digits import load_demo
from nmfx.errors import NmfxError
from nmfx.runtime.measuring import latency
from nmfx.runtime.measuring.latency import Latency, measure_latency
from nmfx.search.problem import make_problem
from nmfx.sparsity.pattern import Pattern

Run = Callable[..., tuple[str, str]]
pytestmark = pytest.mark.usefixtures("quick_times")


@pytest.fixture
def nmfx(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; its output and its complaints."""

    def run(*argv: str, fails: bool = False) -> tuple[str, str]:
        assert main(argv) == int(fails), capsys.readouterr().err
        found = capsys.readouterr()
        return found.out, found.err

    return run


@pytest.fixture
def work(nmfx: Run) -> Path:
    """A work directory of the demo network with a scheme."""
    nmfx("convert", "digits")
    nmfx("search", "--target", "0.75")
    return Path("digits.nmfx")


def test_bench_of_a_work_directory_and_of_a_checkpoint(work: Path, nmfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmfx.runtime.measuring.bench.TURN", 0.0)
    monkeypatch.setattr("nmfx.runtime.measuring.bench.SETTLE", 0.0)
    freeze = latency.compile_frozen  # half a minute of compiling: once
    monkeypatch.setattr(latency, "compile_frozen", lambda model, x: freeze(model, x) if len(x) == 1 else model)
    engines_of = ("--engines", "onnxruntime,onnxruntime-int8")
    argv = ("--turns", "1", "--batch", "1,2", "--threads", "1", "--sites", "--figure", "speed.png", *engines_of)
    out, _ = nmfx("bench", str(work), *argv)
    rows = {match[1]: match[2] for match in re.finditer(r"^(\S[^(\n]*?)  +(\S.*)$", out, re.M)}
    engines = ["PyTorch", "PyTorch, channels last", "torch.compile, frozen", "ONNX Runtime", "ONNX Runtime, int8"]
    engines += ["masked, eager", "nmfx"]
    assert [name for name in rows if name in engines] == engines
    assert len(re.findall(r"\d+\.\d\dx", rows["nmfx, times best fp32"])) == 2
    assert len(re.findall(r"\d+\.\d\dx", rows["nmfx, times best int8"])) == 2
    difference = re.search(r"differ from the masked model's by (\S+) of", out)
    assert difference is not None
    assert float(difference[1]) < 1e-5
    assert {site.name for site in library.find_sites(load_demo(trained=True), torch.zeros(1, 1, 8, 8))} <= set(
        re.findall(r"^(\S+\.weight) ", out, re.M)
    )
    assert Path("speed.png").stat().st_size > 10_000
    nmfx("export")
    monkeypatch.setattr(latency, "compile_frozen", lambda model, x: None)
    out, _ = nmfx("bench", "digits.nmfx/export/digits.safetensors", "--turns", "1", "--batch", "1", "--threads", "1",
                  "--engines", "openvino-int8", "--tune", "full")  # fmt: skip
    assert "batch 1, 1 thread" in out
    assert "OpenVINO, int8" in out


def test_search_for_a_latency(nmfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_baseline(*args: Any, **kwargs: Any) -> Latency:  # a busy machine must not decide whether the target is in reach
        found = measure_latency(*args, **kwargs)
        return dataclasses.replace(found, baseline=40 * found.dense, run=None)

    monkeypatch.setattr("nmfx.stages.latency.measure_latency", slow_baseline)
    monkeypatch.setattr("nmfx.runtime.measuring.latency.compile_frozen", lambda model, example: None)  # seconds; bench has it
    nmfx("convert", "digits")
    out, _ = nmfx("search", "--target-latency", "2x", "--m", "8", "--latency-batch", "2")
    found = re.search(r"latency: (\S+) ms the best dense run, (\S+) ms wanted, (\S+) ms predicted, (\S+) ms measured", out)
    assert found is not None
    dense, wanted, *_ = map(float, found.groups())
    assert wanted <= dense
    assert "budget: latency" in Path("digits.nmfx/scheme.yaml").read_text()
    monkeypatch.setattr("nmfx.stages.latency.measured_seconds", lambda *args: 1.0)  # a second: no scheme will do
    _, err = nmfx("search", "--target-latency", "2x", "--force", fails=True)
    assert re.search(r"out of reach: with the sparsest patterns it takes 1e\+03 ms, 0.00x", err)


@pytest.mark.parametrize("command", ["bench", "search"])
def test_a_missing_kernel_is_said_in_one_line(command: str, nmfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise NmfxError("far enough")

    monkeypatch.setattr("nmfx.cli.common.load_kernel", lambda: "no C++ compiler (c++): install one, such as g++")
    monkeypatch.setattr("nmfx.stages.bench.bench", stop)
    monkeypatch.setattr("nmfx.stages.latency.measure_latency", stop)
    nmfx("convert", "digits", "--pattern", "2:4")
    argv = ["digits.nmfx", "--batch", "1"] if command == "bench" else ["--target-latency", "2x", "--m", "4", "--force"]
    _, err = nmfx(command, *argv, fails=True)
    said = "warning: no sparse kernel, so nothing gets faster than dense: no C++ compiler (c++): install one, such as g++"
    assert said in err.splitlines()


def test_prices_never_rise_as_weights_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmfx.runtime.measuring.latency.compile_frozen", lambda model, example: None)
    model, data = load_demo(trained=True), open_data("digits")
    x = torch.as_tensor(data.train.pictures[:2]).float().reshape(2, 1, 8, 8)
    sites = library.find_sites(model, x)
    problem = make_problem(sites, target=0.0, m=16)
    offered = {s.name: {p: problem.grouping(i, p) for p in problem.options[i]} for i, s in enumerate(sites)}
    found = measure_latency(model, offered, x)
    assert found.prices.keys() == {site.name for site in sites}
    assert found.predict({}) > 0
    assert found.baseline > 0
    for price in found.prices.values():  # of one M and V
        ordered = [price[p] for p in sorted(price, key=lambda p: p.density)]
        assert ordered == sorted(ordered)
    everything = {name: min(price, key=lambda p: p.density) for name, price in found.prices.items()}
    assert found.predict(everything) <= found.predict({}) == pytest.approx((found.dense + found.rest) / 1e9)
    assert found.adjusted(1.0, everything).predict(everything) == pytest.approx(1.0)
    assert Pattern.DENSE in next(iter(found.prices.values()))


def test_a_price_follows_from_no_pattern_of_another_v(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = {"8:16": 20, "2:16": 8, "1:16": 9, "8:16x4": 6, "2:16x4": 2, "1:16x4": 3}
    expected = {"8:16": 10, "2:16": 8, "1:16": 8, "8:16x4": 6, "2:16x4": 2, "1:16x4": 2}  # dense, or a denser one of that V
    timed = latency._seconds

    def known(node: Any, fused: Any, *args: Any, **kwargs: Any) -> Any:
        kept = fused.weight != 0
        n = round(16 * kept.float().mean().item())
        pattern = f"{n}:16{'x4' if kept[0].equal(kept[1]) else ''}"
        return dataclasses.replace(timed(node, fused, *args, **kwargs), seconds=milliseconds.get(pattern, 10) / 1e3)

    monkeypatch.setattr(latency, "_seconds", known)
    monkeypatch.setattr(latency, "compile_frozen", lambda model, example: None)
    model, x = load_demo(trained=True), torch.zeros(1, 1, 8, 8)
    sites = library.find_sites(model, x)
    others = tuple(site.name for site in list(sites)[:-1] if site.length % 16 == 0)
    problem = make_problem(sites, target=0.0, patterns=tuple(milliseconds), mixed=True, keep_dense=others)
    assert problem.free
    offered = {s.name: {p: problem.grouping(i, p) for p in problem.options[i]} for i, s in enumerate(sites)}
    found = measure_latency(model, offered, x)
    for i in problem.free:
        price = found.prices[sites.sites[i].name]
        assert {str(p): cost / 1e6 for p, cost in price.items() if not p.is_dense} == pytest.approx(expected)
        assert price[Pattern.DENSE] == 10_000_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["digits.nmfx"], "has no scheme yet; run `nmfx search digits.nmfx`, or give --scheme FILE"),
        (["digits.nmfx", "--batch", "1,x"], "--batch 1,x: expected whole numbers"),
        (["digits.nmfx", "--engines", "tflite"], "expected names of onnxruntime, openvino,"),
        (["nowhere.safetensors"], "no such file"),
        (["resnet5000"], "resnet5000"),
        (["digits", "--figure", "a.bmp"], "a.bmp"),
        (["digits.nmfx/weights.safetensors"], "plain weights; bench takes a compressed checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_timed(argv: list[str], message: str, nmfx: Run) -> None:
    nmfx("convert", "digits")
    _, err = nmfx("bench", *argv, fails=True)
    assert message in err
