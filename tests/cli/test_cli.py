"""Laws of the command: every stage does its part and says so; every error is one line, exit code 1, no file half-written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from awkward import same
from cases import cases
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves

from nmfx.cli.main import main
from nmfx.demo.digits import load_demo
from nmfx.errors import CheckpointError
from nmfx.export.checkpoint import load_checkpoint, save_checkpoint
from nmfx.models.building import build_model
from nmfx.models.census import find_sites
from nmfx.models.source import Source
from nmfx.passes.baking import bake
from nmfx.passes.transform import scheme_of, transform
from nmfx.passes.verification import verify
from nmfx.scheme import Scheme
from nmfx.stages import build, export
from nmfx.stages.work import open_work

ROOT = Path(__file__).parents[2]
DIGITS = Path("digits.nmfx")


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def nmfx(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that works; its output and what it says on standard error, both plain text."""

    def run(*argv: str) -> tuple[str, str]:
        assert main(argv) == 0, capsys.readouterr().err
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
        return captured.out, captured.err

    return run


STAMPS = ("stages/build.json", "stages/written.json")  # what `nmfx run` goes by


def listing(folder: Path = Path()) -> dict[str, Any]:
    """Every file with its content, hidden ones too."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that cannot work: exit code 1, one line on standard error, no file touched. Gives the line."""

    def run(*argv: str) -> str:
        before = listing()
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert listing() == before
        return error.strip()

    return run


def kept(out: str) -> tuple[int, int, int, int]:
    """The totals table: weights dense and kept, MACs dense and kept."""
    rows = [re.search(rf"^{name} +([\d,]+) +([\d,]+) ", out, re.MULTILINE) for name in ("weights", "MACs")]
    assert all(rows), out
    return tuple(int(row[i].replace(",", "")) for row in rows if row for i in (1, 2))  # type: ignore[return-value]


# convert


def test_convert_by_name_shows_and_writes(nmfx: Run) -> None:
    out, err = nmfx("convert", "resnet18", "--weights", "none", "--input-size", "64")
    assert "torchvision:resnet18 (ResNet, random weights)" in out
    model = torchvision.models.resnet18()
    sites = find_sites(model, torch.empty(1, 3, 64, 64))
    for site in sites:
        assert re.search(rf"^{re.escape(site.name)} .*{'x'.join(map(str, site.shape))} .*dense", out, re.MULTILINE)
    assert kept(out) == (sites.weights, sites.weights, sites.macs, sites.macs)
    assert "all 21 sites read through all-ones masks, dense against original: largest difference 0 (exact)" in out
    assert "WARNING: torchvision:resnet18 has random weights" in err
    assert "next: nmfx search resnet18.nmfx" in out
    assert sorted(listing()) == [
        "resnet18.nmfx", *(f"resnet18.nmfx/{name}" for name in ("stages", *STAMPS, "work.yaml"))
    ]  # fmt: skip
    head = yaml.safe_load(Path("resnet18.nmfx/work.yaml").read_text())
    assert (head["model"], head["weights"], head["input_size"]) == ("torchvision:resnet18", "random", "3x64x64")


def test_convert_with_a_pattern_and_with_a_scheme(nmfx: Run) -> None:
    out, _ = nmfx("convert", "resnet18", "--weights", "none", "--input-size", "64", "--pattern", "2:4", "--graph")
    assert "groups of 20 sites hold at most N (2:4 x 20, dense x 1)" in out
    assert "in=3 does not divide by 4: conv1.weight" in out
    assert "layer1_0_conv1 : " in out
    dense_weights, weights, *_ = kept(out)
    assert weights == (dense_weights - 64 * 3 * 49) // 2 + 64 * 3 * 49
    scheme = Path("resnet18.nmfx/scheme.yaml")
    for path in (scheme, scheme.with_suffix(".txt")):
        again, _ = nmfx(
            "convert", "resnet18", "--weights", "none", "--input-size", "64", "--scheme", str(path), "-o", path.suffix[1:]
        )
        assert kept(again) == kept(out)
        assert yaml.safe_load(Path(path.suffix[1:], "scheme.yaml").read_text())["patterns"]["fc.weight"] == "2:4"


@pytest.mark.parametrize(
    ("policy", "pattern"),
    [(["--layout", "flat"], "2:4"), (["--remainder", "smaller"], "2:3"), (["--remainder", "short"], "2:4")],
    ids=lambda value: str(value[-1]) if isinstance(value, list) else value,
)
def test_convert_takes_a_policy(policy: list[str], pattern: str, nmfx: Run) -> None:
    nmfx("convert", "timm:test_resnet", "--weights", "none", "--input-size", "32", "--pattern", "2:4", *policy)
    tree = yaml.safe_load(Path("test_resnet.nmfx/scheme.yaml").read_text())
    assert tree["patterns"]["conv1.0.weight"] == pattern


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_convert_takes_a_file_of_weights(suffix: str, nmfx: Run) -> None:
    state = {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in load_demo(trained=False).state_dict().items()
    }
    (save_file if suffix == "safetensors" else torch.save)(state, f"mine.{suffix}")
    out, err = nmfx("convert", "demo:digits", "--weights", f"mine.{suffix}")
    assert f"weights from mine.{suffix}" in out
    assert not err
    assert same(
        load_file(DIGITS / "weights.safetensors").values(), [state[key] for key in load_file(DIGITS / "weights.safetensors")]
    )


def no_hub(self: Source, *, pretrained: bool = False) -> nn.Module:
    if pretrained:
        raise OSError("hub: Connection refused\nand more lines that nobody wants")
    return built(self)


built = Source.build


def test_without_a_hub_it_goes_on_and_every_stage_says_so(nmfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "build", no_hub)
    warning = (
        "WARNING: timm:test_resnet has random weights (pretrained weights of timm:test_resnet cannot be had: "
        "hub: Connection refused): anything found reflects shapes only"
    )
    for argv in (
        ["convert", "timm:test_resnet", "--input-size", "32"],
        ["search", "--target", "0.5"],
        ["export"],
        ["inspect", "test_resnet.nmfx"],
    ):
        _, err = nmfx(*argv)
        assert err.strip() == warning, argv
    for path in ("test_resnet.nmfx/scheme.yaml", "test_resnet.nmfx/export/scheme.yaml"):
        assert yaml.safe_load(Path(path).read_text())["weights"] == "random"


def test_random_weights_are_the_same_at_every_stage(nmfx: Run) -> None:
    nmfx("convert", "timm:test_resnet", "--weights", "none", "--input-size", "32", "--pattern", "2:4")
    torch.manual_seed(12345)
    nmfx("export")
    expected = transform(build_model("timm:test_resnet", weights="none").model, Scheme.load("test_resnet.nmfx/scheme.yaml"))
    loaded = load_checkpoint("test_resnet.nmfx/export/test_resnet.safetensors")
    assert same(bake(loaded).state_dict().values(), bake(expected).state_dict().values())


def test_force_replaces_a_work_directory_whole(nmfx: Run) -> None:
    nmfx("convert", "demo:digits", "--pattern", "2:4")
    nmfx("convert", "demo:digits", "--weights", "none", "--force")
    assert sorted(listing()) == ["digits.nmfx", *(f"digits.nmfx/{name}" for name in ("stages", *STAMPS, "work.yaml"))]


# search


@pytest.fixture
def digits(nmfx: Run) -> Path:
    """The work directory of the demo network."""
    nmfx("convert", "demo:digits")
    return DIGITS


def test_search_with_nothing_there_takes_the_demo(nmfx: Run) -> None:
    out, err = nmfx("search")
    assert "searching the embedded demo network (demo:digits" in out
    assert "nmfx search --model resnet50" in out
    assert "warning" not in err.lower()
    assert DIGITS.joinpath("scheme.yaml").is_file()


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("method", ["domino", "knapsack", "erk", "uniform"])
def test_search_finds_and_writes(method: str, budget: str, digits: Path, nmfx: Run) -> None:
    out, err = nmfx(
        "search", "--target", "0.75", "--method", method, "--budget", budget, "--keep-dense", "classifier*", "--events"
    )
    assert not err
    model = load_demo(trained=True)
    sites = find_sites(model)
    schemes = [Scheme.load(digits / f"scheme.{suffix}", sites) for suffix in ("yaml", "txt")]
    assert schemes[0].patterns == schemes[1].patterns
    totals = schemes[0].totals(sites)
    assert kept(out) == (totals.weights, totals.kept, totals.macs, totals.kept_macs)
    assert (totals.kept <= totals.weights / 4) if budget == "params" else (totals.kept_macs <= totals.macs / 4)
    assert "classifier.weight" not in schemes[0]
    assert "kept dense by 'classifier*'" in out
    assert re.search(r"^ *1  \w.*: 1:1 -> \d+:16 +\(", out, re.MULTILINE)
    assert "the exact optimum at this budget" in out
    assert (schemes[0].info["model"], schemes[0].info["weights"], schemes[0].info["method"]) == (
        "demo:digits",
        "pretrained",
        method,
    )
    bars = re.findall(r"^(\S+\.weight) +(\S+) +(█+)░* ", out, re.MULTILINE)
    assert [name for name, _, _ in bars] == [site.name for site in sites]
    for name, pattern, bar in bars:
        assert pattern == str(schemes[0].get(name, "dense"))
        assert len(bar) == max(1, round(32 * (schemes[0].kept(sites[name]) / sites[name].weights)))


def test_search_finds_its_work_directory(digits: Path, nmfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    nmfx("search", "digits.nmfx", "--target", "0.5")
    nmfx("search", "--model", "demo:digits", "--target", "0.5", "--force")
    monkeypatch.chdir(digits)
    nmfx("search", "--target", "0.5", "--force")
    assert not list(Path().rglob("*.nmfx"))


def test_search_converts_a_model_first(nmfx: Run) -> None:
    out, err = nmfx("search", "--model", "demo:digits", "--target", "0.5", "--out", "half.yaml")
    assert "dense against original: largest difference 0" in out
    assert "warning" not in err.lower()
    assert sorted(str(p) for p in Path().iterdir()) == ["digits.nmfx", "half.txt", "half.yaml"]


@pytest.mark.parametrize(
    "policy", [["--m", "8"], ["--candidates", "3,5"], ["--remainder", "short"], ["--layout", "flat"]], ids=lambda p: p[0]
)
def test_search_takes_options(policy: list[str], digits: Path, nmfx: Run) -> None:
    nmfx("search", "--target", "0.6", *policy)
    scheme = Scheme.load(digits / "scheme.yaml", find_sites(load_demo(trained=True)))
    assert {p.m for p in scheme.values()} == {8 if "--m" in policy else 16}
    assert "--candidates" not in policy or {p.n for p in scheme.values()} <= {3, 5}
    assert (scheme.short, scheme.layout == "flat") == ("short" in policy, "flat" in policy)


def test_a_scheme_without_words_in_the_published_format_is_said(digits: Path, nmfx: Run) -> None:
    nmfx("search", "--target", "0.5")
    _, err = nmfx("search", "--target", "0.5", "--remainder", "short", "--force")
    assert "warning: no scheme.txt: the published format has no short groups" in err
    assert sorted(p.name for p in digits.iterdir()) == [
        "scheme.txt.kept", "scheme.yaml", "stages", "weights.safetensors", "work.yaml"
    ]  # fmt: skip


# export


def test_export_writes_what_loads(digits: Path, nmfx: Run) -> None:
    nmfx("search", "--target", "0.75", "--method", "knapsack")
    out, err = nmfx("export", "--baked", "--onnx")
    assert not err
    folder, sites = digits / "export", find_sites(load_demo(trained=True))
    names = ["digits.baked.safetensors", "digits.onnx", "digits.safetensors", "scheme.txt", "scheme.yaml"]
    assert sorted(p.name for p in folder.iterdir()) == names
    scheme = Scheme.load(folder / "scheme.yaml", sites)
    expected = transform(load_demo(trained=True), digits / "scheme.yaml", sites=sites)
    loaded, baked = load_checkpoint(folder / "digits.safetensors"), load_demo(trained=False)
    baked.load_state_dict(load_file(folder / "digits.baked.safetensors"))
    assert scheme_of(loaded).patterns == scheme.patterns
    assert verify(baked, scheme).nonzeros == verify(loaded).nonzeros
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert same([loaded(x), baked(x)], [expected(x), expected(x)])
    assert re.search(r"wrote .*digits\.safetensors \([\d.]+ [kM]B, \d+\.\d% of the dense weights\)", out)


@pytest.mark.parametrize(
    ("model", "size", "shape"), [("demo:digits", "1x8x8", (1, 8, 8)), ("timm:test_vit", "3x160x160", (3, 160, 160))]
)
def test_onnx_computes_what_the_baked_model_does(model: str, size: str, shape: tuple[int, ...], nmfx: Run) -> None:
    import onnx
    import onnxruntime

    name = model.partition(":")[2]
    nmfx("convert", model, "--weights", "none", "--pattern", "2:4", "--input-size", size)
    nmfx("export", "--onnx", "--out", "out")
    assert not list(Path("out").glob("*.data")), "one file"
    session = onnxruntime.InferenceSession(f"out/{name}.onnx")
    baked = bake(load_checkpoint(f"out/{name}.safetensors"))
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), baked(x), rtol=1e-4, atol=1e-4)
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(f"out/{name}.onnx").graph.initializer]
    zeros, wanted = (
        sum(int((array == 0).sum()) for array in stored),
        sum(int((p == 0).sum()) for p in baked.parameters() if p.dim() > 1),
    )
    assert zeros >= wanted > 1000, "real zeros"


def test_export_takes_another_scheme(digits: Path, nmfx: Run) -> None:
    Scheme({"block2.conv.weight": "1:8"}).save("mine.yaml")
    nmfx("export", "--scheme", "mine.yaml", "--out", "there")
    assert str(scheme_of(load_checkpoint("there/digits.safetensors"))["block2.conv.weight"]) == "1:8"
    assert not (digits / "export").exists()


# inspect


def test_inspect_a_model(nmfx: Run) -> None:
    out, _ = nmfx("inspect", "timm:test_vit")
    assert "timm:test_vit (VisionTransformer), 26 sites" in out
    assert "pos_embed" in out, "skipped, with the reason"
    assert "blocks.0.attn.qkv.weight" in out
    assert listing() == {}


def test_inspect_a_work_directory(digits: Path, nmfx: Run) -> None:
    out, _ = nmfx("inspect", str(digits))
    assert "work directory digits.nmfx: demo:digits, pretrained weights" in out
    assert "no scheme yet; next: nmfx search digits.nmfx" in out
    search, _ = nmfx("search", "--target", "0.5")
    out, _ = nmfx("inspect", str(digits))
    assert kept(out) == kept(search)
    assert "method: knapsack  budget: params  target: 0.5  m: 16" in out


def test_inspect_what_was_written(digits: Path, nmfx: Run) -> None:
    nmfx("search", "--target", "0.5")
    nmfx("export", "--baked")
    scheme = Scheme.load(digits / "scheme.yaml")
    out, _ = nmfx("inspect", str(digits / "scheme.yaml"))
    for name in scheme.shapes:
        assert re.search(rf"{scheme.get(name, 'dense')}  {re.escape(name)}$", out, re.MULTILINE)
    out, _ = nmfx("inspect", str(digits / "scheme.txt"))
    assert "published format, 6 layers" in out
    assert re.search(r"\d+:16  SparseConv1_16-32-\(3, 3\)", out)
    out, _ = nmfx("inspect", str(digits / "export" / "digits.safetensors"))
    assert "SHA-256 agrees" in out
    assert f"packed: {len(scheme)} sites" in out
    for name, pattern in scheme.items():
        assert re.search(rf"{pattern}  {re.escape(name)}  ", out)


# Errors.


@pytest.mark.parametrize("name", ["resnt18", "timm:resnet18d2", "torchvision:resnet-18"])
def test_an_unknown_model_has_nearest_names(name: str, fails: Callable[..., str]) -> None:
    for command in (["convert", name], ["search", "--model", name], ["inspect", name]):
        assert re.search(r"no model is called .*; nearest: .*resnet18", fails(*command))


def test_pretrained_without_a_hub_is_an_error(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "build", no_hub)
    assert "cannot be had: hub: Connection refused. Use --weights FILE" in fails(
        "convert", "resnet18", "--weights", "pretrained"
    )


CONVERT_ERRORS = {
    "size": (["--input-size", "3xx8"], "--input-size 3xx8: expected the input without its batch"),
    "size 0": (["--input-size", "1x0x8"], "expected the input without its batch"),
    "size words": (["--input-size", "large"], "expected the input without its batch"),
    "size with batch": (["--input-size", "1x1x1x1x8x8"], "expected the input without its batch"),
    "size digits": (["--input-size", "3x²x8"], "expected the input without its batch"),
    "size of another model": (["--input-size", "3x8x8"], "the forward pass fails on an input of 1x3x8x8"),
    "pattern": (["--pattern", "2-4"], "'2-4' is not an N:M pattern"),
    "swapped": (["--pattern", "4:2"], "did you mean '2:4'?"),
    "no scheme": (["--scheme", "none.yaml"], "none.yaml: no such file"),
    "scheme": (["--scheme", "bad.yaml"], "bad.yaml: unknown key 'pattern'"),
    "weights": (["--weights", "none.pth"], "none.pth: no such file"),
    "foreign weights": (["--weights", "bad.pth"], "bad.pth: cannot be read as weights"),
    "other weights": (["--weights", "other.safetensors"], "is missing; the file holds 1 tensors"),
    "existing": (["--out", "old.nmfx"], "old.nmfx exists already; give --force"),
    "not ours": (["--out", "mine", "--force"], "mine exists and is no work directory of nmfx"),
    "a file": (["--out", "bad.yaml", "--force"], "bad.yaml exists and is no work directory of nmfx"),
    "under a file": (["--out", "bad.yaml/x.nmfx"], "bad.yaml/x.nmfx: cannot be written"),
}


@cases(
    CONVERT_ERRORS,
)
def test_convert_says_what_is_wrong(name: str, fails: Callable[..., str], nmfx: Run) -> None:
    nmfx("convert", "demo:digits", "--out", "old.nmfx")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    Path("bad.yaml").write_text("nmfx: scheme\nversion: 1\npattern: {}\n")
    Path("bad.pth").write_bytes(b"PK no zip")
    save_file({"x": torch.zeros(2)}, "other.safetensors")
    options, message = CONVERT_ERRORS[name]
    assert message in fails("convert", "demo:digits", *options)


SEARCH_ERRORS = {
    "target": (["--target", "0.99"], "target 0.99 of params is out of reach"),
    "target 1": (["--target", "1"], "expected a sparsity in 0 <= target < 1"),
    "target nan": (["--target", "nan"], "expected a sparsity"),
    "method": (
        ["--method", "dominoo"],
        "unknown method 'dominoo' (did you mean 'domino'?); known: knapsack, domino",
    ),
    "m": (["--m", "100"], "m = 100: expected a group size in 2..64"),
    "large candidate": (["--candidates", "1,32"], "candidate N = 32"),
    "dense candidate": (["--candidates", "16"], "out of reach"),
    "glob": (["--keep-dense", "blok*"], "keep-dense: no site matches 'blok*'"),
    "no directory": (["none.nmfx"], "none.nmfx: not a work directory"),
    "two sources": (["digits.nmfx", "--model", "resnet18"], "give a work directory or --model, not both"),
    "existing": (["--out", "old.yaml"], "old.yaml exists already; give --force"),
    "existing beside": (["--out", "notes.yaml"], "notes.txt exists already; give --force"),
    "a folder": (["--out", "folder", "--force"], "--out folder: expected a name that ends in .yaml"),
}


@cases(
    SEARCH_ERRORS,
)
def test_search_says_what_is_wrong(name: str, digits: Path, fails: Callable[..., str]) -> None:
    for file in ("old.yaml", "notes.txt"):
        Path(file).write_text("mine")
    Path("folder").mkdir()
    options, message = SEARCH_ERRORS[name]
    assert message in fails("search", *options)


def test_a_file_beside_the_scheme_is_not_deleted(digits: Path) -> None:
    Path("notes.txt").write_text("mine")
    main(["search", "--target", "0.5", "--remainder", "short", "--out", "notes.yaml"])
    assert Path("notes.txt").read_text() == "mine"


def test_an_impossible_target_says_the_largest_and_that_works(digits: Path, nmfx: Run, fails: Callable[..., str]) -> None:
    error = fails("search", "--target", "0.95", "--budget", "macs", "--keep-dense", "block1*")
    found = re.search(r"the largest target is (0\.\d+)", error)
    assert found
    nmfx("search", "--target", f"{float(found[1]) - 1e-6:.6f}", "--budget", "macs", "--keep-dense", "block1*")


def test_several_work_directories_must_be_named(digits: Path, nmfx: Run, fails: Callable[..., str]) -> None:
    nmfx("convert", "demo:digits", "--out", "other.nmfx")
    for command in ("search", "export", "inspect", "bench", "recalibrate"):
        options = ["--data", "digits"] if command == "recalibrate" else []
        message = f"several work directories here: digits.nmfx, other.nmfx; name one, as in `nmfx {command} digits.nmfx`"
        assert message in fails(command, *options)
    nmfx("search", "other.nmfx", "--target", "0.5")


def test_what_is_there_is_not_overwritten(digits: Path, nmfx: Run, fails: Callable[..., str]) -> None:
    assert "digits.nmfx has no scheme yet; run `nmfx search digits.nmfx`" in fails("export")
    assert "digits.nmfx exists already; give --force to replace it" in fails("convert", "demo:digits")
    nmfx("search", "--target", "0.5")
    assert "scheme.yaml exists already" in fails("search", "--target", "0.6")
    nmfx("export")
    assert "scheme.yaml exists already" in fails("export")
    nmfx("export", "--baked")  # a format more of what is there
    for argv in (["export"], ["export", "--baked"], ["export", "--baked", "--onnx"]):
        assert "exists already; give --force to overwrite it, or --out" in fails(*argv)
    nmfx("search", "--target", "0.6", "--force")
    assert "digits.safetensors exists already, of another scheme or other weights" in fails("export", "--onnx")
    nmfx("export", "--force")


def test_export_asks_before_it_overwrites_scheme_txt(digits: Path, nmfx: Run, fails: Callable[..., str]) -> None:
    nmfx("search", "--target", "0.5")
    Path("out").mkdir()
    Path("out/scheme.txt").write_text("mine")
    assert "scheme.txt exists already" in fails("export", "--out", "out")


def test_an_export_that_fails_writes_nothing(
    digits: Path, nmfx: Run, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(model: nn.Module, path: Path, example: Any, **options: Any) -> None:
        raise CheckpointError(f"{path}: DigitsNet cannot be exported to ONNX: no such operator")

    monkeypatch.setitem(export.FORMATS, "onnx", replace(export.FORMATS["onnx"], function=cannot))
    nmfx("search", "--target", "0.5")
    assert "cannot be exported to ONNX" in fails("export", "--onnx")


def test_nothing_to_export(fails: Callable[..., str]) -> None:
    assert "no work directory here; make one with `nmfx convert MODEL`" in fails("export")
    assert "none.nmfx: not a work directory" in fails("export", "none.nmfx")


def test_a_scheme_of_another_model_is_refused(digits: Path, nmfx: Run, fails: Callable[..., str]) -> None:
    nmfx("convert", "timm:test_resnet", "--weights", "none", "--input-size", "32", "--pattern", "2:4")
    scheme = "test_resnet.nmfx/scheme.yaml"
    assert "conv1.0.weight" in fails("export", str(digits), "--scheme", scheme)
    assert "conv1.0.weight" in fails("convert", "demo:digits", "--scheme", scheme, "--out", "x.nmfx")


SPOILT: dict[str, tuple[str, bytes | None, str]] = {
    "no weights": ("weights.safetensors", None, "weights.safetensors: no such file"),
    "truncated weights": ("weights.safetensors", b"\x10", "truncated, or not a safetensors file"),
    "no yaml": ("work.yaml", b"model: [", "not valid YAML"),
    "binary": ("work.yaml", b"\xff\xfe\x80", "work.yaml"),
    "another yaml": ("work.yaml", b"a: b\n", "unknown key 'a'"),
    "incomplete": ("work.yaml", b"nmfx: work\nversion: 1\n", "not written by nmfx convert"),
    "newer": ("work.yaml", b"nmfx: work\nversion: 2\nmodel: demo:digits\nweights: random\n", "version 2"),
    "unknown model": ("work.yaml", b"nmfx: work\nversion: 1\nmodel: demo:diggits\nweights: random\n", "no model is called"),
    "size": ("work.yaml", b"nmfx: work\nversion: 1\nmodel: demo:digits\nweights: random\ninput_size: big\n", "big"),
}


@cases(
    SPOILT,
)
def test_a_spoilt_work_directory_is_refused(name: str, digits: Path, fails: Callable[..., str]) -> None:
    file, content, message = SPOILT[name]
    (digits / file).unlink()
    if content is not None:
        (digits / file).write_bytes(content)
    assert message in fails("search", "--target", "0.5")


def test_inspect_says_what_is_wrong(fails: Callable[..., str], nmfx: Run) -> None:
    save_checkpoint(transform(load_demo(trained=True), "2:4"), "good.safetensors")
    content = bytearray(Path("good.safetensors").read_bytes())
    content[-7] ^= 4
    Path("altered.safetensors").write_bytes(content)
    Path("short.safetensors").write_bytes(content[:200])
    save_file({"x": torch.zeros(3)}, "foreign.safetensors")
    Path("empty.nmfx").mkdir()
    for name, text in {
        "evil.txt": "{'a': __import__('os').system('touch PWNED')}",
        "list.txt": "[1, 2]",
        "prose.txt": "To be.",
    }.items():
        Path(name).write_text(text)
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    for what, message in {
        "altered.safetensors": "altered since it was written",
        "short.safetensors": "truncated, or not a safetensors file",
        "foreign.safetensors": "a safetensors file, but not a checkpoint of nmfx",
        "none.safetensors": "no such file",
        "none.yaml": "no such file or directory",
        "no/where": "no such file or directory",
        "empty.nmfx": "empty.nmfx: not a work directory",
        "evil.txt": "evil.txt",
        "list.txt": "list.txt: expected a YAML mapping",
        "prose.txt": "prose.txt: expected a YAML mapping",
        "picture.png": "picture.png: cannot be read as a scheme",
    }.items():
        assert message in fails("inspect", what)
    nmfx("inspect", "good.safetensors")


# Brackets are markup to rich.


def test_a_path_is_shown_as_it_is(nmfx: Run) -> None:
    out, _ = nmfx("convert", "demo:digits", "--out", "x[old].nmfx")
    assert "x[old].nmfx" in out


def test_names_of_a_foreign_scheme_are_shown_as_they_are(nmfx: Run) -> None:
    Path("s.yaml").write_text('nmfx: scheme\nversion: 1\npatterns: {"a[/b].weight": "2:4"}\n')
    out, _ = nmfx("inspect", "s.yaml")
    assert "a[/b].weight" in out


def test_an_error_is_shown_as_it_is(fails: Callable[..., str]) -> None:
    assert "[/red]x.yaml: no such file" in fails("inspect", "[/red]x.yaml")


# Interrupted, killed, misspelt.


def test_an_interrupt_leaves_nothing(nmfx: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "save_scheme", interrupt)
        assert main(["convert", "demo:digits", "--pattern", "2:4"]) == 130
        assert listing() == {}
        assert "interrupted; nothing half-written" in capsys.readouterr().err
    nmfx("convert", "demo:digits", "--pattern", "2:4")
    before = listing()
    with monkeypatch.context() as patch:
        patch.setattr(build, "save_scheme", interrupt)
        assert main(["convert", "demo:digits", "--pattern", "1:4", "--force"]) == 130
    assert listing() == before


@pytest.mark.parametrize("argv", [["serch"], ["convert"], ["search", "--budget", "flops"]], ids=" ".join)
def test_a_misspelt_command_shows_its_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: nmfx" in capsys.readouterr().err
    assert listing() == {}


# Pretrained networks that torchvision builds otherwise than random ones.

OTHERWISE: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
    "googlenet": (
        torchvision.models.GoogLeNet_Weights,
        lambda: torchvision.models.googlenet(init_weights=False, transform_input=True),
    ),
    "deeplabv3_mobilenet_v3_large": (
        torchvision.models.segmentation.DeepLabV3_MobileNet_V3_Large_Weights,
        lambda: torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights_backbone=None, aux_loss=True),
    ),
}
BUILT_OTHERWISE = (
    "Work.load builds without weights: no transform_input, other auxiliary heads; weights.safetensors does not fit"
)


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@cases(OTHERWISE)
def test_a_pretrained_network_goes_through_the_chain(name: str, nmfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, make = OTHERWISE[name]
    monkeypatch.setattr(weights, "get_state_dict", lambda self, *args, **options: state)
    state = make().state_dict()
    nmfx("convert", f"torchvision:{name}", "--input-size", "3x64x64")
    expected = build_model(f"torchvision:{name}", weights="pretrained").model
    found = open_work(Path(f"{name}.nmfx")).load()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert same(tree_leaves(found(x)), tree_leaves(expected(x)))


# From a shell.


def shell(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "COLUMNS")}
    command = [sys.executable, *options]
    return subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_comes_without_torch_and_without_colour() -> None:
    done = shell("-X", "importtime", "-m", "nmfx", "--help")
    assert done.returncode == 0
    for command in ("convert", "search", "export", "inspect"):
        assert re.search(rf"^    {command} ", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "nmfx" in imported
    assert not imported & {"torch", "torchvision", "timm", "numpy", "rich"}


def test_an_error_from_a_shell_is_one_plain_line() -> None:
    done = shell("-m", "nmfx", "inspect", "nowhere/file")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: nowhere/file: no such file or directory\n")
