"""Sparse to sparser, as a user types it: a compressed checkpoint, a higher target, and the same through recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nmfx.cli.main import main
from nmfx.demo.digits import load_demo
from nmfx.export.checkpoint import load_checkpoint, read_checkpoint
from nmfx.models.census import find_sites
from nmfx.passes.baking import bake
from nmfx.recipe.loader import find_recipe
from nmfx.scheme import Scheme
from nmfx.sparsity.pattern import Pattern

CHECKPOINT, SPARSER = Path("first.nmfx/export/digits.safetensors"), Path("sparser.nmfx")
DIGITS = ("--data", "digits", "--batch-size", "64")
Run = Callable[..., str]


@pytest.fixture
def start(nmfx: Run) -> Scheme:
    """The demo network at 0.75, exported, and converted from that: the scheme it has got."""
    nmfx("convert", "digits", "-o", "first.nmfx")
    nmfx("search", "first.nmfx", "--target", "0.75", "--method", "knapsack")
    nmfx("export", "first.nmfx")
    out = nmfx("convert", "digits", "--weights", str(CHECKPOINT), "-o", str(SPARSER))
    assert "compressed weights: " in out
    assert "no search makes a site denser" in out
    return read_checkpoint(CHECKPOINT)[0].scheme


def check_sparser(scheme: Scheme, start: Scheme, target: float) -> None:
    sites = find_sites(load_demo(trained=True))
    assert all(scheme.kept(site) <= start.kept(site) for site in sites)
    assert all(scheme.get(name, Pattern.DENSE).density <= pattern.density for name, pattern in start.items())
    assert scheme.totals(sites).sparsity >= target


def test_the_weights_are_those_of_the_checkpoint(start: Scheme, nmfx: Run) -> None:
    weights = load_file(SPARSER / "weights.safetensors")
    for name, value in bake(load_checkpoint(CHECKPOINT)).state_dict().items():
        assert torch.equal(weights[name], value), name
    assert "starts from a compressed checkpoint: " in nmfx("inspect", str(SPARSER))
    table = nmfx("evaluate", str(SPARSER), "--data", "digits")
    checkpoint = nmfx("evaluate", str(CHECKPOINT), "--data", "digits")
    assert table.splitlines()[1].split()[1:4] == checkpoint.splitlines()[1].split()[1:4]
    assert table.splitlines()[1].startswith("start ")


@pytest.mark.parametrize(
    "argv",
    [(), ("--method", "domino"), ("--m", "32"), ("--method", "knapsack", "--m", "8,16,32"), ("--method", "uniform")],
    ids=lambda argv: " ".join(argv) or "default",
)
def test_a_higher_target_then_training_then_export(argv: tuple[str, ...], start: Scheme, nmfx: Run) -> None:
    out = nmfx("search", str(SPARSER), "--target", "0.85", *argv)
    assert "starts from sparser.nmfx/start.yaml: " in out
    scheme = Scheme.load(SPARSER / "scheme.yaml", find_sites(load_demo(trained=True)))
    check_sparser(scheme, start, 0.85)
    if argv:
        return
    nmfx("finetune", str(SPARSER), *DIGITS, "--epochs", "1", "--lr", "0.02")
    trained = read_checkpoint(SPARSER / "finetune" / "model.safetensors")[0]
    assert trained.scheme.patterns == scheme.patterns
    assert trained.info["weights"] == "fine-tuned from file (epoch 1 of 1, the best)"
    nmfx("export", str(SPARSER))
    again = nmfx("convert", "digits", "--weights", str(SPARSER / "finetune" / "model.safetensors"), "-o", "third.nmfx")
    assert "sparsity 0.8" in again


def test_domino_on_pictures(start: Scheme, nmfx: Run) -> None:
    fast = ("--method", "domino", "--decay", "10", "--vote-every", "5", "--most", "600")
    nmfx("search", str(SPARSER), "--target", "0.85", *DIGITS, *fast)
    check_sparser(Scheme.load(SPARSER / "scheme.yaml", find_sites(load_demo(trained=True))), start, 0.85)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["search", str(SPARSER), "--target", "0.75"], "target 0.75 of params, now 0.76"),
        (["search", str(SPARSER), "--target", "2x"], "the scheme to start from meets it already; give a higher target"),
        (["search", str(SPARSER), "--target", "0.99"], "out of reach"),
        (["convert", "resnet18", "--weights", str(CHECKPOINT)], "digits.safetensors: "),
        (["convert", "digits", "--weights", "gone.safetensors"], "gone.safetensors: no such file"),
        (["convert", "digits", "--weights", "cut.safetensors"], "cut.safetensors: truncated"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_says_why(argv: list[str], message: str, start: Scheme, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cut.safetensors").write_bytes(CHECKPOINT.read_bytes()[:-100])
    before = sorted(Path().rglob("*"))
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(Path().rglob("*")) == before


def test_the_network_is_built_as_the_checkpoint_says(nmfx: Run) -> None:
    nmfx("convert", "resnet20", "--classes", "7", "--weights", "none", "--pattern", "4:16", "-o", "first.nmfx")
    nmfx("export", "first.nmfx")
    nmfx("convert", "resnet20", "--weights", "first.nmfx/export/resnet20.safetensors", "-o", "again.nmfx")
    out = nmfx("search", "again.nmfx", "--target", "0.9")
    assert "10x64" not in out
    nmfx("export", "again.nmfx")
    assert load_checkpoint("again.nmfx/export/resnet20.safetensors").fc.out_features == 7


def test_the_packaged_recipe_runs_after_digits(nmfx: Run) -> None:
    quick = ("run", "quick.yaml", "-o", "digits.nmfx")
    Path("quick.yaml").write_text("base: digits\nfinetune:\n  epochs: 1\n")
    Path("sparser.yaml").write_text(find_recipe("digits-sparser").read_text() + "finetune:\n  epochs: 1\n")
    first = nmfx(*quick)
    out = nmfx("run", "sparser.yaml")
    said = {
        line.split()[0]: line.split()[1:4] for line in (first + out).splitlines() if line.startswith(("start ", "exported "))
    }
    assert said["start"] == next(line.split()[1:4] for line in first.splitlines() if line.startswith("exported "))
    starting = read_checkpoint("digits.nmfx/export/digits.safetensors")[0].scheme
    check_sparser(read_checkpoint("sparser.nmfx/export/digits.safetensors")[0].scheme, starting, 0.92)
    assert nmfx("run", "sparser.yaml").count("skipped") == 6
    Path("quick.yaml").write_text("base: digits\nfinetune:\n  epochs: 2\n")
    nmfx(*quick, "--until", "export")
    assert "build: changed: content of weights" in nmfx("run", "sparser.yaml", "--until", "build")
    assert "one update on 2 random pictures" in nmfx("run", "sparser.yaml", "--check")
